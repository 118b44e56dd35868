"""Put the rules together: every block of a run gets a category, a layer, a phase and a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from attnprof.attribution.allocated import replace_storages
from attnprof.attribution.attention import find_calls, find_other_calls
from attnprof.attribution.blocks import Blocks, find_blocks
from attnprof.attribution.cache import Kept, find_kept
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.compiled import locate_ops
from attnprof.attribution.custom_functions import label_custom_backward
from attnprof.attribution.facts import Bools, Facts, Ints
from attnprof.attribution.flow import Flow
from attnprof.attribution.fused_pairs import find_fused_pairs
from attnprof.attribution.gradients import find_gradient_storages
from attnprof.attribution.inference import name_inference_phases
from attnprof.attribution.labels import CATEGORIES, ROLE_CATEGORIES, Labels, label_storages
from attnprof.attribution.labels import CODE as CATEGORY
from attnprof.attribution.order import DeviceBlocks
from attnprof.attribution.phases import CODE as PHASE
from attnprof.attribution.phases import PHASES, Timeline, find_timeline
from attnprof.attribution.pieces import join_pieces
from attnprof.attribution.recomputed import find_repeats
from attnprof.attribution.scans import find_scans
from attnprof.attribution.workspace import NO_STORAGE, add_buffers, find_buffers
from attnprof.store.reader import StoredRun
from attnprof.vocabulary import Category, Phase, Role


@dataclass(frozen=True)
class Attribution:
    """What a run's facts mean."""

    facts: Facts
    timeline: Timeline
    blocks: Blocks
    calls: list[AttentionCall]
    kept: Kept
    allocations: pl.DataFrame
    """`Run.allocations`, with the columns ``start`` and ``end`` (order of events) besides."""


def attribute(stored: StoredRun, devices: Sequence[DeviceBlocks] = ()) -> Attribution:
    """Attribute every block of a run; pure: the same tables always give the same answer.

    Args:
        stored: The run.
        devices: What the allocators of its devices did, where they kept a history.
    """
    facts = Facts(stored, devices)
    repeats = find_repeats(facts)
    facts.is_recompute, facts.op_module = repeats.is_recompute, repeats.module
    facts.op_module = locate_ops(facts)
    timeline = find_timeline(facts)
    buffers = find_buffers(facts, stored.info.get("dry_run"))
    blocks = replace_storages(add_buffers(find_blocks(facts), facts, buffers), facts)
    identities = stored.table("identities").to_pylist()
    roles = {row["storage"]: row["role"] for row in identities if row["role"] in ROLE_CATEGORIES}
    for storage, owner in find_gradient_storages(facts).items():
        if roles.get(owner) == Role.PARAMETER:
            roles.setdefault(storage, Role.GRADIENT.value)
    inputs = {row["storage"] for row in identities if row["role"] == Role.INPUT}
    computes = [PHASE[p] for p in (Phase.FORWARD, Phase.RECOMPUTE, Phase.OUTSIDE)]
    is_forward = np.isin(timeline.phase, computes)
    flow = Flow(facts, is_forward, roles)
    calls = find_calls(facts, flow)
    calls += find_other_calls(facts, flow, is_forward, roles, calls)
    calls = sorted([*calls, *find_fused_pairs(facts, calls)], key=lambda call: call.ops[0])
    join_pieces(facts, flow, calls)
    kept = find_kept(facts, flow, timeline, calls)
    name_inference_phases(facts, timeline, calls, kept)
    carried = find_scans(facts, flow, is_forward, calls)
    labels = label_storages(facts, flow, calls, kept, carried, identities, repeats.original)
    label_custom_backward(facts, calls, labels)
    for storage in inputs:
        if facts.born_by[storage] < 0:
            labels.put(storage, Category.INPUTS, "")
    allocations = _build_allocations(facts, timeline, blocks, labels)
    return Attribution(facts, timeline, blocks, calls, kept, allocations)


_FROM_OUTSIDE = (
    Category.PARAMETERS, Category.BUFFERS, Category.OPTIMIZER_STATE, Category.INPUTS,
)  # fmt: skip
"""What compiled code is given and does not make."""


def _build_allocations(
    facts: Facts, timeline: Timeline, blocks: Blocks, labels: Labels
) -> pl.DataFrame:
    step = timeline.step_of(blocks.at_op)
    compiled_at = _find_compiled(facts, blocks)
    made_at = _find_makers(blocks, labels, compiled_at)
    # One more entry than there are ops: blocks that no op made point at the last.
    phase = np.append(timeline.phase, PHASE[Phase.OUTSIDE])[made_at]
    code = np.append(facts.code, -1)[blocks.op]
    saved = _find_saved(timeline, blocks, made_at, phase)
    category, exact = _find_categories(facts, timeline, blocks, labels, phase, saved, compiled_at)
    layer, layer_names = _find_layers(facts, blocks, made_at, labels)
    signatures = pl.DataFrame(
        {
            "shape": [list(s.shape) for s in facts.signatures],
            "dtype": [s.dtype for s in facts.signatures],
        },
        schema={"shape": pl.List(pl.Int64), "dtype": pl.Categorical},
    )
    op_names = [name.removesuffix(".default") for name in facts.code_names]
    return pl.DataFrame(
        {
            "allocation_id": np.arange(len(step)),
            "device": _look_up(facts.devices, blocks.device),
            "address": blocks.address,
            "size_bytes": blocks.size_bytes,
            "requested_bytes": blocks.requested_bytes,
            "start_ns": blocks.start_ns,
            "end_ns": pl.Series(blocks.end_ns).set(pl.Series(blocks.end_ns) < 0, None),
            "step": step,
            "phase": _look_up([p.value for p in PHASES], phase),
            "layer": _look_up(layer_names, layer),
            "op": _look_up(op_names, code),
            "category": _look_up([c.value for c in CATEGORIES], category),
            "role": _look_up(_ROLES, _find_roles(category, phase)),
            "shape": _gather(signatures["shape"], blocks.signature),
            "dtype": _gather(signatures["dtype"], blocks.signature),
            "saved": saved,
            "exact": exact,
            "start": _find_starts(facts, timeline, blocks, category, step),
            "end": blocks.end,
        }
    )


def _find_compiled(facts: Facts, blocks: Blocks) -> Ints:
    """Return per block that no op made the op of compiled code by which it was seen, or -1."""
    # An op that takes no memory, as a view, may have returned before kernels after it took some.
    may_be_next = facts.is_compiled.copy()
    may_be_next[blocks.op[blocks.op >= 0]] = may_be_next[-1] = True
    numbers = np.where(may_be_next, np.arange(facts.count + 1), facts.count)
    following = np.minimum.accumulate(numbers[::-1])[::-1]
    has_history = np.isin(blocks.device, [each.blocks.device for each in facts.allocated])
    at = np.minimum(blocks.at_op, facts.count)
    at = np.where(has_history, following[at], at)
    was_there = has_history & blocks.is_found
    return np.where((blocks.op < 0) & ~was_there & facts.is_compiled[at], at, -1)


def _find_makers(blocks: Blocks, labels: Labels, compiled_at: Ints) -> Ints:
    """Return per block the op that made it, or in compiled code the op by which it was seen."""
    label = np.append(labels.category, -1)[blocks.storage]
    is_made_there = (compiled_at >= 0) & ~np.isin(label, [CATEGORY[c] for c in _FROM_OUTSIDE])
    return np.where(is_made_there, compiled_at, blocks.op)


def _look_up(words: list[str], positions: Ints) -> pl.Series:
    """Return words by position as categories; a negative position gives null."""
    return _gather(pl.Series(words, dtype=pl.String).cast(pl.Categorical), positions)


def _gather(values: pl.Series, positions: Ints) -> pl.Series:
    index = pl.Series(positions.astype(np.int64))
    return values.gather(index.set(index < 0, None))


def _find_layers(
    facts: Facts, blocks: Blocks, made_at: Ints, labels: Labels
) -> tuple[Ints, list[str]]:
    """Return per block a position in a list of layer paths: its label's, or its op's module's."""
    module = np.append(facts.op_module, -1)
    inherits = np.flatnonzero(facts.is_backward & (facts.forward_op >= 0) & ~facts.is_compiled[:-1])
    module[inherits] = facts.op_module[facts.forward_op[inherits]]
    number = np.array([labels.number_of(path) for path in facts.module_paths], np.int64)
    own = np.append(labels.layer, -1)[blocks.storage]
    return np.where(own >= 0, own, number[module[made_at]]), labels.layers


def _find_saved(timeline: Timeline, blocks: Blocks, made_at: Ints, phase: Ints) -> Bools:
    """Return which blocks of a forward with gradients were live when it had ended."""
    if not len(timeline.forward_begin):
        return np.zeros(len(blocks.op), np.bool_)
    forward = np.searchsorted(timeline.forward_begin, made_at, "right") - 1
    at = np.maximum(forward, 0)
    made = (phase == PHASE[Phase.FORWARD]) & (forward >= 0)
    made &= made_at < timeline.forward_end[at]
    lives = ~blocks.is_freed | (blocks.end_ns > timeline.settled_ns[at])
    result: Bools = made & timeline.forward_has_grad[at] & lives
    return result


def _find_starts(
    facts: Facts, timeline: Timeline, blocks: Blocks, category: Ints, step: Ints
) -> Ints:
    """Return from which event on a block counts.

    What nobody saw being made is older than its first use: a parameter was there when tracing
    began, a batch since the step that used it began. Only what compiled code makes is as new as
    it looks.
    """
    owned = np.isin(category, [CATEGORY[c] for c in ROLE_CATEGORIES.values()])
    step_start = np.searchsorted(facts.events["op"], timeline.step_begin, "left")
    # Where recording went on after a gap: what is older than that may be from inside the gap.
    since = np.append(0, np.unique(step_start[timeline.counted >= 0]))
    recorded = since[np.searchsorted(since, blocks.start, "right") - 1]
    early = np.where(owned, recorded, step_start[step])
    is_older = blocks.is_found & (category != CATEGORY[Category.UNATTRIBUTED])
    return np.where(is_older, np.minimum(early, blocks.start), blocks.start)


_READ_FORWARD, _READ_BACKWARD, _READ_OPTIMIZER = 1, 2, 4


def _find_categories(
    facts: Facts,
    timeline: Timeline,
    blocks: Blocks,
    labels: Labels,
    phase: Ints,
    saved: Bools,
    compiled_at: Ints,
) -> tuple[Ints, Bools]:
    """Return per block its category (its label, else what its life says) and if that is certain."""
    # The last entry of these is for blocks without a storage.
    read = np.append(_find_readers(facts, timeline), 0)[blocks.storage]
    label = np.append(labels.category, -1)[blocks.storage]
    from_nobody = blocks.op < 0
    is_workspace = (blocks.storage == NO_STORAGE) & ~from_nobody
    unseen = (blocks.storage == NO_STORAGE) & from_nobody & ~blocks.is_found
    in_compiled = compiled_at >= 0
    # What lives on after all calls may be one of its constants.
    of_kernel = in_compiled & blocks.is_freed
    outside = (phase == PHASE[Phase.OUTSIDE]) & ~from_nobody
    kept_by_optimizer = (phase == PHASE[Phase.OPTIMIZER]) & ~blocks.is_freed
    rules: list[tuple[Bools, Category, bool]] = [
        (is_workspace, Category.WORKSPACE, bool(facts.allocated)),  # else from a formula
        (of_kernel & saved, Category.ACTIVATIONS, False),  # a fused kernel made it
        (of_kernel, Category.TEMPORARIES, False),
        (unseen, Category.UNATTRIBUTED, False),  # taken outside of ops
        (in_compiled, Category.UNATTRIBUTED, False),
        (from_nobody & (read & _READ_FORWARD > 0), Category.INPUTS, True),
        (from_nobody & (read & _READ_OPTIMIZER > 0), Category.OPTIMIZER_STATE, False),
        (from_nobody & (read > 0), Category.UNATTRIBUTED, False),
        (from_nobody, Category.PREEXISTING, True),
        (kept_by_optimizer, Category.OPTIMIZER_STATE, False),
        (outside & (read & _READ_FORWARD > 0), Category.INPUTS, True),
        (saved, Category.ACTIVATIONS, True),
    ]
    category = np.full(len(label), CATEGORY[Category.TEMPORARIES])
    exact = np.ones(len(label), np.bool_)
    for condition, name, certain in reversed(rules):
        category[condition] = CATEGORY[name]
        exact[condition] = certain
    labelled = label >= 0
    category[labelled] = label[labelled]
    is_role = np.isin(label, [CATEGORY[c] for c in ROLE_CATEGORIES.values()])
    exact[labelled] = is_role[labelled] | ~in_compiled[labelled]
    guessed = [each.blocks.device for each in facts.allocated if not each.blocks.has_ops]
    exact[np.isin(blocks.device, guessed)] = False
    return category, exact


def _find_readers(facts: Facts, timeline: Timeline) -> Ints:
    """Return per storage a set of bits: in which phases an op took it as an operand."""
    bits = {
        Phase.FORWARD: _READ_FORWARD,
        Phase.PREFILL: _READ_FORWARD,
        Phase.DECODE: _READ_FORWARD,
        Phase.RECOMPUTE: _READ_BACKWARD,
        Phase.BACKWARD: _READ_BACKWARD,
        Phase.OPTIMIZER: _READ_OPTIMIZER,
    }
    of_phase = np.array([bits.get(p, 0) for p in PHASES], np.int64)
    read = np.zeros(facts.storage_count, np.int64)
    rows = np.flatnonzero(facts.is_input)
    row_bits = of_phase[timeline.phase[facts.row_op[rows]]]
    for bit in (_READ_FORWARD, _READ_BACKWARD, _READ_OPTIMIZER):
        read[facts.storage[rows[row_bits == bit]]] |= bit
    return read


_ROLES = [*(role.value for role in ROLE_CATEGORIES), "value", "gradient_of_value"]


def _find_roles(category: Ints, phase: Ints) -> Ints:
    """Return per block a position in `_ROLES`: identity, else a value or the gradient of one."""
    role = np.full(len(category), len(ROLE_CATEGORIES), np.int64)
    role[phase == PHASE[Phase.BACKWARD]] += 1
    for position, owned in enumerate(ROLE_CATEGORIES.values()):
        role[category == CATEGORY[owned]] = position
    return role
