"""Follow the history of CUDA's caching allocator: the total of a GPU, workspace of ops included."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnprof.analysis.allocator.engine import CachingAllocator
from attnprof.analysis.allocator.free_memory import FreeMemory
from attnprof.analysis.allocator.history import (
    ALLOC,
    FREE_COMPLETED,
    FREE_REQUESTED,
    GOES_ON,
    KINDS,
    OTHER,
    SEGMENT_GIVEN,
    SEGMENT_TAKEN,
)
from attnprof.analysis.allocator.settings import SMALL_BYTES, AllocatorSettings
from attnprof.analysis.device_history import read_settings
from attnprof.store.schema import RUN_FILE, SEED, SEGMENT_SEED

Total = tuple[int, int]
"""Time on the allocator's clock, 0 if nothing told one yet; and the bytes allocated from then."""
_SEEDS = (SEED, SEGMENT_SEED)


@dataclass(frozen=True, slots=True)
class Event:
    """A row of `allocator_events`."""

    action: str
    address: int
    size_bytes: int
    time_ns: int


class LiveAllocator:
    """One device's allocator, as far as its history was written."""

    def __init__(self, settings: AllocatorSettings, *, sizes_are_exact: bool = False) -> None:
        """Begin without a block.

        Args:
            settings: The allocator's options.
            sizes_are_exact: Whether events have the sizes of blocks instead of requests.
        """
        self._rules = CachingAllocator(settings)
        self._sizes_are_exact = sizes_are_exact
        is_measured = not (sizes_are_exact or settings.expandable_segments)
        self._free = FreeMemory(settings) if is_measured else None
        self._live: dict[int, int] = {}
        """Sizes of blocks by address."""
        self._waiting: dict[int, int] = {}
        """Of blocks that the program let go of, and that other streams still use."""
        self._total = 0
        self._time_ns = 0
        self._is_two_fold = False
        """Frees are told twice: as requested, and as completed."""

    @classmethod
    def of(cls, path: Path) -> "LiveAllocator":
        """Return the allocator of the run in a directory, with its settings if they are known."""
        try:
            info = json.loads((path / RUN_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            info = {}
        snapshot = info.get("snapshot") or {}
        about = snapshot.get("allocator_settings") or info.get("allocator", {}).get("settings", {})
        settings = read_settings(about)
        return cls(settings, sizes_are_exact=snapshot.get("sizes_are_exact", False))

    def take(self, events: Sequence[Event]) -> list[Total]:
        """Return the allocated bytes as the next events change them."""
        kinds = [KINDS.get(event.action, OTHER) for event in events]
        self._is_two_fold = self._is_two_fold or FREE_COMPLETED in kinds
        times = self._find_times(events)
        found: list[Total] = []
        seeds: list[Event] = []
        for event, kind, at, following in zip(
            events, kinds, times, [*events[1:], None], strict=True
        ):
            if kind == GOES_ON or event.action in _SEEDS:
                seeds.append(event)
                if following is None or following.action not in _SEEDS:
                    self._begin_anew(seeds)
                    found.append((at, self._total))
                    seeds = []
            elif self._follow(event, kind):
                found.append((at, self._total))
        return found

    def _find_times(self, events: Sequence[Event]) -> list[int]:
        """Return when events happened; of seeds, which have no time, when the next did."""
        times = [event.time_ns for event in events]
        self._time_ns = max([self._time_ns, *times])
        following = self._time_ns
        for number in range(len(times) - 1, -1, -1):
            following = times[number] = times[number] or following
        return times

    def _begin_anew(self, seeds: Sequence[Event]) -> None:
        """Take note of all that is there where the history begins, or goes on."""
        segments = [
            (e.address, e.address + e.size_bytes) for e in seeds if e.action == SEGMENT_SEED
        ]
        blocks = sorted((e.address, self._round(e.size_bytes)) for e in seeds if e.action == SEED)
        self._live, self._waiting = dict(blocks), {}
        if self._free is not None:
            large = [block for block in blocks if block[1] > SMALL_BYTES]
            sizes = self._free.begin_anew(segments, large)
            self._live |= dict(zip((address for address, _ in large), sizes, strict=True))
        self._total = sum(self._live.values())

    def _follow(self, event: Event, kind: int) -> bool:
        """Follow one event; return whether it changed the total."""
        address = event.address
        if kind == ALLOC:
            self._let_go(address)  # taken again without having been: that was not seen
            self._complete(address)
            size = self._round(event.size_bytes)
            if self._free is not None and size > SMALL_BYTES:
                size = self._free.take(address, size)
            self._live[address] = size
            self._total += size
        elif kind in (FREE_REQUESTED, FREE_COMPLETED):
            self._let_go(address)
            if kind == FREE_COMPLETED or not self._is_two_fold:
                self._complete(address)
        elif self._free is not None and kind == SEGMENT_TAKEN:
            self._free.open(address, address + event.size_bytes)
        elif self._free is not None and kind == SEGMENT_GIVEN:
            self._free.close(address)
        return kind in (ALLOC, FREE_REQUESTED, FREE_COMPLETED)

    def _let_go(self, address: int) -> None:
        size = self._live.pop(address, None)
        if size is not None:
            self._waiting[address] = size
            self._total -= size

    def _complete(self, address: int) -> None:
        size = self._waiting.pop(address, 0)
        if self._free is not None and size > SMALL_BYTES:
            self._free.give(address, address + size)

    def _round(self, size_bytes: int) -> int:
        return size_bytes if self._sizes_are_exact else self._rules.round_size(size_bytes)


def read_events(batch: dict[str, list[Any]], device: int) -> list[Event]:
    """Return the rows of one device in a batch of `allocator_events`."""
    columns = (batch[name] for name in ("device", "action", "address", "size_bytes", "time_ns"))
    return [
        Event(action, address, size, time_ns)
        for number, action, address, size, time_ns in zip(*columns, strict=True)
        if number == device
    ]
