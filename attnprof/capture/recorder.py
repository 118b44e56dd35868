"""The facts recorded since the last commit, and their way into the run directory."""

import struct
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from attnprof.store.schema import (
    ALLOCATOR_EVENTS,
    BLOCK_TABLES,
    COUNTED_STEPS,
    FREED,
    IDENTITIES,
    MARKS,
    MODULES,
    PRIVATE_SEGMENTS,
    SAMPLES,
    SCOPES,
)
from attnprof.store.writer import RunWriter

# Facts wait for a commit as bytes: the garbage collector, which would run every few hundred ops
# and now and then walk the whole program, does not look at those; and they join into an array.
OP_HEAD = 3
"""An op's first numbers: code, scope, thread. Storage and signature of each operand follow."""
OP_TAIL = 4
"""Its last: time_ns, seq, node, and how many numbers there are before its first output."""

PACKERS: dict[int, Callable[..., bytes]] = {}
"""Count of numbers -> what packs so many."""

pack_event: Callable[..., bytes] = struct.Struct("8q").pack
"""Packs an event: storage, time_ns, op, kind, size_bytes, address, device, signature."""
pack_free: Callable[..., bytes] = struct.Struct("3q").pack
"""Packs storage, time_ns and op of a storage that was freed."""


def make_packer(count: int) -> Callable[..., bytes]:
    """Return what packs ``count`` numbers, and keep it in `PACKERS`."""
    packer = PACKERS[count] = struct.Struct(f"{count}q").pack
    return packer


Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]

COMMIT_OPS = 100_000
"""Ops after which facts are committed even in the middle of a step, to bound memory."""


class Recorder:
    """Plain lists that hooks append to, emptied by `commit`.

    The lists are never replaced, so hooks may keep their ``append``. Appending one item is
    atomic in CPython; that is all the locking the hot path has.
    """

    def __init__(self, writer: RunWriter) -> None:
        """Record into ``writer``."""
        self.ops: list[bytes] = []
        self.storage_events: list[bytes] = []
        self.scopes: list[tuple[int, ...]] = []
        self.identities: list[tuple[int, str, str, int, int, int, str, str]] = []
        self.marks: list[tuple[int, int, int]] = []
        self.modules: list[tuple[int, int, str, str]] = []
        self.samples: list[tuple[int, str, int, int, int]] = []
        self.allocator_events: list[tuple[Any, ...]] = []
        self.private_segments: list[tuple[int, ...]] = []
        self.block_tables: list[tuple[Any, ...]] = []
        self.counted_steps: list[tuple[int, ...]] = []
        self.committed_ops = 0
        self.before_commit: list[Callable[[], None]] = []
        """Called first, to bring in facts kept elsewhere (the CUDA allocator's history)."""
        self._signatures: dict[tuple[Any, ...], int] = {}
        self._new_signatures: list[tuple[Any, ...]] = []
        self._new_codes: list[tuple[str, bool, bool]] = []
        self._code_count = 0
        self._devices: dict[torch.device, int] = {}
        self._new_devices: list[str] = []
        self.stopped_by: str | None = None
        """Why nothing more is written, if a commit failed."""
        self._writer = writer
        self.lock = threading.RLock()
        """Held by the thread that commits or enters something new, and while the process forks."""
        self._is_committing = False
        self._is_broken = False

    def count_ops(self) -> int:
        """Return how many ops have finished since tracing began."""
        return self.committed_ops + len(self.ops)

    def add_code(self, name: str, *, mutates: bool, reads_self: bool) -> int:
        """Enter an operator and return its code."""
        with self.lock:
            self._new_codes.append((name, mutates, reads_self))
            self._code_count += 1
            return self._code_count - 1

    def find_signature(self, key: tuple[Any, ...]) -> int:
        """Return the number of a (shape, stride, dtype), entering it if it is new."""
        with self.lock:
            number = self._signatures.get(key)
            if number is None:
                number = len(self._signatures)
                self._new_signatures.append(key)
                self._signatures[key] = number
            return number

    @property
    def signatures(self) -> dict[tuple[Any, ...], int]:
        """Known (shape, stride, dtype) keys; for look-ups on the hot path."""
        return self._signatures

    def find_device(self, device: torch.device) -> int:
        """Return the number of a device, entering it if it is new."""
        number = self._devices.get(device)
        if number is None:
            with self.lock:
                number = self._devices.get(device)  # another thread may have been here meanwhile
                if number is None:
                    number = len(self._devices)
                    self._new_devices.append(str(device))
                    self._devices[device] = number
        return number

    def mark(self, kind: int) -> None:
        """Note that something happened now (`attnprof.store.schema` lists the kinds)."""
        self.marks.append((kind, time.perf_counter_ns(), self.count_ops()))

    def commit(self) -> None:
        """Write everything recorded so far; a reader sees all of it or none.

        Once a commit was cut off, by a full disk or by Ctrl-C in the middle of it, rows are
        missing that later ones count on. So nothing more is written; the program goes on.
        """
        self._write(self._take_all)

    def commit_samples(self) -> None:
        """Write the samples recorded so far, for the thread that takes them.

        All else waits for a thread that records it. Ops are numbered by how many wait, and events
        that the allocator adds while its history is read and cleared would be lost.
        """
        self._write(self._take_samples)

    def _write(self, take: Callable[[], dict[str, Any]]) -> None:
        with self.lock:
            if self._is_committing:
                return  # a signal handler came in the middle of one
            self._is_committing = True
            was_broken, self._is_broken = self._is_broken, True
            try:
                columns = take()
                if columns and not was_broken:
                    self._writer.commit(columns)
                self._is_broken = was_broken
            except Exception as error:
                self.stopped_by = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"attnprof stopped recording: {self.stopped_by}. The run in "
                    f"{self._writer.path} keeps what was recorded before",
                    RuntimeWarning,
                    stacklevel=3,
                )
            finally:
                self._is_committing = False

    def _take_all(self) -> dict[str, Any]:
        for bring_in in self.before_commit:
            bring_in()
        columns = self._take_samples()
        self._take_ops(columns)
        self._take_events(columns)
        _take_rows(columns, "scopes", SCOPES.names, self.scopes)
        _take_rows(columns, "identities", IDENTITIES.names, self.identities)
        _take_rows(columns, "marks", MARKS.names, self.marks)
        _take_rows(columns, "modules", MODULES.names, self.modules)
        _take_rows(columns, "block_tables", BLOCK_TABLES.names, self.block_tables)
        _take_rows(columns, "counted_steps", COUNTED_STEPS.names, self.counted_steps)
        _take_rows(columns, "allocator_events", ALLOCATOR_EVENTS.names, self.allocator_events)
        _take_rows(columns, "private_segments", PRIVATE_SEGMENTS.names, self.private_segments)
        self._take_vocabulary(columns)
        return columns

    def _take_samples(self) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        _take_rows(columns, "samples", SAMPLES.names, self.samples)
        return columns

    def _take_ops(self, columns: dict[str, Any]) -> None:
        ops = self.ops[:]
        if not ops:
            return
        # Counted before the rows leave the list, so that `count_ops` never runs backwards for a
        # thread that appends meanwhile; being ahead for an instant only blurs a free's position.
        self.committed_ops += len(ops)
        del self.ops[: len(ops)]
        numbers, begins, lengths = _unpack(ops)
        ends = begins + lengths
        n_in = (numbers[ends - 1] - OP_HEAD) >> 1
        columns["ops"] = {
            "code": numbers[begins],
            "scope": numbers[begins + 1],
            "thread": numbers[begins + 2],
            "time_ns": numbers[ends - 4],
            "seq": numbers[ends - 3],
            "node": numbers[ends - 2],
            "n_in": n_in,
            "n_out": ((lengths - (OP_HEAD + OP_TAIL)) >> 1) - n_in,
        }
        is_operand = np.ones(len(numbers), np.bool_)
        for i in range(OP_HEAD):
            is_operand[begins + i] = False
        for i in range(1, OP_TAIL + 1):
            is_operand[ends - i] = False
        operands = numbers[is_operand]
        columns["operands"] = {"storage": operands[0::2], "signature": operands[1::2]}

    def _take_events(self, columns: dict[str, Any]) -> None:
        events = self.storage_events[:]
        if not events:
            return
        del self.storage_events[: len(events)]
        numbers, begins, lengths = _unpack(events)
        table = {name: numbers[begins + i] for i, name in enumerate(("storage", "time_ns", "op"))}
        whole = np.flatnonzero(lengths > 3)
        begins = begins[whole]
        freed = {"kind": FREED, "size_bytes": 0, "address": 0, "device": -1, "signature": -1}
        for i, (name, value) in enumerate(freed.items()):
            table[name] = np.full(len(events), value, np.int64)
            table[name][whole] = numbers[begins + 3 + i]
        columns["storage_events"] = table

    def _take_vocabulary(self, columns: dict[str, Any]) -> None:
        if self._new_signatures:
            keys, self._new_signatures = self._new_signatures, []
            columns["signatures"] = {
                "shape": [list(key[0]) for key in keys],
                "stride": [list(key[1]) for key in keys],
                "dtype": [str(key[2]).removeprefix("torch.") for key in keys],
            }
        if self._new_codes:
            codes, self._new_codes = self._new_codes, []
            _take_rows(columns, "codes", ["name", "mutates", "reads_self"], codes)
        if self._new_devices:
            columns["devices"] = {"name": self._new_devices}
            self._new_devices = []


def _unpack(packed: list[bytes]) -> tuple[Numbers, Numbers, Numbers]:
    """Return all numbers, and where those of each item begin and how many they are."""
    lengths = np.fromiter(map(len, packed), np.int64, len(packed)) >> 3
    return np.frombuffer(b"".join(packed), np.int64), np.cumsum(lengths) - lengths, lengths


def _take_rows(columns: dict[str, Any], table: str, names: list[str], rows: list[Any]) -> None:
    """Move ``rows`` out of their list into ``columns[table]``."""
    taken = rows[:]
    del rows[: len(taken)]
    if taken:
        columns[table] = dict(zip(names, zip(*taken, strict=True), strict=True))
