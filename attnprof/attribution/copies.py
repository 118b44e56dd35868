"""What the program itself copies between forwards: beams in another order, moved caches."""

import numpy as np

from attnprof.attribution.facts import Facts

_COPYING = frozenset(
    {"cat", "stack", "index_select", "index", "gather", "repeat_interleave"}
    | {"clone", "contiguous", "copy_", "_to_copy"}
)


def find_copying(facts: Facts) -> list[int]:
    """Return the ops outside of modules that copy: the program's own, not a layer's."""
    copies = np.array([name in _COPYING for name in facts.short_names], np.bool_)
    found: list[int] = np.flatnonzero(
        copies[facts.code] & (facts.scope < 0) & ~facts.is_backward
    ).tolist()
    return found


def find_originals(facts: Facts) -> dict[int, int]:
    """Return what the program copied between forwards, each copy with its original.

    Beam search puts caches and states in another order like that; layers then read the copies.
    """
    found: dict[int, int] = {}
    for op in find_copying(facts):
        sources = [int(facts.storage[row]) for row in facts.rows_in(op)]
        for row in facts.rows_out(op) if sources else ():
            if facts.born_by[facts.storage[row]] == op:
                found[int(facts.storage[row])] = found.get(sources[0], sources[0])
    return found
