"""What CUDA's caching allocator held during a run: segments and levels, from its own history."""

from bisect import bisect_left
from typing import Any

import numpy as np
import polars as pl

from attnprof.analysis.allocator.history import OOM, list_seedings
from attnprof.analysis.allocator.segments import Span
from attnprof.analysis.allocator.settings import SMALL_SEGMENT_BYTES
from attnprof.analysis.device_history import AllocatorAttribution, DeviceHistory
from attnprof.analysis.memory_state import FailedRequest, describe_state, find_seeds, map_memory
from attnprof.report.allocator_summary import explain_failure
from attnprof.run import Run

AWAITING = "awaiting other streams"
"""In place of a category: the program let go of the block, and another stream still uses it."""
_MOST_POINTS = 2000


def find_history(run: Run, device: str) -> DeviceHistory | None:
    """Return the history of a device that tells of its segments; None if there is none."""
    attribution = run.attribution
    if not isinstance(attribution, AllocatorAttribution):
        return None
    found = next((h for h in attribution.histories if h.device == device), None)
    return found if found is not None and found.reserved_bytes().any() else None


def describe_history(history: DeviceHistory, frame: pl.DataFrame) -> dict[str, Any]:
    """Return what the allocator held, in the form of `segment_map.describe_allocator`.

    The segments are those of the instant at which the last request failed, or else of the first one
    at which most was reserved.

    Args:
        history: A device's.
        frame: Its blocks, as `Attribution.allocations` has them.
    """
    levels = _find_levels(history)
    reserved = levels["reserved_bytes"]
    failed = np.flatnonzero(history.events.kind == OOM)
    _, at = find_seeds(history, int(failed[-1]) if len(failed) else int(np.argmax(reserved)))
    picked = _pick(levels["reserved_bytes"], levels["allocated_bytes"])
    segments = _map_segments(history, frame, at)
    is_native = not history.settings.expandable_segments
    return {
        "position": history.position[picked].tolist(),
        **{name: level[picked].tolist() for name, level in levels.items()},
        "reserved_peak_bytes": int(reserved.max()),
        "allocated_peak_bytes": int(levels["allocated_bytes"].max()),
        "segments_position": int(history.position[at]),
        "largest_free_block_bytes": describe_state(history, at).largest_free_block_bytes,
        "inactive_split_bytes": _count_split(segments) if is_native else 0,
        "segments": segments,
    }


def _count_split(segments: list[dict[str, Any]]) -> int:
    """Return what is free in segments that are in use, as ``torch.cuda.memory_stats`` has it."""
    return sum(s["free_bytes"] for s in segments if s["free_bytes"] < s["size_bytes"])


def describe_failure(failure: FailedRequest | None, device: str) -> dict[str, Any] | None:
    """Return the request that a device had no room for, in numbers and in sentences."""
    if failure is None or failure.device != device:
        return None
    return {
        "requested_bytes": failure.requested_bytes,
        "device_free_bytes": failure.device_free_bytes,
        "free_bytes": failure.state.free_bytes,
        "largest_free_block_bytes": failure.state.largest_free_block_bytes,
        "sentences": explain_failure(failure),
        "holders": [list(row) for row in failure.held.by_layer().iter_rows()],
        "total_bytes": failure.held.total_bytes,
    }


def _find_levels(history: DeviceHistory) -> dict[str, np.ndarray]:
    """Return what was reserved, in blocks and asked for after each event."""
    lives = history.lives
    ended = lives.end >= 0
    levels = {"reserved_bytes": history.reserved_bytes()}
    for name, size in (
        ("allocated_bytes", lives.size_bytes),
        ("requested_bytes", lives.requested_bytes),
    ):
        change = np.zeros(len(history.events.kind), np.int64)
        np.add.at(change, lives.begin, size)
        np.subtract.at(change, lives.end[ended], size[ended])
        levels[name] = np.cumsum(change)
        for first, after in list_seedings(history.events):
            levels[name][first:after] = levels[name][after - 1]  # what is there is told anew
    return levels


def _pick(reserved: np.ndarray, allocated: np.ndarray) -> np.ndarray:
    """Return events to show: of equal stretches the highest of either, and both ends."""
    edges = np.unique(np.linspace(0, len(reserved), _MOST_POINTS // 2 + 1).astype(np.int64))
    highest = [
        edges[:-1] + [int(np.argmax(part)) for part in np.split(level, edges[1:-1])]
        for level in (reserved, allocated)
    ]
    return np.unique(np.concatenate([*highest, [0, len(reserved) - 1]]))


def _map_segments(history: DeviceHistory, frame: pl.DataFrame, at: int) -> list[dict[str, Any]]:
    spans, held = map_memory(history, at)
    position = int(history.position[at])
    live = frame.filter((pl.col("start") <= position) & (pl.col("end") > position))
    category_of = dict(live.select("address", pl.col("category").cast(pl.String)).iter_rows())
    begins = history.events.address[history.lives.begin[held]].tolist()
    sizes = history.lives.size_bytes[held].tolist()
    names = [category_of.get(address, AWAITING) for address in begins]
    blocks = list(zip(begins, sizes, names, strict=True))
    is_native = not history.settings.expandable_segments
    found = [
        _describe_segment(
            span, blocks[bisect_left(begins, span[0]) : bisect_left(begins, span[1])],
            is_native=is_native, pool=pool,
        )
        for pool, own in spans.items()
        for span in own
    ]  # fmt: skip
    return sorted(found, key=lambda segment: -segment["size_bytes"])


def _describe_segment(
    span: Span, blocks: list[tuple[int, int, str]], *, is_native: bool, pool: int
) -> dict[str, Any]:
    """Return a segment with what is in it, in the order of addresses; what is free has no name."""
    parts: list[tuple[int, str]] = []
    gaps: list[int] = []
    at = span[0]
    for begin, size, name in [*blocks, (span[1], 0, "")]:
        if begin > at:
            parts.append((begin - at, ""))
            gaps.append(begin - at)
        if size and parts and parts[-1][1] == name:
            parts[-1] = parts[-1][0] + size, name
        elif size:
            parts.append((size, name))
        at = begin + size
    size_bytes = span[1] - span[0]
    return {
        "size_bytes": size_bytes,
        "free_bytes": sum(gaps),
        "largest_free_bytes": max(gaps, default=0),
        "is_small": is_native and size_bytes == SMALL_SEGMENT_BYTES,
        "private_pool": pool,
        "blocks": parts,
    }
