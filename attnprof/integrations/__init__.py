"""Adapters for programs whose data flow does not show what they know of their memory."""
