"""What CUDA's caching allocator holds for a run: segments, and what is in them.

From the allocator's own history where the run has one. Else replayed by
`attnprof.analysis.allocator`, from the sizes and the order of the run's blocks; the page says so.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from attnprof.analysis.allocator import simulate_allocator
from attnprof.analysis.allocator.blocks import Block
from attnprof.analysis.allocator.engine import CachingAllocator
from attnprof.analysis.allocator.pools import SHARED
from attnprof.analysis.allocator.settings import AllocatorSettings
from attnprof.run import Run
from attnprof_dashboard.data.recorded_map import (
    describe_failure,
    describe_history,
    find_history,
)

MOST_EVENTS = 1_500_000
"""All replays together take about ten seconds for so many: longer runs have none."""
_POINTS = 1000
_CAPACITIES = (0.95, 0.9, 0.8, 0.7, 0.5)
"""Shares of what is reserved at most, with which the run is replayed."""


class MappedAllocator(CachingAllocator):
    """The simulated allocator, with a view of its segments."""

    def segments(self) -> Iterator[list[Block]]:
        """Yield the blocks of each segment in the order of addresses, live and free ones."""
        free = (block for pool in self._pools.values() for block in pool.blocks)
        for block in (*self._live.values(), *free):
            if block.previous is None:
                chain = [block]
                while chain[-1].next is not None:
                    chain.append(chain[-1].next)
                yield chain


def describe_allocator(run: Run, device: str, frame: pl.DataFrame) -> dict[str, Any] | None:
    """Return what the allocator did, or would do, with the blocks of one device.

    Args:
        run: The run.
        device: The device.
        frame: Its blocks, as `Attribution.allocations` has them.

    Returns:
        Values that JSON knows: whether it ``is_recorded``; ``reserved_bytes``, ``allocated_bytes``
        and ``requested_bytes`` by ``position`` (thinned out, the peak of what is reserved kept);
        the ``segments`` at ``segments_position``; the request that failed, as ``failure``; and what
        replays with less memory ``died_of``. None if there is no history, and the run is too long
        for a replay.
    """
    needing = frame.filter(pl.col("requested_bytes") > 0)
    is_short = 0 < 2 * len(needing) <= MOST_EVENTS
    history = find_history(run, device)
    if history is None and not is_short:
        return None
    settings = AllocatorSettings() if history is None else history.settings
    found = _simulate(needing) if history is None else describe_history(history, frame)
    reserved = found["reserved_peak_bytes"]
    return {
        **found,
        "is_recorded": history is not None,
        "failure": describe_failure(run.out_of_memory(), device),
        "died_of": _replay_with_less(needing, reserved, settings) if is_short else [],
    }


def _simulate(needing: pl.DataFrame) -> dict[str, Any]:
    """Return what CUDA's allocator would do with its default settings."""
    whole = simulate_allocator(needing)
    picked = _pick(whole.reserved_bytes - whole.requested_bytes, whole.reserved_bytes)
    names = ("reserved_bytes", "allocated_bytes", "requested_bytes")
    return {
        "position": whole.positions[picked].tolist(),
        **{name: getattr(whole, name)[picked].tolist() for name in names},
        "reserved_peak_bytes": whole.reserved_peak_bytes,
        "allocated_peak_bytes": whole.allocated_peak_bytes,
        "segments_position": whole.reserved_peak_position,
        "largest_free_block_bytes": whole.largest_free_block_bytes,
        "inactive_split_bytes": whole.inactive_split_bytes,
        "segments": _map_segments(needing, whole.reserved_peak_position),
    }


def _pick(gap: np.ndarray, reserved: np.ndarray) -> np.ndarray:
    """Return events to show: of equal stretches where most was lost, and the peak."""
    edges = np.unique(np.linspace(0, len(gap), _POINTS + 1).astype(np.int64))
    worst = [int(a + np.argmax(gap[a:b])) for a, b in pairwise(edges)]
    return np.unique(np.array([0, *worst, int(np.argmax(reserved)), len(gap) - 1]))


def _map_segments(frame: pl.DataFrame, until: int) -> list[dict[str, Any]]:
    """Return the segments after the event at a position, the largest first."""
    allocator = MappedAllocator()
    owners: dict[int, str] = {}
    addresses: dict[int, int] = {}
    categories = frame["category"].cast(pl.String).to_list()
    sizes = frame["requested_bytes"].to_list()
    for row in _order_events(frame, until):
        if row < 0:
            owners.pop(addresses[~row])
            allocator.free(addresses.pop(~row))
            continue
        address = allocator.malloc(sizes[row])
        assert address is not None, "there is no limit"
        owners[address], addresses[row] = categories[row], address
    found = [_describe_segment(chain, owners) for chain in allocator.segments()]
    return sorted(found, key=lambda segment: -segment["size_bytes"])


def _order_events(frame: pl.DataFrame, until: int) -> list[int]:
    """Return the rows of all events up to a position; ``~row`` stands for a free."""
    start, end = frame["start"].to_numpy(), frame["end"].to_numpy()
    rows = np.arange(len(start))
    position = np.concatenate([end, start])
    both = np.concatenate([~rows, rows])
    # Stable, so that frees (which come first here) precede allocations at the same position.
    order = np.argsort(position, kind="stable")
    kept: list[int] = both[order][position[order] <= until].tolist()
    return kept


def _describe_segment(chain: Sequence[Block], owners: dict[int, str]) -> dict[str, Any]:
    blocks: list[tuple[int, str]] = []
    for block in chain:
        name = owners[block.address] if block.is_live else ""
        if blocks and blocks[-1][1] == name:
            blocks[-1] = blocks[-1][0] + block.size_bytes, name
        else:
            blocks.append((block.size_bytes, name))
    free = [block.size_bytes for block in chain if not block.is_live]
    return {
        "size_bytes": sum(block.size_bytes for block in chain),
        "free_bytes": sum(free),
        "largest_free_bytes": max(free, default=0),
        "is_small": chain[0].pool.is_small,
        "private_pool": SHARED,  # what a replay knows
        "blocks": blocks,
    }


def _replay_with_less(
    frame: pl.DataFrame, reserved_bytes: int, settings: AllocatorSettings
) -> list[dict[str, Any]]:
    """Return what the run dies of with less memory than it reserves."""
    found: list[dict[str, Any]] = []
    for share in _CAPACITIES:
        capacity = int(share * reserved_bytes)
        simulated = simulate_allocator(frame, settings=settings, capacity_bytes=capacity)
        failed = simulated.out_of_memory
        if failed is None:
            found.append({"capacity_bytes": capacity, "position": None})
            continue
        row = frame.filter(pl.col("start") == failed.position).row(0, named=True)
        found.append(
            {
                "capacity_bytes": capacity,
                "position": failed.position,
                "requested_bytes": failed.requested_bytes,
                "allocated_bytes": failed.allocated_bytes,
                "cached_bytes": failed.cached_bytes,
                "free_bytes": failed.free_bytes,
                "layer": row["layer"] or "",
                "op": row["op"] or "",
                "category": row["category"],
                "phase": row["phase"],
            }
        )
    return found
