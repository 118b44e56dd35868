"""Written-out attention with less between QKᵀ and PV: no dropout, no float32."""

import re
from collections.abc import Iterable

from attnprof.analysis.what_if.fused import MATH_SOFTMAX, replay_fused, sort_layers
from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene, count_words
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import ITEM_BYTES
from attnprof.vocabulary import AttentionKind, Category

_NOISE = re.compile(r"bernoulli")
_DROPOUT = re.compile(r"dropout")


def turn_dropout_off(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Turn dropout on attention weights off.

    Its mask and the dropped copy never exist: PV reads the softmax result, which is kept for as
    long as the copy was, and so with their gradients. Where `scaled_dot_product_attention` took
    the math path on the CPU for the sake of dropout, it is fused then.
    """
    calls = [call for call in scene.calls if call.has_dropout]
    if not calls:
        raise DoesNotApply("no attention weights are dropped out")
    layers = tuple(dict.fromkeys(call.layer for call in calls))
    fusible, _ = sort_layers(scene, without_dropout=True)
    fused = [
        c for c in calls if scene.is_on_cpu and c.backend == MATH_SOFTMAX and c.layer in fusible
    ]
    fuses = {id(call) for call in fused}
    links, noise = _find_dropout(scene, [call for call in calls if id(call) not in fuses])
    result = table.drop(scene.is_storage(table, noise)).elide(links)
    if fused:
        result = replay_fused(scene, result, fused)
    held = scene.say_share(scene.size_at_peak(Category.SOFTMAX, layers=layers))
    then = "; without dropout, scaled_dot_product_attention is fused" if fused else ""
    change = Change(
        title="No dropout on attention weights",
        evidence=f"{count_words(len(layers), 'layer')} keep a dropout mask and a dropped copy "
        f"beside the softmax result, {held} of the peak in all{then}",
        how="attention_dropout=0.0 in the model's configuration (attn_pdrop, "
        "attention_probs_dropout_prob), or dropout_p=0.0",
        layers=layers,
    )
    return result, change


def _find_dropout(scene: Scene, calls: Iterable[AttentionCall]) -> tuple[dict[int, int], set[int]]:
    """Return what is read in place of each dropped copy, and the storages of the noise."""
    facts = scene.facts
    noise: set[int] = set()
    links: dict[int, int] = {}
    for call in calls:
        dropping = []
        for op in sorted(call.softmax_ops):
            name = facts.short_names[facts.code[op]]
            outs = [int(facts.storage[r]) for r in facts.rows_out(op)]
            sources = scene.storages_of(facts.rows_in(op))
            if _NOISE.search(name) or (sources and sources <= noise):
                noise.update(outs)
            elif _DROPOUT.search(name) and len(outs) > 1:  # returns the copy and the mask
                noise.update(outs[1:])
                dropping.append(op)
            elif noise & sources and not noise & set(outs):
                dropping.append(op)
        links |= _link_first(scene, dropping, noise)
        links |= _link_first(scene, scene.ops_differentiating(dropping), noise)
    return links, noise


def _link_first(scene: Scene, ops: list[int], besides: set[int]) -> dict[int, int]:
    """Return, per new storage that an op returns first, the first operand that it was made from."""
    facts = scene.facts
    links = {}
    for op in ops:
        sources = [s for r in facts.rows_in(op) if (s := int(facts.storage[r])) not in besides]
        for row in facts.rows_out(op)[:1]:
            made = int(facts.storage[row])
            if sources and facts.born_by[made] == op:
                links[made] = sources[0]
    return links


def narrow_softmax(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Compute the softmax in the dtype of Q and K instead of float32.

    Scores and results in float32 take two bytes per element, and the casts to it and back never
    exist, nor do those of their gradients.
    """
    calls = [call for call in scene.calls if _is_upcast(scene, call)]
    if not calls:
        raise DoesNotApply("no softmax is wider than Q and K")
    layers = tuple(dict.fromkeys(call.layer for call in calls))
    wide = table.is_of(Category.SOFTMAX, Category.ATTENTION_SCORES)
    wide &= scene.is_in_layers(table, layers) & (scene.item_bytes[table.block] == 4)
    links: dict[int, int] = {}
    for call in calls:
        casts = [
            op
            for op in call.score_ops | call.softmax_ops
            if scene.facts.short_names[scene.facts.code[op]] == "_to_copy"
        ]
        links |= _link_first(scene, casts, set())
        links |= _link_first(scene, scene.ops_differentiating(casts), set())
    held = scene.say_share(scene.size_at_peak(Category.SOFTMAX, layers=layers))
    change = Change(
        title="The softmax in the dtype of Q and K",
        evidence=f"{count_words(len(layers), 'layer')} multiply in 16 bits but take the softmax "
        f"in float32, whose results hold {held} of the peak",
        how="torch.softmax(scores, dim=-1) without dtype=torch.float32; it is less precise, which "
        "fused attention is not",
        layers=layers,
    )
    return table.resize(wide, table.size_bytes // 2).elide(links), change


def _is_upcast(scene: Scene, call: AttentionCall) -> bool:
    if call.kind in (AttentionKind.FUSED, AttentionKind.OPAQUE) or not call.result_rows:
        return False
    first = scene.facts.signature_of(scene.facts.rows_out(call.ops[0])[0])
    return call.dtype == "float32" and first.item_bytes == ITEM_BYTES["bfloat16"]
