"""What the allocator held at an instant, and why a request failed, from its own history."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import polars as pl

from attnprof.analysis.allocator.history import (
    OOM,
    SEGMENT_GIVEN,
    SEGMENT_TAKEN,
    Ints,
    list_seedings,
)
from attnprof.analysis.allocator.pools import SHARED
from attnprof.analysis.allocator.segments import Span, cut, list_gaps, merge
from attnprof.analysis.allocator.settings import AllocatorSettings
from attnprof.analysis.allocator.simulation import simulate_allocator
from attnprof.analysis.device_history import AllocatorAttribution, DeviceHistory
from attnprof.analysis.peak import Peak

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryState:
    """What the allocator of a device held after an event."""

    allocated_bytes: int
    """Blocks that the program holds."""
    awaiting_bytes: int
    """Blocks that the program let go of and that other streams still use."""
    reserved_bytes: int
    """All segments; 0 where the history tells nothing of segments."""
    free_blocks: int
    """Pieces that the reserved memory without blocks is in."""
    largest_free_block_bytes: int
    """The largest of them."""
    private_bytes: int
    """What of ``allocated_bytes`` lies in private pools, as CUDA graphs have them."""
    private_free_bytes: int
    """What of ``free_bytes`` lies in such pools, and serves nobody else."""

    @property
    def free_bytes(self) -> int:
        """Reserved memory that no block covers: the cache, in pieces."""
        return max(self.reserved_bytes - self.allocated_bytes - self.awaiting_bytes, 0)


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that the device had no room for."""

    device: str
    time_ns: int
    requested_bytes: int
    device_free_bytes: int
    """What the device had free, outside of the allocator."""
    place: str
    """The module, or in an imported run the line of code, that asked; empty if not known."""
    state: MemoryState
    held: Peak
    """What was live then, in the form of a peak."""
    fits_with_expandable_segments: bool | None
    """Whether the same requests would have fitted with ``expandable_segments:True``, from a replay;
    None where they were on, or where the history says too little for one."""

    @property
    def is_capped(self) -> bool:
        """Whether the device had room for more than any segment that the request could need.

        Then the process was kept from taking it: ``torch.cuda.set_per_process_memory_fraction``.
        """
        return _is_capped(self.requested_bytes, self.device_free_bytes)

    @property
    def is_fragmented(self) -> bool:
        """Whether the free memory would have been enough in one piece.

        The request is taken for one of the pool that everyone shares; few releases of torch say it.
        """
        return not self.missing_bytes

    @property
    def missing_bytes(self) -> int:
        """How much more than was free, outside of private pools, the request needed; else 0."""
        device_free_bytes = 0 if self.is_capped else self.device_free_bytes
        free_bytes = self.state.free_bytes - self.state.private_free_bytes + device_free_bytes
        return max(self.requested_bytes - free_bytes, 0)


def _is_capped(requested_bytes: int, device_free_bytes: int) -> bool:
    """Return what `FailedRequest.is_capped` does.

    Requests of up to 10 MiB are served from a segment of at most 20; others are rounded up to 2.
    """
    return max(requested_bytes + 2 * _MIB, 20 * _MIB) <= device_free_bytes


def describe_state(history: DeviceHistory, at: int) -> MemoryState:
    """Return what was held once the event ``at`` had happened; of seeds, once all had."""
    _, at = find_seeds(history, at)
    spans, held = map_memory(history, at)
    lives = history.lives
    is_allocated = (lives.end[held] < 0) | (lives.end[held] > at)
    sizes = lives.size_bytes[held]
    starts = history.events.address[lives.begin[held]]
    blocks = list(zip(starts.tolist(), (starts + sizes).tolist(), strict=True))
    reserved_bytes = sum(end - begin for own in spans.values() for begin, end in own)
    shared = list_gaps(spans.pop(SHARED, ()), blocks)
    private = list_gaps(chain.from_iterable(spans.values()), blocks)
    is_private = history.pool[lives.begin[held]] != SHARED
    return MemoryState(
        allocated_bytes=int(sizes[is_allocated].sum()),
        awaiting_bytes=int(sizes[~is_allocated].sum()),
        reserved_bytes=reserved_bytes,
        free_blocks=len(shared) + len(private),
        largest_free_block_bytes=max((*shared, *private), default=0),
        private_bytes=int(sizes[is_allocated & is_private].sum()),
        private_free_bytes=sum(private),
    )


def map_memory(history: DeviceHistory, at: int) -> tuple[dict[int, list[Span]], Ints]:
    """Return the segments that were reserved after an event, and the blocks that cover them.

    Args:
        history: A device's.
        at: The event; of seeds, all of them have happened then.

    Returns:
        The segments of each pool, and rows of `DeviceHistory.lives`; both in the order of
        addresses. Blocks that other streams still use after the program let go of them are among
        these.
    """
    events, lives = history.events, history.lives
    first, at = find_seeds(history, at)
    taken = lives.begin <= at
    held = np.flatnonzero(taken & ((lives.reusable < 0) | (lives.reusable > at)))
    # Pages that lie beside each other serve one block; segments of cudaMalloc do not.
    put_in_order = merge if history.settings.expandable_segments else sorted
    spans = {
        pool: put_in_order(own.items()) for pool, own in _list_segments(history, first, at).items()
    }
    return spans, held[np.argsort(events.address[lives.begin[held]], kind="stable")]


def find_seeds(history: DeviceHistory, at: int) -> tuple[int, int]:
    """Return where all that is there was last told, and the event, or the last of these seeds."""
    begin = 0
    for first, after in list_seedings(history.events):
        if first <= at:
            begin, at = first, max(at, after - 1)
    return begin, at


def _list_segments(history: DeviceHistory, first: int, last: int) -> dict[int, dict[int, int]]:
    """Return the segments there are after ``last``; what was before ``first`` is told anew.

    Returns:
        Per pool, the end of each by its beginning.
    """
    events = history.events
    kind = events.kind[: last + 1]
    rows = np.flatnonzero((kind == SEGMENT_TAKEN) | (kind == SEGMENT_GIVEN))
    spans: dict[int, dict[int, int]] = {}
    for row in rows[rows >= first].tolist():
        begin = int(events.address[row])
        end = begin + int(events.size_bytes[row])
        if kind[row] == SEGMENT_TAKEN:
            spans.setdefault(int(history.pool[row]), {})[begin] = end
        else:
            # Most go as they came, and the other pools need not be looked through.
            whole = [own for own in spans.values() if own.get(begin) == end]
            for own in whole or spans.values():
                cut(own, begin, end)
    return spans


def find_state_at_peak(attribution: AllocatorAttribution, peak: Peak) -> MemoryState | None:
    """Return what the allocator held at a peak; None for a device without a history."""
    history = next((h for h in attribution.histories if h.device == peak.device), None)
    if history is None or peak.allocations.is_empty():
        return None
    held = peak.allocations["allocation_id"].to_numpy()
    # Blocks are numbered by their rows; the newest makes the peak.
    newest = int(attribution.allocations["start"].to_numpy()[held].max())
    return describe_state(history, int(np.searchsorted(history.position, newest)))


def find_failed_request(attribution: AllocatorAttribution) -> FailedRequest | None:
    """Return the last request that failed, of the device where that was last; None if none did."""
    found = [
        (int(history.time_ns[rows[-1]]), history, int(rows[-1]))
        for history in attribution.histories
        if len(rows := np.flatnonzero(history.events.kind == OOM))
    ]
    if not found:
        return None
    _, history, at = max(found, key=lambda each: each[0])
    return _describe_failure(attribution, history, at)


def _describe_failure(
    attribution: AllocatorAttribution, history: DeviceHistory, at: int
) -> FailedRequest:
    requested = int(history.events.size_bytes[at])
    free = int(history.events.address[at])
    state = describe_state(history, at)
    place, op = attribution.describe_event(history, at)
    position = int(history.position[at])
    own = attribution.allocations.filter(pl.col("device").cast(pl.String) == history.device)
    live = own.filter((pl.col("start") <= position) & (pl.col("end") > position))
    newest = own.filter(pl.col("start") <= position).tail(1)
    held = Peak(
        device=history.device,
        total_bytes=state.allocated_bytes,
        step=int(newest["step"][0]) if len(newest) else 0,
        phase=str(newest["phase"][0]) if len(newest) else "outside",
        layer=place,
        op=op,
        time_ns=int(history.time_ns[at]),
        allocations=live.drop("start", "end").sort(
            "size_bytes", "allocation_id", descending=[True, False]
        ),
    )
    return FailedRequest(
        device=history.device,
        time_ns=held.time_ns,
        requested_bytes=requested,
        device_free_bytes=free,
        place=place,
        state=state,
        held=held,
        fits_with_expandable_segments=_try_expandable(history, own, at, state),
    )


def _try_expandable(
    history: DeviceHistory, own: pl.DataFrame, at: int, state: MemoryState
) -> bool | None:
    """Replay what was asked for with expandable segments, in the memory that there was."""
    if history.settings.expandable_segments or not state.reserved_bytes:
        return None
    requested = int(history.events.size_bytes[at])
    device_free_bytes = int(history.events.address[at])
    if _is_capped(requested, device_free_bytes):
        device_free_bytes = 0
    position = int(history.position[at])
    failed = pl.DataFrame(
        {
            "device": [history.device],
            "start": [position],
            "end": [position + 1],
            "requested_bytes": [requested],
            "size_bytes": [requested],
        }
    )
    spans, _ = map_memory(history, at)
    own = own.filter(pl.col("start") < position)
    taken = np.searchsorted(history.position, own["start"].to_numpy())
    before = own.filter(history.pool[taken] == SHARED).with_columns(
        pl.col("device").cast(pl.String)
    )
    simulated = simulate_allocator(
        pl.concat([before.select(failed.columns), failed]),
        device=history.device,
        settings=AllocatorSettings(expandable_segments=True),
        capacity_bytes=sum(end - begin for begin, end in spans.get(SHARED, ())) + device_free_bytes,
    )
    return simulated.out_of_memory is None
