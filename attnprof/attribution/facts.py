"""The recorded tables as arrays, and the joins that every rule of attribution needs.

Ops are numbered by their row. The rows of `operands` of op ``i`` are
``first_row[i] : first_row[i + 1]``; the first ``n_in[i]`` of them are inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnprof.attribution.order import (
    TAKEN,
    DeviceBlocks,
    Events,
    PlacedBlocks,
    merge_events,
)
from attnprof.attribution.paths import resolve_module_paths
from attnprof.store.reader import StoredRun
from attnprof.store.schema import (
    BORN,
    COMPILED,
    FOUND,
    FREED,
    NO_NODE,
    OUTERMOST,
    RECOMPUTE,
    RESIZED,
    UNCOMPILED,
)
from attnprof.vocabulary import Role

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Bools = np.ndarray[tuple[int], np.dtype[np.bool_]]

ITEM_BYTES = {
    "float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float32": 4, "int32": 4,
    "uint32": 4, "uint64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "complex32": 4,
}  # fmt: skip
"""Bytes per element; what is not listed (bool, int8, float8 and the like) has one."""


@dataclass(frozen=True)
class Signature:
    """Shape, stride (in elements) and dtype of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    numel: int

    @property
    def item_bytes(self) -> int:
        """Bytes per element."""
        return ITEM_BYTES.get(self.dtype, 1)


class Facts:
    """One run's tables as arrays."""

    def __init__(self, stored: StoredRun, devices: Sequence[DeviceBlocks] = ()) -> None:
        """Read the tables of ``stored``.

        Args:
            stored: The run.
            devices: What the allocators of its devices did, where they kept a history.
        """
        self.stored = stored
        self.events: Events = stored.columns("storage_events")
        """The columns of `storage_events`, with the events of allocators among them."""
        self.allocated: list[PlacedBlocks] = []
        """What allocators did, with the place of their events among `events`."""
        self._read_ops()
        self._read_operands()
        if devices:
            self.events, self.allocated = merge_events(self.events, devices, self.time_ns)
        self._read_vocabulary()
        self._read_scopes()

    def _read_ops(self) -> None:
        ops = self.stored.columns("ops")
        self.count = len(ops["code"])
        self.time_ns: Ints = ops["time_ns"]
        self.code: Ints = ops["code"]
        self.scope: Ints = ops["scope"]
        self.thread: Ints = ops["thread"]
        self.seq: Ints = ops["seq"]
        self.node: Ints = ops["node"]
        self.n_in: Ints = ops["n_in"].astype(np.int64)
        widths = self.n_in + ops["n_out"]
        self.first_row: Ints = np.zeros(self.count + 1, np.int64)
        np.cumsum(widths, out=self.first_row[1:])
        self.row_op: Ints = np.repeat(np.arange(self.count, dtype=np.int64), widths)
        position = np.arange(len(self.row_op), dtype=np.int64) - self.first_row[self.row_op]
        self.is_input: Bools = position < self.n_in[self.row_op]

    def _read_operands(self) -> None:
        operands = self.stored.columns("operands")
        self.storage: Ints = operands["storage"]
        self.signature: Ints = operands["signature"]
        last = int(self.events["storage"].max()) if len(self.events["storage"]) else -1
        self.storage_count = last + 1
        self.born_by: Ints = np.full(self.storage_count, -1, np.int64)
        """Per storage, the op that returned it first, or -1 if it was found."""
        born = np.zeros(self.storage_count, np.bool_)
        born[self.events["storage"][self.events["kind"] == BORN]] = True
        outputs = np.flatnonzero(~self.is_input)[::-1]  # assigned last wins: the earliest op
        outputs = outputs[born[self.storage[outputs]]]
        self.born_by[self.storage[outputs]] = self.row_op[outputs]
        self.birth_row: Ints = np.full(self.storage_count, -1, np.int64)
        """Per storage, the operand row through which it was born."""
        self.birth_row[self.storage[outputs]] = outputs

    def _read_vocabulary(self) -> None:
        table = self.stored.table("signatures")
        self.signatures = [
            Signature(tuple(shape), tuple(stride), dtype, int(np.prod(shape, dtype=np.int64)))
            for shape, stride, dtype in zip(
                table["shape"].to_pylist(),
                table["stride"].to_pylist(),
                table["dtype"].to_pylist(),
                strict=True,
            )
        ]
        self.signature_numel: Ints = np.array([s.numel for s in self.signatures], np.int64)
        codes = self.stored.table("codes")
        self.code_names: list[str] = codes["name"].to_pylist()
        """Full names, such as ``aten::bmm.default``."""
        self.short_names = [n.split("::")[-1].split(".")[0] for n in self.code_names]
        """Names without namespace and overload, such as ``bmm``."""
        self.mutates: Bools = np.array(codes["mutates"].to_pylist(), np.bool_)
        self.devices: list[str] = self.stored.table("devices")["name"].to_pylist()

    def _read_scopes(self) -> None:
        scopes = self.stored.columns("scopes")
        count = int(max(scopes["scope"].max(initial=-1), self.scope.max(initial=-1))) + 1
        self.scope_module: Ints = np.full(count + 1, -1, np.int64)  # last entry: no scope
        self.scope_flags: Ints = np.zeros(count + 1, np.int64)
        self.scope_module[scopes["scope"]] = scopes["module"]
        self.scope_flags[scopes["scope"]] = scopes["flags"]
        self.scopes = scopes
        called = set(scopes["module"][(scopes["flags"] & OUTERMOST) != 0].tolist())
        paths = resolve_module_paths(self.stored.table("modules"), called)
        self.module_paths: list[str] = [path or "" for path in paths] + [""]
        """Per module number, its path; the last entry, for no module, is empty."""
        self._adopt_strays({number for number, path in enumerate(paths) if path is None})

    def _adopt_strays(self, strays: set[int]) -> None:
        """Count calls of modules that belong to no model to the module that called them."""
        if not strays:
            return
        module = self.scope_module
        for scope in sorted(self.parent_of_scope):  # a parent is numbered before its children
            parent = self.parent_of_scope[scope]
            if int(module[scope]) in strays:
                module[scope] = module[parent] if parent in self.parent_of_scope else -1

    @cached_property
    def op_module(self) -> Ints:
        """Per op, the module whose forward it ran in, or -1.

        `attribute` puts others in the place of those of compiled code, also in its backward.
        """
        return self.scope_module[self.scope]

    @cached_property
    def is_recompute(self) -> Bools:
        """Per op, whether it ran in a forward that checkpointing repeats."""
        result: Bools = (self.scope_flags[self.scope] & RECOMPUTE) != 0
        return result

    @cached_property
    def is_compiled_scope(self) -> Bools:
        """Per module call, whether it is that of compiled code, or inside of one."""
        inside: Bools = (self.scope_flags & COMPILED) != 0
        for scope in sorted(self.parent_of_scope):
            parent = self.parent_of_scope[scope]
            inside[scope] |= parent >= 0 and inside[parent]
        return inside

    @property
    def has_uncompiled_scope(self) -> bool:
        """Whether a module that was compiled ran op by op."""
        return bool((self.scope_flags & UNCOMPILED).any())

    @cached_property
    def is_compiled(self) -> Bools:
        """Per op, whether compiled code ran it, in its backward too; and false for no op."""
        inside: Bools = self.is_compiled_scope[self.scope]
        if inside.any():
            of_forward = self.forward_op[self.is_backward]
            inside[self.is_backward] = (of_forward >= 0) & inside[of_forward]
        return np.append(inside, False)

    @cached_property
    def is_backward(self) -> Bools:
        """Per op, whether an autograd node ran it (recomputed forwards are not counted)."""
        result: Bools = (self.node != NO_NODE) & ~self.is_recompute
        return result

    @cached_property
    def producer_row(self) -> Ints:
        """Per input row, the output row that last wrote its storage, or -1 if nobody did.

        Ops that return a view of an operand write nothing; in-place ops and ``out=`` do.
        """
        rows = np.flatnonzero(~self.is_input)
        writes = (self.born_by[self.storage[rows]] == self.row_op[rows]) | self.mutates[
            self.code[self.row_op[rows]]
        ]
        rows = rows[writes]
        span = self.count + 1
        keys = self.storage[rows].astype(np.int64) * span + self.row_op[rows]
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        result = np.full(len(self.storage), -1, np.int64)
        inputs = np.flatnonzero(self.is_input)
        if not len(rows) or not len(inputs):
            return result
        wanted = self.storage[inputs].astype(np.int64) * span + self.row_op[inputs]
        at = np.searchsorted(keys, wanted, "left") - 1
        found = rows[np.maximum(at, 0)]
        ok = (at >= 0) & (self.storage[found] == self.storage[inputs])
        result[inputs[ok]] = found[ok]
        return result

    @cached_property
    def consumers(self) -> tuple[Ints, Ints]:
        """Input rows sorted by the op that produced them, and where each op's rows begin."""
        rows = np.flatnonzero(self.producer_row >= 0)
        producers = self.row_op[self.producer_row[rows]]
        order = np.argsort(producers, kind="stable")
        starts = np.searchsorted(producers[order], np.arange(self.count + 1))
        return rows[order], starts

    def users_of(self, op: int) -> list[int]:
        """Return the ops that take what an op wrote as an operand."""
        rows, starts = self.consumers
        users: list[int] = self.row_op[rows[starts[op] : starts[op + 1]]].tolist()
        return users

    @cached_property
    def forward_op(self) -> Ints:
        """Per op of backward, the forward op whose node ran it, or -1."""
        result = np.full(self.count, -1, np.int64)
        asking = np.flatnonzero((self.node >= 0) & self.is_backward)
        result[asking] = self.find_forward_ops(asking)
        return result

    def find_forward_ops(self, asking: Ints) -> Ints:
        """Return per op that a node ran the forward op that made the node, or -1.

        Autograd numbers nodes per thread in order of creation. The op that made node ``s`` is the
        first of its thread that saw a sequence number of at least ``s``. But when an op has changed
        a part of a tensor in place, autograd makes the node for the whole after it; the next op is
        then the first to see two new numbers, of which the lower ones are not its own.
        """
        result = np.full(len(asking), -1, np.int64)
        for thread in np.unique(self.thread[asking]):
            ops = np.flatnonzero(self.thread == thread)
            seqs = np.maximum.accumulate(self.seq[ops])
            own = np.flatnonzero(self.thread[asking] == thread)
            node = self.node[asking[own]]
            at = np.searchsorted(seqs, node, "left")
            ok = at < len(ops)
            at = np.minimum(at, len(ops) - 1)
            before = ops[np.maximum(at - 1, 0)]
            is_of_before = self.mutates[self.code[before]] & (node < seqs[at])
            made = np.where(is_of_before, before, ops[at])
            result[own[ok]] = np.where(made < asking[own], made, -1)[ok]
        return result

    @cached_property
    def births(self) -> Ints:
        """The events at which there was more memory than before."""
        kinds = (BORN, FOUND, RESIZED, TAKEN)
        result: Ints = np.flatnonzero(np.isin(self.events["kind"], kinds))
        return result

    @cached_property
    def freed_event(self) -> Ints:
        """Per storage, the event that freed it, or the number of events if it is still live."""
        result = np.full(self.storage_count, len(self.events["kind"]), np.int64)
        freed = np.flatnonzero(self.events["kind"] == FREED)
        result[self.events["storage"][freed]] = freed
        return result

    def list_writing(self, is_forward: Bools) -> list[int]:
        """Return those of some ops that make or change memory, in order."""
        result: list[int] = np.flatnonzero(self.writes & is_forward).tolist()
        return result

    @cached_property
    def writes(self) -> Bools:
        """Per op, whether it makes or changes memory; a view does neither."""
        rows = np.flatnonzero(~self.is_input)
        ops = self.row_op[rows]
        writes = (self.born_by[self.storage[rows]] == ops) | self.mutates[self.code[ops]]
        writing = np.zeros(self.count, np.bool_)
        writing[ops[writes]] = True
        return writing

    def are_written_in_place(self, rows: Ints) -> Bools:
        """Return which output rows are of an op that writes into what was there before it."""
        ops = self.row_op[rows]
        result: Bools = self.mutates[self.code[ops]] & (self.born_by[self.storage[rows]] != ops)
        return result

    def rows_in(self, op: int) -> range:
        """Return the input rows of an op."""
        first = int(self.first_row[op])
        return range(first, first + int(self.n_in[op]))

    def rows_out(self, op: int) -> range:
        """Return the output rows of an op."""
        return range(int(self.first_row[op]) + int(self.n_in[op]), int(self.first_row[op + 1]))

    def numel_of_rows(self, rows: Ints) -> Ints:
        """Return the number of elements of the tensors in operand rows."""
        result: Ints = self.signature_numel[self.signature[rows]]
        return result

    def signature_of(self, row: int) -> Signature:
        """Return shape, stride and dtype of the tensor in an operand row."""
        return self.signatures[int(self.signature[row])]

    @cached_property
    def parent_of_scope(self) -> dict[int, int]:
        """Per module call, the one it was made in, or -1."""
        scopes = self.scopes
        return dict(zip(scopes["scope"].tolist(), scopes["parent"].tolist(), strict=True))

    def enclosing_call(self, op: int, path: str) -> int:
        """Return the call of the module at ``path`` that an op ran in, or -1."""
        scope = int(self.scope[op])
        while scope >= 0 and self.module_paths[self.scope_module[scope]] != path:
            scope = self.parent_of_scope.get(scope, -1)
        return scope

    def ran_within(self, op: int, scope: int) -> bool:
        """Return whether an op ran in a module call, or in one that was made in it."""
        at = int(self.scope[op])
        while at > scope:  # a parent is numbered before its children
            at = self.parent_of_scope.get(at, -1)
        return at == scope

    def data_shape(self, op: int) -> tuple[int, ...]:
        """Return the shape of the first data that the outermost forward around an op is given."""
        scope, outermost = int(self.scope[op]), -1
        while scope in self.parent_of_scope:
            scope, outermost = self.parent_of_scope[scope], scope
        at = np.flatnonzero(self.scopes["scope"] == outermost)
        if not len(at):
            return ()
        enter, leave = (int(self.scopes[name][at[0]]) for name in ("enter_op", "exit_op"))
        return self.first_input_shape(enter, leave)

    def first_input_shape(self, enter: int, leave: int) -> tuple[int, ...]:
        """Return the shape of the first data a forward takes from outside, or an empty one.

        Args:
            enter: The forward's first op.
            leave: The first op after it.
        """
        for row in range(int(self.first_row[enter]), int(self.first_row[leave])):
            signature = self.signature_of(row)
            if not self.is_input[row] or len(signature.shape) < 2 or signature.dtype == "bool":
                continue
            made = int(self.producer_row[row])
            comes_from_outside = made < 0 or int(self.row_op[made]) < enter
            if comes_from_outside and not self.is_owned[self.storage[row]]:
                return signature.shape
        return ()

    @cached_property
    def storage_bytes(self) -> Ints:
        """Per storage, the size that it had last."""
        result = np.zeros(self.storage_count, np.int64)
        has_size = np.isin(self.events["kind"], (BORN, FOUND, RESIZED))
        result[self.events["storage"][has_size]] = self.events["size_bytes"][has_size]
        return result

    @cached_property
    def loose_parameters(self) -> frozenset[int]:
        """The storages of parameters that an optimizer updates and no module has."""
        rows = self.stored.table("identities").to_pylist()
        parameters = [(r["storage"], r["module"]) for r in rows if r["role"] == Role.PARAMETER]
        owned = {storage for storage, module in parameters if module >= 0}
        return frozenset(storage for storage, _ in parameters) - owned

    @cached_property
    def is_owned(self) -> Bools:
        """Per storage, whether it has an identity (parameter, buffer, gradient, …)."""
        owned = np.zeros(self.storage_count, np.bool_)
        table = self.stored.table("identities")
        is_input = np.array(table["role"].to_pylist(), object) == Role.INPUT
        owned[table["storage"].to_numpy()[~is_input]] = True
        return owned
