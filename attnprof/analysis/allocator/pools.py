"""Which of an allocator's events happened in private pools.

A CUDA graph, or a ``torch.cuda.MemPool``, has segments of its own, whose free memory serves nobody
else. Snapshots list segments with their pools; of events, only recent releases of torch say it. So
an event's pool is that of the segment in which it happened.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnprof.analysis.allocator.history import (
    GOES_ON,
    OOM,
    OTHER,
    SEGMENT_GIVEN,
    SEGMENT_TAKEN,
    Events,
    Ints,
)

SHARED = 0
"""The pool that everyone shares."""


@dataclass(frozen=True, slots=True)
class PrivateSegments:
    """Segments of private pools as they were listed: a row per segment and time."""

    event: Ints
    """How many events there had been; the segment was there then."""
    address: Ints
    size_bytes: Ints
    pool: Ints
    """Numbers from 1."""


def find_pools(events: Events, listed: PrivateSegments) -> Ints:
    """Return per event the number of the private pool it happened in, or `SHARED`.

    Args:
        events: The history of one device.
        listed: What was listed of its private segments.
    """
    pools = np.full(len(events.kind), SHARED)
    if not len(listed.event):
        return pools
    places = np.flatnonzero((events.kind != OOM) & (events.kind != OTHER))
    places = places[np.argsort(events.address[places], kind="stable")]
    addresses = events.address[places]
    moves = _Moves.of(events)
    columns = (listed.event, listed.address, listed.size_bytes, listed.pool)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    lasts: dict[tuple[int, int, int], int] = {}  # until when a segment is as it was listed
    for before, begin, size, pool in rows:
        if before <= lasts.get((begin, size, pool), -1):
            continue  # every commit in which segments moved may list all of them
        lasts[begin, size, pool] = moves.find_next(begin, begin + size, before)
        for taken, until, first, last in moves.list_lives(begin, begin + size, before):
            inside = places[slice(*np.searchsorted(addresses, [first, last]))]
            pools[inside[(inside >= taken) & (inside < until)]] = pool
    return pools


@dataclass(frozen=True, slots=True)
class _Moves:
    """The events that reserve memory, give it back or tell all anew."""

    row: Ints
    kind: Ints
    begin: Ints
    end: Ints
    count: int
    """How many events there are in all."""

    @classmethod
    def of(cls, events: Events) -> "_Moves":
        rows = np.flatnonzero(np.isin(events.kind, [SEGMENT_TAKEN, SEGMENT_GIVEN, GOES_ON]))
        begin = events.address[rows]
        ends = begin + events.size_bytes[rows]
        return cls(rows, events.kind[rows], begin, ends, len(events.kind))

    def find_next(self, begin: int, end: int, row: int) -> int:
        """Return the first row from ``row`` on at which something of a range may change."""
        after = int(np.searchsorted(self.row, row))
        meets = (self.begin[after:] < end) & (self.end[after:] > begin)
        found = np.flatnonzero(meets | (self.kind[after:] == GOES_ON))
        return int(self.row[after + found[0]]) if len(found) else self.count

    def list_lives(self, begin: int, end: int, before: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield what had reserved a range, as it was once ``before`` events had happened.

        Yields:
            The row that reserved it, the row at which that is over, and which part it reserved.
        """
        meets = np.flatnonzero((self.begin < end) & (self.end > begin) | (self.kind == GOES_ON))
        for at in meets[(self.kind[meets] == SEGMENT_TAKEN) & (self.row[meets] < before)].tolist():
            first, last = max(begin, int(self.begin[at])), min(end, int(self.end[at]))
            ends = meets[(meets > at) & (self.kind[meets] != SEGMENT_TAKEN)]
            is_over = (self.begin[ends] < last) & (self.end[ends] > first)
            over = self.row[ends[is_over | (self.kind[ends] == GOES_ON)]]
            until = int(over[0]) if len(over) else self.count
            if until >= before:
                yield int(self.row[at]), until, first, last
