"""Follow a run that is still being written: read what was added, and nothing twice.

The journal says how much of each table is whole; only that is read, from the files, without any
lock. The program that writes does not notice. Categories need the whole run; until then bytes are
told apart by what the program itself says of them (parameters, gradients, optimizer state). How
many bytes there are is told by the allocator's history where there is one, else by the storages
that were seen.
"""

import json
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from attnprof.attribution.blocks import CUDA_BLOCK_BYTES
from attnprof.store.schema import FREED, JOURNAL_FILE, OPTIMIZER_END, STEP, TABLES, TABLES_DIR
from attnprof.vocabulary import Role
from attnprof_dashboard.data.live_allocator import LiveAllocator, Total, read_events
from attnprof_dashboard.data.live_device import OTHER, Device

_MOST_FOLLOWED = 4
_GRADIENTS = "gradients"
_NAMES = {
    Role.PARAMETER.value: "parameters",
    Role.BUFFER.value: "buffers",
    Role.GRADIENT.value: _GRADIENTS,
    Role.OPTIMIZER_STATE.value: "optimizer_state",
    Role.INPUT.value: "inputs",
}


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
        self._allocators: dict[str, LiveAllocator] = {}
        """Per device whose allocator tells its history."""
        self._clocks: dict[str, int] = {}
        """Per such device, what its allocator's clock is behind ours."""
        self._said: list[tuple[int, str, str, int]] = []
        """Of the commit that is read: time, device, role and bytes of its storages."""
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
        for batch in self._columns("devices", good):
            self._names += batch["name"]
        totals = self._take_allocators(good)
        for batch in self._columns("identities", good):
            for storage, role in zip(batch["storage"], batch["role"], strict=True):
                self._identify(storage, _NAMES.get(role, OTHER))
        for storage in self._find_gradients(good):
            self._identify(storage, _GRADIENTS)
        for batch in self._columns("storage_events", good):
            self._take_events(batch)
        self._merge(totals)
        for batch in self._columns("marks", good):
            self._ends.update(batch["kind"])
        for batch in self._columns("counted_steps", good):
            self._counted.update(batch["step"])
            for number, *counted in zip(*(batch[name] for name in _COUNTERS), strict=True):
                self.devices.setdefault(self._names[number], Device()).count(*counted)
                self.last_ns = max(self.last_ns, counted[0])
        for batch in self._columns("samples", good):
            for device, *sizes in zip(*(batch[name] for name in _SAMPLE), strict=True):
                self.samples[device] = dict(zip(_SAMPLE[1:], sizes, strict=True))

    def _take_allocators(self, good: dict[str, int]) -> dict[str, list[Total]]:
        """Return what the allocators' histories say of each device, on their own clocks."""
        totals: dict[str, list[Total]] = {}
        for batch in self._columns("allocator_events", good):
            for number in sorted(set(batch["device"])):
                name = self._names[number]
                if name not in self._allocators:
                    self._allocators[name] = LiveAllocator.of(self._path)
                events = read_events(batch, number)
                totals.setdefault(name, []).extend(self._allocators[name].take(events))
                self.events += len(events)
        return totals

    def _find_gradients(self, good: dict[str, int]) -> list[int]:
        """Return the storages that autograd stored as the gradients of parameters."""
        ops = pa.Table.from_batches(list(self._batches("ops", good)), TABLES["ops"])
        operands = pa.Table.from_batches(list(self._batches("operands", good)), TABLES["operands"])
        node, n_in, n_out = (ops[name].to_numpy() for name in ("node", "n_in", "n_out"))
        counts = n_in.astype(np.int64) + n_out
        first = np.cumsum(counts) - counts + n_in  # rows of a commit belong to its own ops
        rows = [
            row
            for op in np.flatnonzero(node <= -2).tolist()
            for row in range(first[op], first[op] + n_out[op])
        ]
        found: list[int] = operands["storage"].to_numpy()[rows].tolist()
        return found

    def _merge(self, totals: dict[str, list[Total]]) -> None:
        """Bring what allocators and what the program say of a device into one order."""
        said, self._said = self._said, []
        for name, own in totals.items():
            roles = [(at, role, size) for at, device, role, size in said if device == name]
            times = [at for at, _ in own if at]
            if name not in self._clocks and times:
                self._clocks[name] = max((at for at, _, _ in roles), default=times[-1]) - times[-1]
            clock = self._clocks.get(name, 0)
            # Seeds alone have no time: nothing else happened.
            placed = [(at + clock if at else self.last_ns, "", total) for at, total in own]
            device = self.devices.setdefault(name, Device())
            for at, role, size in sorted([*roles, *placed], key=lambda change: change[0]):
                if role:
                    device.name(role, size)
                    continue
                device.hold(at, size)
                self._see(at)
        for _, name, role, size in said:
            if name not in totals:
                self.devices.setdefault(name, Device()).name(role, size)

    def _see(self, time_ns: int) -> None:
        self.begin_ns = time_ns if self.begin_ns is None else min(self.begin_ns, time_ns)
        self.last_ns = max(self.last_ns, time_ns)

    def _columns(self, name: str, good: dict[str, int]) -> Iterator[dict[str, list[Any]]]:
        """Yield the columns of the batches of a table that were added."""
        for batch in self._batches(name, good):
            yield batch.to_pydict()

    def _batches(self, name: str, good: dict[str, int]) -> Iterator[pa.RecordBatch]:
        """Yield the batches of a table that were added."""
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
                    yield pa.ipc.read_record_batch(message, TABLES[name])
            if not count:
                raise ValueError(f"{file} is damaged from byte {begin} on")
        self._read[name] = end

    def _identify(self, storage: int, role: str) -> None:
        self._roles[storage] = role
        known = self._live.get(storage)
        if known is None or known[2] == role:
            return
        size, name, before = known
        self.devices[name].name(before, -size)
        self.devices[name].name(role, size)
        self._live[storage] = size, name, role

    def _take_events(self, batch: dict[str, list[Any]]) -> None:
        columns = (batch[name] for name in ("storage", "kind", "size_bytes", "device", "time_ns"))
        for storage, kind, size, number, time_ns in zip(*columns, strict=True):
            self.events += 1
            self._see(time_ns)
            known = self._live.pop(storage, None)
            if known is not None:  # it is freed, or has another size from now on
                self._change(time_ns, known[1], known[2], -known[0])
            if kind == FREED:
                self._roles.pop(storage, None)
                continue
            name = self._names[number] if 0 <= number < len(self._names) else "cpu"
            role = self._roles.get(storage, OTHER)
            taken = -(-size // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES if "cuda" in name else size
            self._live[storage] = taken, name, role
            self._change(time_ns, name, role, taken)

    def _change(self, time_ns: int, name: str, role: str, size_bytes: int) -> None:
        """Take note of a storage; of the total, only where no allocator speaks of it."""
        if name in self._allocators:
            self._said.append((time_ns, name, role, size_bytes))
            return
        device = self.devices.setdefault(name, Device())
        device.name(role, size_bytes)
        device.change(time_ns, size_bytes)


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
