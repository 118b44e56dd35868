"""The timeline of one device as mapped columns: any window of it within milliseconds.

An event is an instant at which something was allocated or freed; what happens at one place in the
order of events counts together. Per event there are its time and the live bytes after it, and per
category the events that change it with the running sum. Which events a picture shows is decided on
the total alone, by minimum and maximum per bin; every category is then read at those same events,
so that a stack of them sums to the total, to the byte.
"""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

Longs = np.ndarray[tuple[int], np.dtype[np.int64]]
Numbers = np.ndarray[tuple[int], np.dtype[np.uint32]]

BLOCK = 1024
"""Events per stored pair of extremes."""
DEFAULT_BINS = 500
_MOST_HEAD_BYTES = 4096
"""More than the head of a column's file has."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened on a device, in order."""

    position: Longs
    """Place in the order of events; never falls."""
    time_ns: Longs
    """Never falls."""
    change_bytes: Longs
    category: Longs
    """Position in a list of names."""


@dataclass(frozen=True, slots=True)
class Window:
    """Samples of a timeline between two times."""

    event: Longs
    """Per sample the number of the event after which it holds; -1 before the first."""
    time_ns: Longs
    total_bytes: Longs
    by_category: dict[str, Longs]
    """They sum to `total_bytes` at every sample."""


class TimelineIndex:
    """The mapped columns of one device."""

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        """Map what `write_index` wrote."""
        self.categories = tuple(categories)
        self.time_ns: Longs = map_column(folder / "time_ns.npy")
        self.total_bytes: Longs = map_column(folder / "total_bytes.npy")
        self.position: Longs = map_column(folder / "position.npy")
        self._lowest: Numbers = map_column(folder / "lowest.npy")
        self._highest: Numbers = map_column(folder / "highest.npy")
        self._changes: list[Numbers] = []
        self._sums: list[Longs] = []
        for number in range(len(self.categories)):
            self._changes.append(map_column(folder / f"category-{number}-event.npy"))
            self._sums.append(map_column(folder / f"category-{number}-bytes.npy"))

    def __len__(self) -> int:
        return len(self.time_ns)

    @property
    def begin_ns(self) -> int:
        """The time of the first event; 0 if there is none."""
        return int(self.time_ns[0]) if len(self) else 0

    @property
    def end_ns(self) -> int:
        """The time of the last event; 0 if there is none."""
        return int(self.time_ns[-1]) if len(self) else 0

    def event_at(self, time_ns: int) -> int:
        """Return the last event at or before a time; -1 before the first."""
        return int(np.searchsorted(self.time_ns, np.int64(time_ns), "right")) - 1

    def peak(self, begin: int = 0, end: int | None = None) -> int:
        """Return the event of most live bytes among those from ``begin`` up to ``end``.

        Of equals the first; -1 if there are no events.
        """
        end = len(self) if end is None else end
        return _extreme(self.total_bytes, self._highest, begin, end, 1) if begin < end else -1

    def window(self, begin_ns: int, end_ns: int, bins: int = DEFAULT_BINS) -> Window:
        """Return samples between two times: the extremes of every bin, and both ends.

        Args:
            begin_ns: Where it begins; the first sample has what was live there.
            end_ns: Where it ends.
            bins: Equal stretches of time, of each of which minimum and maximum are kept.
        """
        edges = np.linspace(begin_ns, end_ns, bins + 1).astype(np.int64)
        edges[-1] = end_ns + 1
        # Searching with another dtype than the column's would convert all of the column.
        borders = np.searchsorted(self.time_ns, edges, "left").tolist()
        first, last = borders[0], borders[-1]
        events = np.arange(first, last) if last - first <= 2 * bins else self._pick(borders)
        events = np.concatenate([[first - 1], events, [last - 1]])
        times = self._times_of(events)
        times[0], times[-1] = begin_ns, end_ns
        return Window(events, times, self.totals_at(events), self.categories_at(events))

    def _pick(self, borders: Sequence[int]) -> Longs:
        picked: list[int] = []
        for begin, end in itertools.pairwise(borders):
            if begin < end:
                picked.append(_extreme(self.total_bytes, self._lowest, begin, end, -1))
                picked.append(_extreme(self.total_bytes, self._highest, begin, end, 1))
        return np.unique(np.array(picked, np.int64))

    def _times_of(self, events: Longs) -> Longs:
        return np.array(self.time_ns[np.maximum(events, 0)]) if len(self) else np.zeros_like(events)

    def totals_at(self, events: Longs) -> Longs:
        """Return the live bytes after events; 0 for the event -1."""
        if not len(self):
            return np.zeros(len(events), np.int64)
        return np.where(events < 0, 0, self.total_bytes[np.maximum(events, 0)])

    def categories_at(self, events: Longs) -> dict[str, Longs]:
        """Return the live bytes of every category after events; 0 for the event -1."""
        found = {}
        wanted = np.maximum(events, 0).astype(np.uint32)
        for name, changes, sums in zip(self.categories, self._changes, self._sums, strict=True):
            at = np.searchsorted(changes, wanted, "right") - 1
            held = sums[np.maximum(at, 0)] if len(sums) else np.zeros(len(at), np.int64)
            found[name] = np.where((at < 0) | (events < 0), 0, held)
        return found


def _extreme(total: Longs, stored: Numbers, begin: int, end: int, sign: int) -> int:
    """Return the first event of most (or with -1, least) bytes from ``begin`` up to ``end``."""
    pick = np.argmax if sign > 0 else np.argmin
    first, last = -(-begin // BLOCK), end // BLOCK
    if last - first < 2:
        return begin + int(pick(total[begin:end]))
    candidates = []
    if begin < first * BLOCK:
        candidates.append(begin + int(pick(total[begin : first * BLOCK])))
    inner = stored[first:last]
    candidates.append(int(inner[pick(total[inner])]))
    if last * BLOCK < end:
        candidates.append(last * BLOCK + int(pick(total[last * BLOCK : end])))
    return max(candidates, key=lambda event: sign * int(total[event]))


def write_index(folder: Path, changes: Changes, categories: Sequence[str]) -> None:
    """Write the columns of one device into a new directory.

    Args:
        folder: The directory; it must not exist.
        changes: Every allocation and free.
        categories: The names that ``changes.category`` points at.
    """
    folder.mkdir(parents=True)
    position = changes.position
    is_last = np.append(position[1:] != position[:-1], True)[: len(position)]
    event = np.cumsum(np.append(0, is_last[:-1])) if len(position) else np.zeros(0, np.int64)
    total = np.cumsum(changes.change_bytes)[is_last]
    _save(folder / "time_ns.npy", changes.time_ns[is_last])
    _save(folder / "position.npy", position[is_last])
    _save(folder / "total_bytes.npy", total)
    blocks = total[: len(total) // BLOCK * BLOCK].reshape(-1, BLOCK)
    begins = BLOCK * np.arange(len(blocks))
    _save(folder / "lowest.npy", (begins + blocks.argmin(axis=1)).astype(np.uint32))
    _save(folder / "highest.npy", (begins + blocks.argmax(axis=1)).astype(np.uint32))
    for number in range(len(categories)):
        own = np.flatnonzero(changes.category == number)
        of_event, sums = event[own], np.cumsum(changes.change_bytes[own])
        ends = np.append(of_event[1:] != of_event[:-1], True)[: len(own)]
        _save(folder / f"category-{number}-event.npy", of_event[ends].astype(np.uint32))
        _save(folder / f"category-{number}-bytes.npy", sums[ends])


def _save(file: Path, column: np.ndarray) -> None:
    np.save(file, column, allow_pickle=False)


def map_column(file: Path) -> np.ndarray:
    """Return a column that stays in its file until it is read.

    NumPy's own mapping would keep a file descriptor for each of a run's fifty columns, of which a
    process has 1024.

    Raises:
        ValueError: The file is damaged.
    """
    with pa.memory_map(str(file)) as source:
        buffer = source.read_buffer()
    head = io.BytesIO(buffer[:_MOST_HEAD_BYTES])
    np.lib.format.read_magic(head)
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    return np.frombuffer(buffer, dtype, count=shape[0], offset=head.tell())
