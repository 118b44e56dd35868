"""What the caching allocator did, from the history it records itself.

A history says when blocks were asked for and let go, at which addresses, and how many bytes were
asked for. It does not say how large the blocks are that served the requests. That follows from the
allocator's rules and from the addresses: a block that is not split takes all of the free block it
was found in. Sizes are then those that ``torch.cuda.memory_stats`` counts as allocated.

A history may have been off for a while. Where it goes on, *seeds* tell all that is there by then,
as they do where it begins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnprof.analysis.allocator.engine import CachingAllocator
from attnprof.analysis.allocator.free_memory import FreeMemory
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
            size = _measure(events, begin, reusable, size, settings)
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


def _measure(
    events: Events, begin: Ints, reusable: Ints, rounded: Ints, settings: AllocatorSettings
) -> Ints:
    """Return the size of every block: of the large pool, what each took of the free memory."""
    size = rounded.copy()
    large = np.flatnonzero(size > SMALL_BYTES)
    is_segment = (events.kind == SEGMENT_TAKEN) | (events.kind == SEGMENT_GIVEN)
    if not is_segment.any():
        return size
    free = FreeMemory(settings)
    seedings = list_seedings(events)
    for action, number in _order(events, begin, reusable, large):
        row = begin[number] if action in (ALLOC, FREE_COMPLETED) else number
        start = int(events.address[row]) if action != GOES_ON else 0
        if action == GOES_ON:
            _place(free, events, begin, size, large, seedings[number])
        elif action == ALLOC:
            size[number] = free.take(start, int(size[number]))
        elif action == FREE_COMPLETED:
            free.give(start, start + int(size[number]))
        elif action == SEGMENT_TAKEN:
            free.open(start, start + int(events.size_bytes[number]))
        else:
            free.close(start)
    return size


def _order(events: Events, begin: Ints, reusable: Ints, large: Ints) -> Iterator[tuple[int, int]]:
    """Yield what happened to free memory, in order: what, and to which block, segment, seeding."""
    kind, is_seed = events.kind, events.is_seed
    is_segment = (kind == SEGMENT_TAKEN) | (kind == SEGMENT_GIVEN)
    segments = np.flatnonzero(is_segment & ~is_seed)
    new = large[~is_seed[begin[large]]]
    freed = large[reusable[large] >= 0]
    freed = freed[~is_seed[reusable[freed]]]
    seedings = list_seedings(events)
    when = np.concatenate([begin[new], reusable[freed], segments, [first for first, _ in seedings]])
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
    yield from zip(what[order].tolist(), which[order].tolist(), strict=True)


def _place(
    free: FreeMemory, events: Events, begin: Ints, size: Ints, large: Ints, seeds: tuple[int, int]
) -> None:
    """Put the blocks of a seeding into its segments, and their sizes into ``size``."""
    first, after = seeds
    blocks = large[(begin[large] >= first) & (begin[large] < after)]
    blocks = blocks[np.argsort(events.address[begin[blocks]], kind="stable")]
    rows = first + np.flatnonzero(events.kind[first:after] == SEGMENT_TAKEN)
    begins = events.address[rows]
    size[blocks] = free.begin_anew(
        list(zip(begins.tolist(), (begins + events.size_bytes[rows]).tolist(), strict=True)),
        list(zip(events.address[begin[blocks]].tolist(), size[blocks].tolist(), strict=True)),
    )
