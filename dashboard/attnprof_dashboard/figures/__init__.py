"""Figures, from arrays and frames alone: nothing here knows of Dash, of files or of requests."""
