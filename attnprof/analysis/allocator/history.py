"""What the caching allocator did, from the history it records itself.

A history says when blocks were asked for and let go, at which addresses, and how many bytes were
asked for. It does not say how large the blocks are that served the requests. That follows from the
allocator's rules and from the addresses: a block that is not split takes all of the free block it
was found in. Sizes are then those that ``torch.cuda.memory_stats`` counts as allocated.

A history may have been off for a while. Where it goes on, *seeds* tell all that is there by then,
as they do where it begins.
"""

from dataclasses import dataclass

import numpy as np

from attnprof.analysis.allocator.engine import CachingAllocator
from attnprof.analysis.allocator.settings import SMALL_BYTES, AllocatorSettings
from attnprof.store.schema import RESUMED, SEED, SEGMENT_SEED

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Bools = np.ndarray[tuple[int], np.dtype[np.bool_]]

# What an action means for blocks and segments.
OTHER, ALLOC, FREE_REQUESTED, FREE_COMPLETED, SEGMENT_TAKEN, SEGMENT_GIVEN, OOM, GOES_ON = range(8)

KINDS = {
    SEED: ALLOC,
    "alloc": ALLOC,
    "free": FREE_COMPLETED,  # of some exporters
    "free_requested": FREE_REQUESTED,
    "free_completed": FREE_COMPLETED,
    SEGMENT_SEED: SEGMENT_TAKEN,
    "segment_alloc": SEGMENT_TAKEN,
    "segment_map": SEGMENT_TAKEN,
    "segment_free": SEGMENT_GIVEN,
    "segment_unmap": SEGMENT_GIVEN,
    "oom": OOM,
    RESUMED: GOES_ON,
}
"""Per action of a history, its kind; `OTHER` for what is not listed."""


@dataclass(frozen=True, slots=True)
class Events:
    """The history of one device: a row per event, in order."""

    kind: Ints
    address: Ints
    size_bytes: Ints
    """What was asked for; of segments, all of them."""
    is_seed: Bools
    """Whether the row tells what was there when the recording began, or went on."""


@dataclass(frozen=True, slots=True)
class Lives:
    """The blocks of one device, in the order in which they were taken."""

    begin: Ints
    """The event that took the block."""
    end: Ints
    """The event at which the program let go of it, or -1 while it is live."""
    reusable: Ints
    """The event from which on the memory can serve others, or -1. Where other streams still use a
    block, that is later than its end."""
    requested_bytes: Ints
    size_bytes: Ints
    """What the allocator took."""


def list_seedings(events: Events) -> list[tuple[int, int]]:
    """Return where seeds tell what is there: the first row of each place, and the one after it.

    The first place is where the history begins, the others where it goes on.
    """
    others = np.append(np.flatnonzero(~events.is_seed), len(events.kind))
    starts = np.flatnonzero(events.kind == GOES_ON)
    if len(events.is_seed) and events.is_seed[0]:
        starts = np.append(0, starts)
    ends = others[np.searchsorted(others, starts, "right")]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def list_lives(
    events: Events, settings: AllocatorSettings | None = None, *, sizes_are_exact: bool = False
) -> Lives:
    """Return the blocks of a history.

    Args:
        events: The history of one device.
        settings: The allocator's options; without, torch's defaults.
        sizes_are_exact: Whether the events have the sizes of blocks instead of requests.
    """
    kind = events.kind
    if not (kind == FREE_COMPLETED).any():  # left out of the history
        kind = np.where(kind == FREE_REQUESTED, FREE_COMPLETED, kind)
    begin, end, reusable = pair_events(kind, events.address)
    for first, after in list_seedings(events):
        # What is seeded again ends there and goes on as another block; all else is gone by then.
        for event in (end, reusable):
            event[(begin < first) & ((event < 0) | (event >= after))] = first
    requested = events.size_bytes[begin]
    size = requested
    if not sizes_are_exact:
        settings = settings or AllocatorSettings()
        size = _round_all(requested, settings)
        if not settings.expandable_segments:  # their blocks are split to the last 512 bytes
            size = _Extents(events, begin, size, settings).measure(reusable)
    return Lives(begin, end, reusable, requested, size)


def pair_events(kind: Ints, address: Ints) -> tuple[Ints, Ints, Ints]:
    """Return per block the event that took it, the one that let it go and the one that freed it.

    An address that is taken again without having been let go was let go unseen; it ends there.
    """
    rows = np.flatnonzero((kind >= ALLOC) & (kind <= FREE_COMPLETED))
    rows = rows[np.lexsort((rows, address[rows]))]
    kinds = kind[rows]
    same = np.append(address[rows[1:]] == address[rows[:-1]], [False, False])[: len(rows) + 1]
    at = np.flatnonzero(kinds == ALLOC)
    # Two more entries than there are rows, for blocks whose story ends with the table.
    rows_after = np.append(rows, [-1, -1])
    kinds_after = np.append(kinds, [OTHER, OTHER])
    end = np.where(same[at], rows_after[at + 1], -1)
    waits = same[at] & (kinds_after[at + 1] == FREE_REQUESTED)
    later = np.where(same[at + 1], rows_after[at + 2], -1) if len(at) else end
    reusable = np.where(waits, later, end)
    order = np.argsort(rows[at], kind="stable")
    return rows[at][order], end[order], reusable[order]


def find_orphans(kind: Ints, address: Ints) -> Ints:
    """Return the first event of each address that is let go without having been taken before."""
    rows = np.flatnonzero((kind >= ALLOC) & (kind <= FREE_COMPLETED))
    rows = rows[np.lexsort((rows, address[rows]))]
    is_first = np.append(True, address[rows[1:]] != address[rows[:-1]])[: len(rows)]
    return np.sort(rows[is_first & (kind[rows] != ALLOC)])


def _round_all(requested: Ints, settings: AllocatorSettings) -> Ints:
    allocator = CachingAllocator(settings)
    distinct, position = np.unique(requested, return_inverse=True)
    rounded = [allocator.round_size(size) for size in distinct.tolist()]
    return np.array(rounded, np.int64)[position]


class _Extents:
    """The free memory of the large pool, replayed by address to see what each block took of it.

    Blocks of the small pool are always split, so that rounding says all about them.
    """

    def __init__(
        self, events: Events, begin: Ints, rounded: Ints, settings: AllocatorSettings
    ) -> None:
        self._events = events
        self._begin = begin
        self._size = rounded.copy()
        self._max_split_bytes = settings.max_split_size_bytes or 2**62
        self._end_of: dict[int, int] = {}  # of free extents: from the first byte to past the last
        self._start_of: dict[int, int] = {}
        self._borders: set[int] = set()
        """Where segments begin: what is free on both sides does not merge."""

    def measure(self, reusable: Ints) -> Ints:
        """Return the size of every block."""
        large = np.flatnonzero(self._size > SMALL_BYTES)
        kind, is_seed = self._events.kind, self._events.is_seed
        is_segment = (kind == SEGMENT_TAKEN) | (kind == SEGMENT_GIVEN)
        if not is_segment.any():
            return self._size
        segments = np.flatnonzero(is_segment & ~is_seed)
        new = large[~is_seed[self._begin[large]]]
        freed = large[reusable[large] >= 0]
        freed = freed[~is_seed[reusable[freed]]]
        seedings = list_seedings(self._events)
        # Per event: when, what, and of which block, segment or seeding.
        when = np.concatenate(
            [self._begin[new], reusable[freed], segments, [first for first, _ in seedings]]
        )
        what = np.concatenate(
            [
                np.full(len(new), ALLOC),
                np.full(len(freed), FREE_COMPLETED),
                kind[segments],
                np.full(len(seedings), GOES_ON),
            ]
        )
        which = np.concatenate([new, freed, segments, np.arange(len(seedings))])
        # What frees a block may be the event that takes its address again: the free comes first.
        order = np.lexsort((what == ALLOC, when)).astype(np.int64)
        for action, number in zip(what[order].tolist(), which[order].tolist(), strict=True):
            if action == GOES_ON:
                self._begin_anew(large, *seedings[number])
            else:
                self._follow(action, number)
        return self._size

    def _follow(self, action: int, number: int) -> None:
        """Follow an event of a block, or one of a segment."""
        events, size, begin = self._events, self._size, self._begin
        if action == ALLOC:
            size[number] = self._take(int(events.address[begin[number]]), int(size[number]))
        elif action == FREE_COMPLETED:
            start = int(events.address[begin[number]])
            self._give(start, start + int(size[number]))
        elif action == SEGMENT_TAKEN:
            start = int(events.address[number])
            self._open(start, start + int(events.size_bytes[number]))
        else:
            self._close(int(events.address[number]))

    def _begin_anew(self, large: Ints, first: int, after: int) -> None:
        """Put seeded blocks into seeded segments; what lies between is free."""
        for known in (self._end_of, self._start_of, self._borders):
            known.clear()
        address, kind = self._events.address, self._events.kind
        begin = self._begin[large]
        blocks = large[(begin >= first) & (begin < after)]
        blocks = blocks[np.argsort(address[self._begin[blocks]], kind="stable")]
        starts = address[self._begin[blocks]]
        for row in (first + np.flatnonzero(kind[first:after] == SEGMENT_TAKEN)).tolist():
            at = int(address[row])
            end = at + int(self._events.size_bytes[row])
            self._borders.add(at)
            begins, ends = np.searchsorted(starts, [at, end]).tolist()
            for position in range(begins, ends):
                start, number = int(starts[position]), int(blocks[position])
                self._add(at, start)
                following = int(starts[position + 1]) if position + 1 < ends else end
                rounded = int(self._size[number])
                if not self._is_split(rounded, following - start):
                    self._size[number] = max(following - start, rounded)
                at = start + int(self._size[number])
            self._add(at, end)

    def _is_split(self, rounded: int, extent: int) -> bool:
        return rounded < self._max_split_bytes and extent - rounded > SMALL_BYTES

    def _take(self, start: int, rounded: int) -> int:
        end = self._end_of.get(start)
        if end is None or end - start < rounded:  # not seen being free
            return rounded
        self._remove(start, end)
        if self._is_split(rounded, end - start):
            self._add(start + rounded, end)
            return rounded
        return end - start

    def _give(self, start: int, end: int) -> None:
        if start not in self._borders and (before := self._start_of.get(start)) is not None:
            self._remove(before, start)
            start = before
        if end not in self._borders and (after := self._end_of.get(end)) is not None:
            self._remove(end, after)
            end = after
        self._add(start, end)

    def _open(self, start: int, end: int) -> None:
        self._borders.add(start)
        self._add(start, end)

    def _close(self, start: int) -> None:
        self._borders.discard(start)
        if (end := self._end_of.get(start)) is not None:
            self._remove(start, end)

    def _add(self, start: int, end: int) -> None:
        if start < end:
            self._end_of[start] = end
            self._start_of[end] = start

    def _remove(self, start: int, end: int) -> None:
        del self._end_of[start], self._start_of[end]
