"""The outermost forwards that ran without gradients: the steps of a decoding loop."""

import numpy as np

from attnprof.attribution.facts import Facts
from attnprof.attribution.phases import Timeline


class Forwards:
    """The outermost forwards that ran without gradients."""

    def __init__(self, facts: Facts, timeline: Timeline) -> None:
        off = ~timeline.forward_has_grad
        self.enter = timeline.forward_begin[off]
        self.leave = timeline.forward_exit[off]
        self._born_by = facts.born_by
        self._freed_at = np.append(facts.events["op"], np.iinfo(np.int64).max)[facts.freed_event]

    def number_of(self, op: int) -> int:
        """Return which forward an op ran in, or -1."""
        at = int(np.searchsorted(self.enter, op, "right")) - 1
        return at if at >= 0 and op < self.leave[at] else -1

    def begin_of(self, op: int) -> int:
        """Return where the forward began that an op ran in, or -1."""
        number = self.number_of(op)
        return int(self.enter[number]) if number >= 0 else -1

    def end_of(self, op: int) -> int:
        """Return where the forward ended that an op ran in, or -1."""
        number = self.number_of(op)
        return int(self.leave[number]) if number >= 0 else -1

    def is_from_before(self, storage: int, op: int) -> bool:
        """Return whether an earlier forward than the one of ``op`` made and left a storage."""
        made = self.number_of(int(self._born_by[storage]))
        return 0 <= made < self.number_of(op) and self.outlives(storage, int(self.leave[made]))

    def outlives(self, storage: int, leave: int) -> bool:
        """Return whether a storage was live when a forward had ended."""
        return bool(self._freed_at[storage] > leave)
