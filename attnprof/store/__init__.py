"""The run directory: what capture wrote and everything else reads."""

from attnprof.store.reader import StoredRun, open_run
from attnprof.store.writer import RunWriter

__all__ = ["RunWriter", "StoredRun", "open_run"]
