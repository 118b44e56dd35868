"""The command line of attnprof, one file per verb."""

from attnprof.cli.app import main

__all__ = ["main"]
