"""Follow a run that is still being written: read what was added, and nothing twice.

The journal says how much of each table is whole; only that is read, from the files, without any
lock. The program that writes does not notice. Categories need the whole run; until then bytes are
told apart by what the program itself says of them (parameters, gradients, optimizer state).
"""

import json
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from attnprof.attribution.blocks import CUDA_BLOCK_BYTES
from attnprof.store.schema import FREED, JOURNAL_FILE, OPTIMIZER_END, STEP, TABLES, TABLES_DIR
from attnprof.vocabulary import Role

WINDOW_SECONDS = 120.0
_BIN_NS = 100_000_000
"""What is kept of the past: the extremes of every tenth of a second."""
_MOST_BINS = int(WINDOW_SECONDS * 1e9) // _BIN_NS
_MOST_FOLLOWED = 4
_OTHER = "activations and all else"
_COUNTED = "only counted"
"""What the allocator counted at the end of a step that was not recorded, beyond what is known."""
_NAMES = {
    Role.PARAMETER.value: "parameters",
    Role.BUFFER.value: "buffers",
    Role.GRADIENT.value: "gradients",
    Role.OPTIMIZER_STATE.value: "optimizer_state",
    Role.INPUT.value: "inputs",
}


@dataclass(frozen=True, slots=True)
class Instant:
    """Live bytes at a time."""

    time_ns: int
    total_bytes: int
    by_role: tuple[tuple[str, int], ...]
    """They sum to the total."""


@dataclass(slots=True)
class Device:
    """One device's live bytes, as far as the run was written."""

    total_bytes: int = 0
    by_role: dict[str, int] = field(default_factory=dict)
    peak: Instant | None = None
    """The highest instant since the run began: exact, whatever the window shows."""
    bins: OrderedDict[int, tuple[Instant, Instant]] = field(default_factory=OrderedDict)
    """Per tenth of a second its lowest and highest instant."""

    def change(self, time_ns: int, role: str, size_bytes: int) -> None:
        """Take note that bytes came or, if negative, went."""
        self.total_bytes += size_bytes
        self.by_role[role] = self.by_role.get(role, 0) + size_bytes
        lowest, highest = self.bins.get(time_ns // _BIN_NS, (None, None))
        is_low = lowest is None or self.total_bytes < lowest.total_bytes
        is_high = highest is None or self.total_bytes > highest.total_bytes
        if not (is_low or is_high):
            return
        now = Instant(time_ns, self.total_bytes, tuple(sorted(self.by_role.items())))
        self.bins[time_ns // _BIN_NS] = (
            now if is_low or lowest is None else lowest,
            now if is_high or highest is None else highest,
        )
        if self.peak is None or self.total_bytes > self.peak.total_bytes:
            self.peak = now
        while len(self.bins) > _MOST_BINS:
            self.bins.popitem(last=False)

    def count(self, time_ns: int, total_bytes: int, peak_bytes: int) -> None:
        """Take note of what the allocator counted by the end of a step that was not recorded.

        Args:
            time_ns: When the step ended.
            total_bytes: What was live then.
            peak_bytes: The most that was live in it; -1 if that is not known.
        """
        if peak_bytes > (self.peak.total_bytes if self.peak else 0):
            self.peak = Instant(time_ns, peak_bytes, ((_COUNTED, peak_bytes),))
        self.change(time_ns, _COUNTED, total_bytes - self.total_bytes)

    def instants(self, since_ns: int) -> list[Instant]:
        """Return the extremes of the window, in order of time."""
        pairs = [pair for at, pair in self.bins.items() if (at + 1) * _BIN_NS > since_ns]
        found = {instant.time_ns: instant for pair in pairs for instant in pair}
        return [found[time_ns] for time_ns in sorted(found)]


class LiveRun:
    """One run that is followed; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Follow the run in a directory; nothing is read before `update`."""
        self._path = path
        self._lock = threading.Lock()
        self._journal = 0
        """How much of the journal was read."""
        self._read: dict[str, int] = {}
        """Per table, how much of its file was read."""
        self._live: dict[int, tuple[int, str, str]] = {}
        """Per live storage its bytes, device and role."""
        self._roles: dict[int, str] = {}
        self._names: list[str] = []
        self.devices: dict[str, Device] = {}
        self.is_behind = False
        """There is more to read than there was time for."""
        self._ends: Counter[int] = Counter()
        self._counted: set[int] = set()
        """The steps that were only counted."""
        self.events = 0
        self.begin_ns: int | None = None
        self.last_ns = 0
        self.samples: dict[str, dict[str, int]] = {}
        """Per device the newest sample: bytes of the process, used, and in total."""

    @property
    def steps(self) -> int:
        """How many steps ended: as the program says, else as its optimizer shows."""
        return (self._ends[STEP] or self._ends[OPTIMIZER_END]) + len(self._counted)

    def update(self, budget_seconds: float = 0.5) -> None:
        """Read what was written since the last time.

        Args:
            budget_seconds: After so long the rest is left for the next time; see `is_behind`.

        Raises:
            OSError: The run is gone.
            ValueError: A file is damaged.
        """
        with self._lock:
            end = time.monotonic() + budget_seconds
            self.is_behind = False
            for good in self._read_journal():
                if time.monotonic() > end:
                    self.is_behind = True
                    break
                self._take_commit(good)

    def _read_journal(self) -> Iterator[dict[str, int]]:
        """Yield what each new whole line says is good."""
        with (self._path / JOURNAL_FILE).open("rb") as file:
            file.seek(self._journal)
            text = file.read()
        lines = text.split(b"\n")[:-1]
        for line in lines:
            yield json.loads(line)["bytes"]
            self._journal += len(line) + 1  # only once its commit was taken

    def _take_commit(self, good: dict[str, int]) -> None:
        for batch in self._batches("devices", good):
            self._names += batch["name"]
        for batch in self._batches("identities", good):
            for storage, role in zip(batch["storage"], batch["role"], strict=True):
                self._identify(storage, _NAMES.get(role, _OTHER))
        for batch in self._batches("storage_events", good):
            self._take_events(batch)
        for batch in self._batches("marks", good):
            self._ends.update(batch["kind"])
        for batch in self._batches("counted_steps", good):
            self._counted.update(batch["step"])
            for number, *counted in zip(*(batch[name] for name in _COUNTERS), strict=True):
                self.devices.setdefault(self._names[number], Device()).count(*counted)
                self.last_ns = max(self.last_ns, counted[0])
        for batch in self._batches("samples", good):
            for device, *sizes in zip(*(batch[name] for name in _SAMPLE), strict=True):
                self.samples[device] = dict(zip(_SAMPLE[1:], sizes, strict=True))

    def _batches(self, name: str, good: dict[str, int]) -> Iterator[dict[str, list[Any]]]:
        """Yield the columns of the batches of a table that were added."""
        begin, end = self._read.get(name, 0), good.get(name, 0)
        if end <= begin:
            return
        file = self._path / TABLES_DIR / f"{name}.arrows"
        with pa.memory_map(str(file)) as source:
            source.seek(begin)
            added = source.read_buffer(end - begin)
            if len(added) < end - begin:
                raise ValueError(f"{file} is shorter than its journal says")
            reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(added))
            count = 0
            while True:
                try:
                    message = reader.read_next_message()
                except StopIteration:
                    break
                count += 1
                if message.type == "record batch":
                    yield pa.ipc.read_record_batch(message, TABLES[name]).to_pydict()
            if not count:
                raise ValueError(f"{file} is damaged from byte {begin} on")
        self._read[name] = end

    def _identify(self, storage: int, role: str) -> None:
        self._roles[storage] = role
        known = self._live.get(storage)
        if known is None or known[2] == role:
            return
        size, name, before = known
        device = self.devices[name]
        device.by_role[before] -= size
        device.by_role[role] = device.by_role.get(role, 0) + size
        self._live[storage] = size, name, role

    def _take_events(self, batch: dict[str, list[Any]]) -> None:
        columns = (batch[name] for name in ("storage", "kind", "size_bytes", "device", "time_ns"))
        for storage, kind, size, number, time_ns in zip(*columns, strict=True):
            self.events += 1
            self.begin_ns = time_ns if self.begin_ns is None else self.begin_ns
            self.last_ns = max(self.last_ns, time_ns)
            known = self._live.pop(storage, None)
            if known is not None:  # it is freed, or has another size from now on
                self.devices[known[1]].change(time_ns, known[2], -known[0])
            if kind == FREED:
                self._roles.pop(storage, None)
                continue
            name = self._names[number] if 0 <= number < len(self._names) else "cpu"
            role = self._roles.get(storage, _OTHER)
            taken = -(-size // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES if "cuda" in name else size
            self._live[storage] = taken, name, role
            self.devices.setdefault(name, Device()).change(time_ns, role, taken)


_SAMPLE = ("device", "process_bytes", "used_bytes", "total_bytes")
_COUNTERS = ("device", "end_ns", "allocated_bytes", "peak_bytes")


class LiveStore:
    """The runs that are followed; the one that nobody asked for longest is let go."""

    def __init__(self) -> None:
        """Follow none."""
        self._lock = threading.Lock()
        self._runs: OrderedDict[Path, LiveRun] = OrderedDict()

    def follow(self, path: Path) -> LiveRun:
        """Return the run in a directory, read as far as it was written.

        Raises:
            OSError: The run is gone.
            ValueError: A file is damaged.
        """
        with self._lock:
            run = self._runs.setdefault(path, LiveRun(path))
            self._runs.move_to_end(path)
            while len(self._runs) > _MOST_FOLLOWED:
                self._runs.popitem(last=False)
        run.update()
        return run
