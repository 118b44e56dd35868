"""Replay a table of allocations through the simulated allocator."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from attnprof.analysis.allocator.engine import CachingAllocator
from attnprof.analysis.allocator.settings import AllocatorSettings
from attnprof.analysis.peak import choose_device

Ints = np.ndarray


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """The request that the device had no room for. Nothing after it was replayed."""

    position: int
    """Of the allocation, in the order of events."""
    requested_bytes: int
    """What the tensor needed."""
    block_bytes: int
    """What was looked for: the request, rounded."""
    allocated_bytes: int
    """Live blocks."""
    reserved_bytes: int
    """Live blocks and what the allocator could not return, with its free memory in pieces."""
    free_bytes: int
    """What the device had left."""

    @property
    def cached_bytes(self) -> int:
        """Memory of the allocator that no tensor held, and that was still of no use."""
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True, slots=True)
class Simulation:
    """What the allocator did with one device's allocations.

    The arrays hold one number per event (an allocation or a free), up to the last allocation.
    """

    device: str
    positions: Ints
    """Where the event stands in the order of events: a ``start`` or an ``end``."""
    reserved_bytes: Ints
    """All segments, after the event."""
    allocated_bytes: Ints
    """All live blocks, after the event."""
    requested_bytes: Ints
    """What the live blocks were asked to hold, after the event."""
    reserved_peak_bytes: int
    reserved_peak_position: int
    """Of the first event at the peak; 0 if there are no events."""
    allocated_peak_bytes: int
    allocated_peak_position: int
    requested_peak_bytes: int
    requested_peak_position: int
    largest_free_block_bytes: int
    """The largest free block when most was reserved: what could be had without reserving more."""
    inactive_split_bytes: int
    """Free blocks in segments in use when most was reserved: lost to fragmentation.

    As in ``torch.cuda.memory_stats``, 0 with expandable segments.
    """
    out_of_memory: OutOfMemory | None
    """The request that failed; None if all fitted."""


def simulate_allocator(
    allocations: pl.DataFrame,
    *,
    device: str | None = None,
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
) -> Simulation:
    """Replay one device's allocations and frees through the caching allocator.

    Where a block is freed and another allocated at the same position, the free comes first.

    Args:
        allocations: A row per block: ``device``, ``start`` and ``end`` (positions in the order of
            events, ``start < end``; a block without a free ends after all events),
            ``requested_bytes`` or else ``size_bytes``, and optionally ``stream``.
        device: The device; without it the GPU that held most, or else the CPU.
        settings: The allocator's options; without, torch's defaults.
        capacity_bytes: What the device has for the allocator. Where that is too little, the replay
            ends with `Simulation.out_of_memory`. Without, there is no limit.

    Raises:
        ValueError: The device does not occur, or a block ends before it starts.
    """
    device = choose_device(allocations, device)
    frame = allocations.filter(pl.col("device").cast(pl.String) == device)
    sizes = frame["requested_bytes" if "requested_bytes" in frame.columns else "size_bytes"]
    frame = frame.select("start", "end", "^stream$", size=sizes).filter(pl.col("size") > 0)
    frame = frame.sort("start", maintain_order=True)
    if (frame["end"] <= frame["start"]).any():
        row = frame.row(int((frame["end"] <= frame["start"]).arg_true()[0]), named=True)
        raise ValueError(
            f"a block starts at event {row['start']} and ends at event {row['end']}; expected "
            "each block to end after it starts"
        )
    return _replay(frame, device, CachingAllocator(settings, capacity_bytes=capacity_bytes))


def _order_events(frame: pl.DataFrame) -> tuple[Ints, Ints]:
    """Return positions and rows of all events up to the last start; ``~row`` stands for a free."""
    start, end = frame["start"].to_numpy(), frame["end"].to_numpy()
    freed = np.flatnonzero(end <= start.max(initial=-1))
    rows = np.concatenate([~freed, np.arange(len(start))])
    positions = np.concatenate([end[freed], start])
    # Stable, so that frees (which come first here) precede allocations at the same position.
    order = np.argsort(positions, kind="stable")
    return positions[order], rows[order]


@dataclass(slots=True)
class _Record:
    """What is written down while events are replayed."""

    counts: list[tuple[int, int, int]]
    """Per event: reserved, allocated, requested bytes."""
    reserved_peak_bytes: int = 0
    largest_free_block_bytes: int = 0
    inactive_split_bytes: int = 0
    out_of_memory: OutOfMemory | None = None


def _replay(frame: pl.DataFrame, device: str, allocator: CachingAllocator) -> Simulation:
    positions, rows = _order_events(frame)
    record = _run(frame, positions, rows, allocator)
    positions = positions[: len(record.counts)]
    table = np.array(record.counts, np.int64).reshape(-1, 3)
    peaks = [_find_peak(positions, column) for column in table.T]
    return Simulation(
        device=device,
        positions=positions,
        reserved_bytes=table[:, 0],
        allocated_bytes=table[:, 1],
        requested_bytes=table[:, 2],
        reserved_peak_bytes=peaks[0][0],
        reserved_peak_position=peaks[0][1],
        allocated_peak_bytes=peaks[1][0],
        allocated_peak_position=peaks[1][1],
        requested_peak_bytes=peaks[2][0],
        requested_peak_position=peaks[2][1],
        largest_free_block_bytes=record.largest_free_block_bytes,
        inactive_split_bytes=record.inactive_split_bytes,
        out_of_memory=record.out_of_memory,
    )


def _run(frame: pl.DataFrame, positions: Ints, rows: Ints, allocator: CachingAllocator) -> _Record:
    sizes = frame["size"].to_list()
    streams = frame["stream"].to_list() if "stream" in frame.columns else [0] * len(sizes)
    addresses = [0] * len(sizes)
    record = _Record([])
    for event, row in enumerate(rows.tolist()):
        if row < 0:
            allocator.free(addresses[~row])
        else:
            address = allocator.malloc(sizes[row], stream=streams[row])
            if address is None:
                position = int(positions[event])
                record.out_of_memory = _describe_failure(allocator, position, sizes[row])
                break
            addresses[row] = address
        reserved = allocator.reserved_bytes
        record.counts.append((reserved, allocator.allocated_bytes, allocator.requested_bytes))
        if reserved > record.reserved_peak_bytes:
            record.reserved_peak_bytes = reserved
            record.largest_free_block_bytes = allocator.largest_free_block_bytes
            record.inactive_split_bytes = allocator.inactive_split_bytes
    return record


def _find_peak(positions: Ints, live: Ints) -> tuple[int, int]:
    if not len(live):
        return 0, 0
    at = int(np.argmax(live))
    return int(live[at]), int(positions[at])


def _describe_failure(
    allocator: CachingAllocator, position: int, requested_bytes: int
) -> OutOfMemory:
    free_bytes = allocator.free_bytes
    assert free_bytes is not None, "only a device with a capacity runs out of memory"
    return OutOfMemory(
        position=position,
        requested_bytes=requested_bytes,
        block_bytes=allocator.round_size(requested_bytes),
        allocated_bytes=allocator.allocated_bytes,
        reserved_bytes=allocator.reserved_bytes,
        free_bytes=free_bytes,
    )
