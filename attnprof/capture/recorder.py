"""The facts recorded since the last commit, and their way into the run directory."""

import threading
import time
from collections.abc import Callable
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from attnprof.store.schema import IDENTITIES, MARKS, MODULES, SAMPLES, SCOPES, STORAGE_EVENTS
from attnprof.store.writer import RunWriter

OpFact = tuple[int, int, int, int, int, int, int, list[int]]
"""time_ns, code, scope, thread, seq, node, number of inputs, storage and signature per operand."""

COMMIT_OPS = 100_000
"""Ops after which facts are committed even in the middle of a step, to bound memory."""


class Recorder:
    """Plain lists that hooks append to, emptied by `commit`.

    The lists are never replaced, so hooks may keep their ``append``. Appending one tuple is
    atomic in CPython; that is all the locking the hot path has.
    """

    def __init__(self, writer: RunWriter) -> None:
        """Record into ``writer``."""
        self.ops: list[OpFact] = []
        self.storage_events: list[tuple[int, int, int, int, int, int, int, int]] = []
        self.scopes: list[tuple[int, ...]] = []
        self.identities: list[tuple[int, str, str, int, int, int, str, str]] = []
        self.marks: list[tuple[int, int, int]] = []
        self.modules: list[tuple[int, int, str, str]] = []
        self.samples: list[tuple[int, str, int, int, int]] = []
        self.allocator_events: list[tuple[Any, ...]] = []
        self.committed_ops = 0
        self.before_commit: list[Callable[[], None]] = []
        """Called first, to bring in facts kept elsewhere (the CUDA allocator's history)."""
        self._signatures: dict[tuple[Any, ...], int] = {}
        self._new_signatures: list[tuple[Any, ...]] = []
        self._new_codes: list[tuple[str, bool, bool]] = []
        self._code_count = 0
        self._devices: dict[torch.device, int] = {}
        self._new_devices: list[str] = []
        self._writer = writer
        self._lock = threading.RLock()

    def count_ops(self) -> int:
        """Return how many ops have finished since tracing began."""
        return self.committed_ops + len(self.ops)

    def add_code(self, name: str, *, mutates: bool, reads_self: bool) -> int:
        """Enter an operator and return its code."""
        with self._lock:
            self._new_codes.append((name, mutates, reads_self))
            self._code_count += 1
            return self._code_count - 1

    def find_signature(self, key: tuple[Any, ...]) -> int:
        """Return the number of a (shape, stride, dtype), entering it if it is new."""
        with self._lock:
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
            with self._lock:
                number = self._devices.setdefault(device, len(self._devices))
                self._new_devices.append(str(device))
        return number

    def mark(self, kind: int) -> None:
        """Note that something happened now (`attnprof.store.schema` lists the kinds)."""
        self.marks.append((kind, time.perf_counter_ns(), self.count_ops()))

    def commit(self) -> None:
        """Write everything recorded so far; a reader sees all of it or none."""
        with self._lock:
            for bring_in in self.before_commit:
                bring_in()
            columns: dict[str, Any] = {}
            self._take_ops(columns)
            _take_rows(columns, "storage_events", STORAGE_EVENTS.names, self.storage_events)
            _take_rows(columns, "scopes", SCOPES.names, self.scopes)
            _take_rows(columns, "identities", IDENTITIES.names, self.identities)
            _take_rows(columns, "marks", MARKS.names, self.marks)
            _take_rows(columns, "modules", MODULES.names, self.modules)
            _take_rows(columns, "samples", SAMPLES.names, self.samples)
            self._take_vocabulary(columns)
            if columns:
                self._writer.commit(columns)

    def _take_ops(self, columns: dict[str, Any]) -> None:
        ops = self.ops[:]
        if not ops:
            return
        # Counted before the rows leave the list, so that `count_ops` never runs backwards for a
        # thread that appends meanwhile; being ahead for an instant only blurs a free's position.
        self.committed_ops += len(ops)
        del self.ops[: len(ops)]
        count = len(ops)
        names = ("time_ns", "code", "scope", "thread", "seq", "node", "n_in")
        table: dict[str, Any] = {
            name: np.fromiter(map(itemgetter(i), ops), np.int64, count)
            for i, name in enumerate(names)
        }
        operands = list(map(itemgetter(7), ops))
        lengths = np.fromiter(map(len, operands), np.int64, count) // 2
        table["n_out"] = lengths - table["n_in"]
        columns["ops"] = table
        flat = np.fromiter(chain.from_iterable(operands), np.int64, 2 * int(lengths.sum()))
        columns["operands"] = {"storage": flat[0::2], "signature": flat[1::2]}

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


def _take_rows(columns: dict[str, Any], table: str, names: list[str], rows: list[Any]) -> None:
    """Move ``rows`` out of their list into ``columns[table]``."""
    taken = rows[:]
    del rows[: len(taken)]
    if taken:
        columns[table] = dict(zip(names, zip(*taken, strict=True), strict=True))
