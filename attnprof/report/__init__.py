"""Say what a run shows, for people (text, HTML) and for programs (JSON). Needs no torch."""
