"""Put the rules together: every block of a run gets a category, a layer, a phase and a step."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from attnprof.attribution.attention import (
    AttentionCall,
    find_calls,
    find_io_storages,
    find_mask_storages,
)
from attnprof.attribution.blocks import Blocks, find_blocks
from attnprof.attribution.cache import Kept, find_kept
from attnprof.attribution.facts import Bools, Facts, Ints
from attnprof.attribution.flow import Flow
from attnprof.attribution.gradients import find_gradient_storages
from attnprof.attribution.phases import Timeline, find_timeline
from attnprof.store.reader import StoredRun
from attnprof.vocabulary import Category, Phase, Role

_ROLE_CATEGORIES = {
    Role.PARAMETER: Category.PARAMETERS,
    Role.BUFFER: Category.BUFFERS,
    Role.GRADIENT: Category.GRADIENTS,
    Role.OPTIMIZER_STATE: Category.OPTIMIZER_STATE,
}


@dataclass(frozen=True)
class Attribution:
    """What a run's facts mean."""

    facts: Facts
    timeline: Timeline
    blocks: Blocks
    calls: list[AttentionCall]
    allocations: pl.DataFrame
    """`Run.allocations`, with the columns ``start`` and ``end`` (order of events) besides."""


@dataclass
class _Labels:
    """Category, layer and certainty per storage, while they are being found."""

    category: dict[int, Category]
    layer: dict[int, str]
    inferred: set[int]

    def put(self, storage: int, category: Category, layer: str | None = None) -> None:
        """Label a storage that has no label yet."""
        if storage not in self.category:
            self.category[storage] = category
            if layer is not None:
                self.layer[storage] = layer


def attribute(stored: StoredRun) -> Attribution:
    """Attribute every block of a run; pure: the same tables always give the same answer."""
    facts = Facts(stored)
    timeline = find_timeline(facts)
    blocks = find_blocks(facts)
    identities = stored.table("identities").to_pylist()
    roles = {row["storage"]: row["role"] for row in identities if row["role"] != Role.TAGGED}
    is_forward = np.isin(timeline.phase, (Phase.FORWARD, Phase.RECOMPUTE, Phase.OUTSIDE))
    flow = Flow(facts, is_forward, roles)
    calls = find_calls(facts, flow)
    kept = find_kept(facts, flow, timeline, calls)
    _name_inference_phases(facts, timeline, calls, kept)
    labels = _label_storages(facts, flow, calls, kept, identities)
    allocations = _build_allocations(facts, timeline, blocks, labels)
    return Attribution(facts, timeline, blocks, calls, allocations)


def _name_inference_phases(
    facts: Facts, timeline: Timeline, calls: list[AttentionCall], kept: Kept
) -> None:
    """Call forwards that fill a cache prefill, and those that extend it decode."""
    if not kept.cache and not kept.state:
        return
    keeping = set(kept.cache.values()) | set(kept.state.values())
    first = True
    for begin, end, grad in zip(
        timeline.forward_begin, timeline.forward_exit, timeline.forward_has_grad, strict=True
    ):
        if grad:
            continue
        inside = [c for c in calls if begin <= c.ops[0] < end and c.layer in keeping]
        modules = set(np.unique(facts.op_module[begin:end]).tolist())
        touches = inside or any(facts.module_paths[m] in keeping for m in modules)
        if not touches:
            continue
        extends = any(c.q_len < c.k_len for c in inside) or (not inside and not first)
        span = timeline.phase[begin:end]
        span[span == Phase.FORWARD] = Phase.DECODE if extends and not first else Phase.PREFILL
        first = False


def _label_storages(
    facts: Facts,
    flow: Flow,
    calls: list[AttentionCall],
    kept: Kept,
    identities: list[dict[str, object]],
) -> _Labels:
    """Label storages by what is certain first: tags, identity, then data flow."""
    labels = _Labels({}, {}, set())
    for row in identities:
        if row["role"] == Role.TAGGED:
            labels.put(int(str(row["storage"])), Category(str(row["category"])), str(row["layer"]))
    layer_of_owner: dict[int, str] = {}
    for row in identities:
        if row["role"] != Role.TAGGED:
            storage, module, owner = (int(str(row[k])) for k in ("storage", "module", "owner"))
            layer = facts.module_paths[module] if module >= 0 else layer_of_owner.get(owner, "")
            layer_of_owner.setdefault(storage, layer)
            labels.put(storage, _ROLE_CATEGORIES[Role(str(row["role"]))], layer)
    for storage, owner in find_gradient_storages(facts).items():
        labels.put(storage, Category.GRADIENTS, layer_of_owner.get(owner, ""))
    for storage, layer in kept.cache.items():
        labels.put(storage, Category.KV_CACHE, layer)
    for storage, layer in kept.state.items():
        labels.put(storage, Category.RECURRENT_STATE, layer)
    for call in calls:
        _label_call(facts, flow, call, labels)
    _label_backward(facts, calls, labels)
    return labels


def _label_call(facts: Facts, flow: Flow, call: AttentionCall, labels: _Labels) -> None:
    for ops, category in (
        (call.softmax_ops, Category.SOFTMAX),
        (call.score_ops, Category.ATTENTION_SCORES),
    ):
        for op in sorted(ops):
            for row in facts.rows_out(op):
                if facts.born_by[facts.storage[row]] == op:
                    labels.put(int(facts.storage[row]), category, call.layer)
    for row in call.softmax_rows:
        labels.put(int(facts.storage[row]), Category.SOFTMAX, call.layer)
    for storage in find_mask_storages(facts, flow, call):
        labels.put(storage, Category.ATTENTION_MASK, call.layer)
    if call.kind == "linear":
        for row in call.path_rows:
            labels.put(int(facts.storage[row]), Category.RECURRENT_STATE, call.layer)
    for storage in find_io_storages(facts, flow, call):
        labels.put(storage, Category.ATTENTION_IO, call.layer)


def _label_backward(facts: Facts, calls: list[AttentionCall], labels: _Labels) -> None:
    """Label gradients inside attention: of scores as scores, of softmax as softmax.

    A node's ops make gradients of its forward op's operands. The gradient of a product's factor
    that is as large as the scores belongs to softmax (it is dP, from PV); the others are dQ, dK
    and dV. The softmax's own backward makes the gradient of its input: a score.
    """
    role: dict[int, tuple[AttentionCall, Category]] = {}
    for call in calls:
        results = {int(facts.row_op[row]) for row in call.result_rows}
        for op in call.softmax_ops - results:
            role[op] = (call, Category.SOFTMAX)
        for op in call.score_ops | results:
            role[op] = (call, Category.ATTENTION_SCORES)
        for op in call.seconds:
            role[op] = (call, Category.SOFTMAX)
        for op in call.ops:
            role.setdefault(op, (call, Category.ATTENTION_SCORES))
    if not role:
        return
    wanted = np.isin(facts.forward_op, list(role))
    firsts = _first_products(facts, calls)
    for op in np.flatnonzero(wanted).tolist():
        made_by = int(facts.forward_op[op])
        call, category = role[made_by]
        least = call.batch * call.heads * call.q_len * call.k_len
        for row in facts.rows_out(op):
            storage = int(facts.storage[row])
            if facts.born_by[storage] != op:
                continue
            is_score = facts.signature_of(row).numel >= max(1, least) and call.score_ops
            if made_by in firsts or not is_score:
                category = Category.ATTENTION_IO
            labels.put(storage, category, call.layer)


def _first_products(facts: Facts, calls: list[AttentionCall]) -> set[int]:
    return {call.ops[0] for call in calls}


def _build_allocations(
    facts: Facts, timeline: Timeline, blocks: Blocks, labels: _Labels
) -> pl.DataFrame:
    op_layer = _find_op_layers(facts)
    step = timeline.step_of(np.maximum(blocks.at_op, 0))
    is_made = blocks.op >= 0
    safe_op = np.maximum(blocks.op, 0)
    none = facts.count == 0
    phase = (
        np.full(len(step), Phase.OUTSIDE, object)
        if none
        else np.where(is_made, timeline.phase[safe_op], Phase.OUTSIDE)
    )
    saved = _find_saved(timeline, blocks, phase)
    start = _find_starts(facts, timeline, blocks, labels, step)
    category, layer, exact = _fill_in(facts, timeline, blocks, labels, phase, saved, op_layer)
    signatures = facts.signatures
    known = [signatures[s] if s >= 0 else None for s in blocks.signature.tolist()]
    names = facts.code_names
    frame = pl.DataFrame(
        {
            "allocation_id": np.arange(len(step)),
            "device": [facts.devices[d] for d in blocks.device.tolist()],
            "address": blocks.address,
            "size_bytes": blocks.size_bytes,
            "requested_bytes": blocks.size_bytes,
            "start_ns": blocks.start_ns,
            "end_ns": blocks.end_ns,
            "step": step,
            "phase": [str(p) for p in phase],
            "layer": layer,
            "op": [
                names[facts.code[op]].removesuffix(".default") if op >= 0 else None
                for op in blocks.op.tolist()
            ],
            "category": [str(c) for c in category],
            "role": _find_roles(blocks, labels, phase),
            "shape": [list(s.shape) if s else None for s in known],
            "dtype": [s.dtype if s else None for s in known],
            "saved": saved,
            "exact": exact,
            "start": start,
            "end": blocks.end,
        },
        schema_overrides={"shape": pl.List(pl.Int64)},
        strict=False,
    )
    return frame.with_columns(
        pl.when(pl.col("end_ns") >= 0).then(pl.col("end_ns")).alias("end_ns"),
        pl.col("category", "phase", "device", "op", "layer", "role", "dtype").cast(pl.Categorical),
    )


def _find_op_layers(facts: Facts) -> Ints:
    """Return per op the module it belongs to: its own, or in backward its forward op's."""
    module = facts.op_module.copy()
    made_by = facts.forward_op
    inherits = facts.is_backward & (made_by >= 0)
    module[inherits] = facts.op_module[made_by[inherits]]
    return module


def _find_saved(timeline: Timeline, blocks: Blocks, phase: np.ndarray) -> Bools:
    """Return which blocks of a forward with gradients were live when it had ended."""
    saved = np.zeros(len(blocks.op), np.bool_)
    if not len(timeline.forward_begin):
        return saved
    forward = np.searchsorted(timeline.forward_begin, blocks.op, "right") - 1
    at = np.maximum(forward, 0)
    made = (phase == Phase.FORWARD) & (forward >= 0) & (blocks.op < timeline.forward_end[at])
    lives = ~blocks.is_freed | (blocks.end_ns > timeline.settled_ns[at])
    result: Bools = made & timeline.forward_has_grad[at] & lives
    return result


def _find_starts(
    facts: Facts, timeline: Timeline, blocks: Blocks, labels: _Labels, step: Ints
) -> Ints:
    """Return from which event on a block counts.

    What nobody saw being made is older than its first use: a parameter was there when tracing
    began, a batch since the step that used it began.
    """
    start = blocks.start.copy()
    owned = np.array(
        [labels.category.get(s) in _ROLE_CATEGORIES.values() for s in blocks.storage.tolist()],
        np.bool_,
    )
    event_op = facts.events["op"]
    step_start = np.searchsorted(event_op, timeline.step_begin, "left")
    early = np.where(owned, 0, step_start[step]) if len(step) else start
    return np.where(blocks.is_found, np.minimum(early, start), start)


def _fill_in(
    facts: Facts,
    timeline: Timeline,
    blocks: Blocks,
    labels: _Labels,
    phase: np.ndarray,
    saved: Bools,
    op_layer: Ints,
) -> tuple[list[Category], list[str], list[bool]]:
    """Give every block a category: its label, else what its life says."""
    read_in = _find_readers(facts, timeline)
    settled = [Category.ACTIVATIONS if s else Category.TEMPORARIES for s in saved.tolist()]
    categories, layers, exact = [], [], []
    for i, storage in enumerate(blocks.storage.tolist()):
        label = labels.category.get(storage)
        op = int(blocks.op[i])
        certain = True
        if label is None:
            if op < 0:
                label, certain = _categorise_found(read_in[storage])
            elif phase[i] == Phase.OPTIMIZER and not blocks.is_freed[i]:
                label, certain = Category.OPTIMIZER_STATE, False
            elif phase[i] == Phase.OUTSIDE and read_in[storage] & _READ_FORWARD:
                label = Category.INPUTS
            else:
                label = settled[i]
        categories.append(label)
        exact.append(certain)
        layer = labels.layer.get(storage)
        if layer is None:
            layer = facts.module_paths[op_layer[op]] if op >= 0 else ""
        layers.append(layer)
    return categories, layers, exact


_READ_FORWARD, _READ_BACKWARD, _READ_OPTIMIZER = 1, 2, 4


def _find_readers(facts: Facts, timeline: Timeline) -> Ints:
    """Return per storage a set of bits: in which phases an op took it as an operand."""
    kinds = {
        Phase.FORWARD: _READ_FORWARD,
        Phase.PREFILL: _READ_FORWARD,
        Phase.DECODE: _READ_FORWARD,
        Phase.OUTSIDE: 0,
        Phase.RECOMPUTE: _READ_BACKWARD,
        Phase.BACKWARD: _READ_BACKWARD,
        Phase.OPTIMIZER: _READ_OPTIMIZER,
    }
    bit_of_op = np.zeros(facts.count, np.int64)
    for name, bit in kinds.items():
        bit_of_op[timeline.phase == name] = bit
    read = np.zeros(facts.storage_count, np.int64)
    rows = np.flatnonzero(facts.is_input)
    np.bitwise_or.at(read, facts.storage[rows], bit_of_op[facts.row_op[rows]])
    return read


def _categorise_found(read: int) -> tuple[Category, bool]:
    if read & _READ_FORWARD:
        return Category.INPUTS, True
    if read & _READ_OPTIMIZER:
        return Category.OPTIMIZER_STATE, False
    return (Category.UNATTRIBUTED, False) if read else (Category.PREEXISTING, True)


def _find_roles(blocks: Blocks, labels: _Labels, phase: np.ndarray) -> list[str]:
    names = {v: k.value for k, v in _ROLE_CATEGORIES.items()}
    return [
        names.get(
            labels.category.get(storage), "gradient" if phase[i] == Phase.BACKWARD else "value"
        )  # type: ignore[arg-type]  # None has no name
        for i, storage in enumerate(blocks.storage.tolist())
    ]
