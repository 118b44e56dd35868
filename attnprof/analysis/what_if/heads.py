"""Grouped-query attention: fewer heads of K and V."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from attnprof.analysis.what_if.cache import find_reads
from attnprof.analysis.what_if.fused import NOT_MULTIPLIED
from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene, count_words
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Bools
from attnprof.attribution.gradients import find_gradient_storages
from attnprof.attribution.products import factors, is_product
from attnprof.vocabulary import AttentionKind, Category, Role


def group_queries(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Give K and V fewer heads, which several heads of Q share.

    The KV cache shrinks by the ratio of heads; so do the projections of K and V, their gradients
    and optimizer states, and, where attention is fused, K and V themselves and their gradients.

    Written-out attention repeats K and V to all heads for its products: there only what is kept
    from one forward to the next shrinks, and is repeated while a layer attends.

    Known limitations:
        What the optimizer makes in passing is not scaled.
    """
    wanted = options.kv_heads
    assert wanted is not None
    multiplied = [c for c in scene.calls if c.pattern not in NOT_MULTIPLIED]
    calls = [c for c in multiplied if c.kv_heads > wanted and c.heads % wanted == 0]
    if not calls:
        found = sorted({f"{c.kv_heads} of {c.heads}" for c in multiplied if c.kv_heads})
        raise DoesNotApply(
            f"no layer's heads can be shared by {wanted} key/value heads; key/value heads are now "
            + (", ".join(found) or "unknown")
        )
    layers = tuple(dict.fromkeys(call.layer for call in calls))
    heads = ", ".join(sorted({f"{c.kv_heads}" for c in calls}))
    cache = scene.size_at_peak(Category.KV_CACHE)
    change = Change(
        title=f"Grouped queries: {count_words(wanted, 'key/value head')} instead of {heads}",
        evidence=f"{count_words(len(layers), 'layer')} keep {heads} heads of K and V; the KV "
        f"cache holds {scene.say_share(cache)} of the peak",
        how=f"num_key_value_heads={wanted} in the model's configuration: a model to be trained",
        layers=layers,
        assumes=("only the projections of K and V change",),
        exact=False,
    )
    return _share_heads(scene, table, calls, wanted, options), change


def _share_heads(
    scene: Scene, table: Table, calls: list[AttentionCall], wanted: int, options: Options
) -> Table:
    scale = _Scale(np.ones(scene.facts.storage_count))
    for call in calls:
        is_fused = call.kind is AttentionKind.FUSED or "fused_attention" in options.applied
        _scale_call(scene, call, wanted, scale, is_fused=is_fused)
    _scale_owned(scene, scale)
    factor = scale.factor[table.storage]
    cached = table.is_of(Category.KV_CACHE)
    for layer, kv_heads in {call.layer: call.kv_heads for call in calls}.items():
        factor[cached & scene.is_in_layers(table, [layer])] = wanted / kv_heads
    result = table.resize(factor < 1, np.ceil(table.size_bytes * factor).astype(np.int64))
    return result.add(_repeat_cached(scene, table, calls, cached & (factor < 1)))


def _repeat_cached(scene: Scene, table: Table, calls: list[AttentionCall], cached: Bools) -> Table:
    """Return the copies that written-out attention makes of a cache with fewer heads than Q."""
    repeated = [c for c in calls if c.kind is AttentionKind.MATERIALISED and c.kv_heads == c.heads]
    blocks, begin, end = find_reads(scene, table, cached, repeated)
    copies = table.take(blocks).move(begin, end)
    return copies.relabel(np.ones(len(copies), np.bool_), category=Category.ATTENTION_IO)


@dataclass(slots=True)
class _Scale:
    """By how much storages shrink."""

    factor: np.ndarray
    parameters: dict[int, float] = field(default_factory=dict)
    """Storages of the weights and biases of projections, with their factors."""
    walked: dict[tuple[object, ...], dict[int, int]] = field(default_factory=dict)
    """Per kind of call, the operand rows that led to K and V, with the first forward of each."""

    def begin_walk(self, scene: Scene, call: AttentionCall) -> Callable[[int], bool]:
        """Return what says of a row, and notes, whether it is the first forward to lead there.

        A cache that grows leads back to all tokens before, which the calls that made them scaled.
        """
        kind = call.layer, call.kind, call.heads, call.kv_heads, call.head_dim
        walked, forward = self.walked.setdefault(kind, {}), scene.forward_of(call)
        return lambda row: walked.setdefault(row, forward) == forward


def _scale_call(
    scene: Scene, call: AttentionCall, wanted: int, scale: _Scale, *, is_fused: bool
) -> None:
    """Scale what leads to K and V of a call, back to their projections, and the gradients of it."""
    facts = scene.facts
    ratio = wanted / call.kv_heads
    own_numel = {call.batch * call.kv_heads * n * call.head_dim for n in (call.q_len, call.k_len)}
    is_new = scale.begin_walk(scene, call)
    todo = [row for row in _find_keys(scene, call) if is_new(row)]
    seen, ops = set(todo), []
    while todo:
        row = todo.pop()
        made = int(facts.producer_row[row])
        if is_fused and _count_elements(scene, int(facts.storage[row])) in own_numel:
            scale.factor[facts.storage[row]] = ratio
        if made < 0:
            continue
        op = int(facts.row_op[made])
        weights = [
            int(facts.storage[r])
            for r in facts.rows_in(op)
            if scene.roles.get(int(facts.storage[r])) == Role.PARAMETER
        ]
        if is_product(facts, op):
            ratio_of_all = _scale_weights(scene, call, made, weights, wanted, scale)
            if is_fused and weights:
                scale.factor[facts.storage[made]] = ratio_of_all
            continue
        ops.append(op)
        more = [r for r in facts.rows_in(op) if r not in seen and is_new(r)]
        seen.update(more)
        todo += more
    if is_fused:
        _scale_gradients(scene, call, ops, own_numel, ratio, scale)


def _find_keys(scene: Scene, call: AttentionCall) -> list[int]:
    """Return the operand rows of K and V: what products read but for Q, the left factor of QKᵀ."""
    facts = scene.facts
    firsts = [op for op in call.ops if op not in call.seconds and is_product(facts, op)]
    queries = {factors(facts, op)[0] for op in firsts}
    return [row for row in call.key_rows if row not in queries]


def _scale_weights(
    scene: Scene, call: AttentionCall, made: int, weights: list[int], wanted: int, scale: _Scale
) -> float:
    """Scale the parameters of a product that makes K, V, both, or Q besides; return by how much."""
    width = scene.facts.signature_of(made).shape[-1]
    one = call.kv_heads * call.head_dim
    if width in (one, 2 * one):
        ratio = wanted / call.kv_heads
    elif width == 2 * one + call.heads * call.head_dim:
        ratio = (call.heads + 2 * wanted) / (call.heads + 2 * call.kv_heads)
    else:
        return 1.0
    scale.parameters |= dict.fromkeys(weights, ratio)
    return ratio


def _scale_gradients(
    scene: Scene,
    call: AttentionCall,
    ops: list[int],
    own_numel: set[int],
    ratio: float,
    scale: _Scale,
) -> None:
    facts = scene.facts
    rows = [r for op in scene.ops_differentiating(ops) for r in facts.rows_out(op)]
    for op in scene.ops_differentiating(call.ops):
        rows += list(facts.rows_out(op))[1:3]  # dQ, dK, dV
    for row in rows:
        if facts.signature_of(row).numel in own_numel:
            scale.factor[facts.storage[row]] = ratio


def _scale_owned(scene: Scene, scale: _Scale) -> None:
    """Scale parameters with their gradients and what the optimizer keeps of each."""
    for storage, ratio in scale.parameters.items():
        scale.factor[storage] = ratio
    for gradient, parameter in find_gradient_storages(scene.facts).items():
        scale.factor[gradient] = scale.parameters.get(parameter, scale.factor[gradient])
    identities = scene.facts.stored.table("identities")
    for storage, role, owner in zip(
        *(identities[name].to_pylist() for name in ("storage", "role", "owner")), strict=True
    ):
        is_kept = role in (Role.GRADIENT, Role.OPTIMIZER_STATE)
        # What has one element is a count of steps.
        if is_kept and owner in scale.parameters and _count_elements(scene, storage) != 1:
            scale.factor[storage] = scale.parameters[owner]


def _count_elements(scene: Scene, storage: int) -> int:
    """Return how many elements a storage was made with, or 0 if nobody saw it."""
    row = int(scene.facts.birth_row[storage])
    return scene.facts.signature_of(row).numel if row >= 0 else 0
