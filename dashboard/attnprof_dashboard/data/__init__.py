"""What the pages show, read from disk: the catalogue of runs and what is derived from each."""
