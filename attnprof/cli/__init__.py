"""The command line: ``attnprof run``, ``report``, ``demo`` and ``doctor``, one file per verb."""

from attnprof.cli.app import main

__all__ = ["main"]
