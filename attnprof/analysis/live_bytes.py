"""How many bytes of some blocks are live at once."""

import numpy as np

from attnprof.attribution.facts import Ints


class LiveBytes:
    """The bytes of some blocks that are live, over places in the order of events."""

    def __init__(self, start: Ints, end: Ints, size_bytes: Ints) -> None:
        """Sum up blocks that are live from ``start`` until ``end``."""
        at = np.concatenate([end, start])  # what is freed at an event goes before what comes
        change = np.concatenate([-size_bytes, size_bytes])
        order = np.argsort(at, kind="stable")
        self._at = at[order]
        self._live = np.concatenate([[0], np.cumsum(change[order])])

    @property
    def most(self) -> int:
        """The most bytes that were ever live at once."""
        return int(self._live.max())

    def most_within(self, begin: int, end: int) -> int:
        """Return the most bytes live at an instant between the events ``begin`` and ``end``."""
        first, last = np.searchsorted(self._at, [begin, end], "left")
        return int(self._live[first : last + 1].max())
