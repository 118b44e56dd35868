"""Answers computed from attributed blocks: peaks, layers, timelines, steps."""
