"""Fused attention: no score matrix reaches memory."""

import math
from bisect import bisect_left

import numpy as np

from attnprof.analysis.what_if.lineage import Source
from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene, count_words
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.pairs import Pattern
from attnprof.attribution.products import is_distance, is_product
from attnprof.vocabulary import AttentionKind, Category, Phase

_COPIES = frozenset({"clone", "_to_copy", "copy"})
"""Ops whose result is nothing but the values of their operand."""
_KERNEL_DIMS = 4
"""Kernels read (B, H, T, D), with any strides."""
_INVERSIONS = frozenset({"bitwise_not", "logical_not"})
_SCALINGS = frozenset({"mul", "div"})
"""With a scalar: kernels scale Q·Kᵀ themselves."""
_LSE_BYTES = 4
"""Fused kernels keep the log-sum-exp of each query row in float32, whatever Q is:
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/attention.cpp"""
NOT_MULTIPLIED = {
    Pattern.SUMS: "scores are sums of queries and keys, and fused kernels multiply them",
    Pattern.LEARNED: "scores are made without keys, and fused kernels multiply queries by keys",
}
"""What makes scores that no fused kernel can make."""
MATH_SOFTMAX = "_safe_softmax"
"""The softmax of `scaled_dot_product_attention` where no fused kernel takes its arguments."""


def fuse_attention(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Replace written-out attention by `scaled_dot_product_attention` and a fused kernel.

    - Scores and softmax results of materialised layers never exist. Where backward needs a softmax
      result, its log-sum-exp is kept: B·H·Tq floats.
    - A mask made from constants is taken for the causal one and vanishes. One made from the batch,
      or of a window, stays; where it was boolean, the kernel's float copy of it is kept per call.
    - Q, K and V are read where they lie: copies made only to multiply them never exist, nor do
      repeated heads of K and V, but for calls with a mask, which fused kernels refuse to group.

    Known limitations:
        The kernel's own workspace is not known to a run that never called it; it is not added.
        A program that reads the attention weights has none afterwards.
    """
    takes, refused = sort_layers(scene, without_dropout="no_attention_dropout" in options.applied)
    if not takes:
        raise DoesNotApply(_explain(scene, refused))
    calls = [call for of_layer in takes.values() for call in of_layer]
    layers = tuple(takes)
    held = scene.size_at_peak(*_SCORES, layers=layers)
    held += scene.size_at_peak(Category.ATTENTION_MASK)
    assumes = [_ASSUMES[s] for s in Source if any(scene.masks.source_of(c) is s for c in calls)]
    odd = _find_other_ops(scene, calls)
    if odd:
        assumes.append(f"{odd} of the scores is done inside the kernel, as flex_attention can")
    if refused:
        stay = count_words(len(refused), "layer")
        assumes.append(f"{stay} cannot be fused: {'; '.join(sorted({*refused.values()}))}")
    change = Change(
        title="Fused attention",
        evidence=f"{count_words(len(layers), 'layer')} write out scores and softmax, which hold "
        f"{scene.say_share(held)} of the peak with their masks",
        how=_say_how(scene, calls, has_odd_ops=bool(odd)),
        layers=layers,
        assumes=tuple(assumes),
        exact=not odd and _ASSUMES[Source.PARAMETERS] not in assumes,
    )
    return replay_fused(scene, table, calls), change


_SCORES = (Category.ATTENTION_SCORES, Category.SOFTMAX)
_ASSUMES = {
    Source.CONSTANTS: "masks made from constants are causal, so is_causal=True stands for them",
    Source.WINDOW: "masks of windows are still handed to the kernel",
    Source.DATA: "masks made from the batch are still handed to the kernel",
    Source.PARAMETERS: "the kernel takes a bias that needs a gradient, which is not counted",
}


def sort_layers(
    scene: Scene, *, without_dropout: bool = False
) -> tuple[dict[str, list[AttentionCall]], dict[str, str]]:
    """Return the layers whose attention can be fused with their calls, and why others cannot.

    Args:
        scene: The run.
        without_dropout: Attention weights are not dropped out.
    """
    takes: dict[str, list[AttentionCall]] = {}
    refused: dict[str, str] = {}
    for call in scene.calls:
        if call.kind not in (AttentionKind.MATERIALISED, AttentionKind.BANDED):
            continue
        why = _find_obstacle(scene, call, without_dropout=without_dropout)
        if why:
            refused[call.layer] = why
        takes.setdefault(call.layer, []).append(call)
    return {layer: calls for layer, calls in takes.items() if layer not in refused}, refused


def _find_obstacle(scene: Scene, call: AttentionCall, *, without_dropout: bool) -> str:
    """Return why no fused kernel could do a call, or nothing.

    What the CPU's kernel refuses:
    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/sdp_utils_cpp.cpp
    """
    if call.pattern in NOT_MULTIPLIED:
        return NOT_MULTIPLIED[call.pattern]
    if any(is_distance(scene.facts, op) for op in call.firsts):
        return "scores are distances, and fused kernels multiply queries by keys"
    if "softmax" not in call.backend:
        return f"scores are normalised by {call.backend}, and fused kernels know only the softmax"
    if changing := _find_changes(scene, call):
        return f"{changing} comes between the softmax and V, and fused kernels do nothing there"
    if not scene.is_on_cpu:
        return ""
    if call.has_dropout and not without_dropout:
        return "the CPU's fused kernel takes no dropout; try it with no_attention_dropout"
    is_learned = scene.masks.source_of(call) is Source.PARAMETERS
    if is_learned and scene.ops_differentiating(call.ops):
        return "a learned bias needs a gradient, which the CPU's fused kernel does not give"
    outputs = [scene.facts.signature_of(r) for op in call.seconds for r in scene.facts.rows_out(op)]
    if any(call.head_dim not in s.shape[-2:] for s in outputs):
        return "V's head dimension is not that of Q and K, which the CPU's fused kernel refuses"
    if call.kv_heads < call.heads and scene.is_torch_2_8:
        return "torch 2.8's fused kernel for the CPU takes no grouped queries; torch 2.9's does"
    return ""


_CHOOSING = frozenset({"topk", "sort", "gather", "index", "index_select", "scatter", "cumsum"})


def _find_changes(scene: Scene, call: AttentionCall) -> str:
    """Return what is done to softmax results, of what is more than to drop or to hide some."""
    facts = scene.facts
    between = sorted(call.softmax_ops - call.seconds)
    names = {facts.short_names[facts.code[op]] for op in between if is_product(facts, op)}
    names |= _CHOOSING.intersection(facts.short_names[facts.code[op]] for op in between)
    return ", ".join(sorted(names))


def _explain(scene: Scene, refused: dict[str, str]) -> str:
    if refused:
        return next(iter(refused.values()))
    kinds = ", ".join(sorted({call.kind.value for call in scene.calls}))
    return f"no layer materialises scores: attention is {kinds}" if kinds else "it has no attention"


def _find_other_ops(scene: Scene, calls: list[AttentionCall]) -> str:
    """Return what is done to scores that no argument of scaled_dot_product_attention asks for."""
    facts = scene.facts
    names = {
        facts.short_names[facts.code[facts.row_op[row]]]
        for call in calls
        for row in call.path_rows
        if int(facts.row_op[row]) in call.score_ops
    }
    return ", ".join(sorted(names & _NONLINEAR))


_NONLINEAR = frozenset({"tanh", "tanh_", "sigmoid", "exp", "relu", "clamp"})


def _say_how(scene: Scene, calls: list[AttentionCall], *, has_odd_ops: bool) -> str:
    if has_odd_ops:
        return "torch.nn.attention.flex_attention with a score_mod, under torch.compile"
    if all(call.backend == MATH_SOFTMAX for call in calls):
        return (
            "scaled_dot_product_attention is called already and takes the math path; called under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION) it says why"
        )
    fixed = any(scene.masks.source_of(call) is Source.CONSTANTS for call in calls)
    flag = ", is_causal=True" if fixed else ""
    shared = any(call.kv_heads < call.heads for call in calls)
    flag += ", enable_gqa=True" if shared else ""
    return (
        f"F.scaled_dot_product_attention(q, k, v{flag}); in transformers: "
        'attn_implementation="sdpa"'
    )


def replay_fused(scene: Scene, table: Table, calls: list[AttentionCall]) -> Table:
    """Return the table with some calls fused."""
    copies = _copy_masks(scene, table, calls)
    table = _keep_log_sum_exp(scene, table, calls)
    table = _rewrite_masks(scene, table, calls).add(copies)
    table = _read_in_place(scene, table, calls)
    return _differentiate_at_once(scene, table, calls)


def _keep_log_sum_exp(scene: Scene, table: Table, calls: list[AttentionCall]) -> Table:
    """Leave of all between QKᵀ and PV the log-sum-exp, where backward would need it."""
    size = np.zeros(scene.facts.storage_count, np.int64)
    for call in calls:
        for row in call.result_rows:
            # (B, H, Tq) floats
            size[scene.facts.storage[row]] = _LSE_BYTES * call.batch * call.heads * call.q_len
    goes = table.is_of(*_SCORES) & scene.is_in_layers(table, {call.layer for call in calls})
    saved = scene.attribution.allocations["saved"].to_numpy()[table.block]
    saved |= table.is_in(Phase.RECOMPUTE)  # a repeated forward saves what the first one did not
    small = goes & saved & (size[table.storage] > 0)
    table = table.resize(small, size[table.storage])
    return table.relabel(small, category=Category.ATTENTION_IO).drop(goes & ~small)


def _rewrite_masks(scene: Scene, table: Table, calls: list[AttentionCall]) -> Table:
    """Drop masks that stand for the causal flag, and floats made of masks that were boolean."""
    mine = {id(call) for call in calls}
    keeps: set[int] = set()
    links: dict[int, int] = {}
    inverses: set[int] = set()
    for call in scene.calls:
        for row, lineage in scene.masks.of_call(call):
            if id(call) not in mine or lineage.source is not Source.CONSTANTS:
                keeps |= lineage.storages
            if id(call) in mine and lineage.bool_storage is not None:
                links[int(scene.facts.storage[row])] = lineage.bool_storage
                inverses |= _find_inverse(scene, lineage.bool_storage)
    layers = {call.layer for call in calls}
    goes = table.is_of(Category.ATTENTION_MASK) & scene.is_in_layers(table, layers)
    goes &= ~scene.is_storage(table, keeps - inverses)
    return table.drop(goes | scene.is_storage(table, inverses)).elide(links)


def _find_inverse(scene: Scene, storage: int) -> set[int]:
    """Return the mask, if it is another's inverse: ``masked_fill`` hides what kernels show."""
    facts = scene.facts
    op = int(facts.born_by[storage])
    return {storage} if op >= 0 and facts.short_names[facts.code[op]] in _INVERSIONS else set()


def _copy_masks(scene: Scene, table: Table, calls: list[AttentionCall]) -> Table:
    """Return the float copies that kernels make of boolean masks, one per call.

    They are kept for as long as the call's softmax result was: backward needs both.
    """
    facts = scene.facts
    size = np.zeros(facts.storage_count, np.int64)
    for call in calls:
        for row, lineage in scene.masks.of_call(call):
            if lineage.source in (Source.WINDOW, Source.DATA) and lineage.bool_storage is not None:
                size[facts.storage[call.result_rows]] = _measure_mask(scene, call, row)
    copies = table.take(size[table.storage] > 0)
    everything = np.ones(len(copies), np.bool_)
    copies = copies.resize(everything, size[copies.storage])
    return copies.relabel(everything, category=Category.ATTENTION_MASK)


def _measure_mask(scene: Scene, call: AttentionCall, row: int) -> int:
    """Return the bytes of a mask in the dtype of Q, which is that of the first product."""
    facts = scene.facts
    first = facts.signature_of(facts.rows_out(call.ops[0])[0])
    mask = facts.signature_of(row)
    shown = [s for s, stride in zip(mask.shape, mask.stride, strict=True) if stride or s == 1]
    return math.prod(shown) * first.item_bytes


def _read_in_place(scene: Scene, table: Table, calls: list[AttentionCall]) -> Table:
    """Elide the copies of Q, K and V that only products read; read what they were copied from."""
    facts = scene.facts
    links: dict[int, int] = {}
    elided: list[int] = []
    for call in calls:
        may_group = scene.masks.source_of(call) in (None, Source.CONSTANTS)
        for op in _find_copying_ops(scene, call, may_group=may_group):
            links[int(facts.storage[facts.rows_out(op)[0]])] = _find_source(scene, op)
            elided.append(op)
        if call.kind is AttentionKind.BANDED:
            continue  # blocks lie between heads and tokens, and are copied to be put in order
        for op in call.seconds:  # kernels write (B, Tq, H, D), which needs no copy to be transposed
            output = int(facts.storage[facts.rows_out(op)[0]])
            links |= dict.fromkeys(_find_output_copies(scene, op), output)
    return _copy_no_gradients(scene, table.elide(links), elided)


def _find_output_copies(scene: Scene, op: int) -> list[int]:
    """Return the storages of copies of what a product returned."""
    facts = scene.facts
    return [
        int(facts.storage[row])
        for user in facts.users_of(op)
        if facts.short_names[facts.code[user]] in _COPIES and not facts.is_backward[user]
        for row in facts.rows_out(user)
    ]


def _find_copying_ops(scene: Scene, call: AttentionCall, *, may_group: bool) -> list[int]:
    """Return the ops whose results are copies of Q, K or V that only the call's products read."""
    facts = scene.facts
    own = set(call.ops)
    todo = [int(facts.storage[r]) for r in (*call.io_rows, *call.key_rows) if facts.is_input[r]]
    found: list[int] = []
    while todo:
        storage = todo.pop()
        op = int(facts.born_by[storage])
        if op < 0 or op in own or not _is_copying(scene, op, may_group=may_group):
            continue
        if call.kind is AttentionKind.BANDED and _has_blocks(scene, op):
            continue
        readers = (u for u in facts.users_of(op) if u not in own and not facts.is_backward[u])
        # A view reads nothing: what it returns is the storage itself.
        if all(facts.storage[r] == storage for u in readers for r in facts.rows_out(u)):
            found.append(op)
            own.add(op)
            todo.append(_find_source(scene, op))
    return found


def _has_blocks(scene: Scene, op: int) -> bool:
    """Return whether blocks lie beside batch and heads, which no strides of an operand express."""
    shapes = (scene.facts.signature_of(row).shape for row in scene.facts.rows_in(op))
    return any(len(shape) > _KERNEL_DIMS for shape in shapes)


def _is_copying(scene: Scene, op: int, *, may_group: bool) -> bool:
    """Return whether a fused kernel does without an op on the way to Q, K or V."""
    facts = scene.facts
    name = facts.short_names[facts.code[op]]
    tensors = [r for r in facts.rows_in(op) if facts.signature_of(r).numel > 1]
    if len(tensors) != 1 or name not in _COPIES | _SCALINGS:
        return False
    is_repeat = 0 in facts.signature_of(tensors[0]).stride
    return may_group or not is_repeat


def _find_source(scene: Scene, op: int) -> int:
    """Return the storage that a copying op reads."""
    facts = scene.facts
    return max(
        ((facts.signature_of(r).numel, int(facts.storage[r])) for r in facts.rows_in(op)),
    )[1]


def _copy_no_gradients(scene: Scene, table: Table, elided: list[int]) -> Table:
    """Elide the gradients of elided copies; those of repeated heads are as small as their sum."""
    facts = scene.facts
    links: dict[int, int] = {}
    for op in scene.ops_differentiating(elided):
        rows_in, rows_out = facts.rows_in(op), facts.rows_out(op)
        if len(rows_in) and len(rows_out):
            links[int(facts.storage[rows_out[0]])] = int(facts.storage[rows_in[0]])
    size = np.zeros(facts.storage_count, np.int64)
    size[table.storage] = table.size_bytes
    smaller = {source: size[copy] for copy, source in links.items() if size[copy] < size[source]}
    size[list(smaller)] = list(smaller.values())
    return table.resize(scene.is_storage(table, smaller), size[table.storage]).elide(links)


def _differentiate_at_once(scene: Scene, table: Table, calls: list[AttentionCall]) -> Table:
    """Keep all that a fused backward reads until it has made dQ, dK and dV, for it is one op.

    It reads the output too, which written-out attention does not keep.
    """
    facts = scene.facts
    last = np.full(facts.storage_count, -1, np.int64)
    """Per storage, the last op of the backward that reads it."""
    repeats: dict[str, list[AttentionCall]] = {call.layer: [] for call in calls}
    for call in calls:
        if call.is_recompute:
            repeats[call.layer].append(call)
    for call in calls:
        ops = scene.ops_differentiating(call.ops)
        if not ops:
            continue
        seconds = scene.ops_differentiating(call.seconds)
        rows = [r for op in seconds for r in facts.rows_in(op)]
        saved = _find_repeat(repeats[call.layer], call, before=ops[0])
        rows += [*saved.io_rows, *saved.result_rows, *facts.rows_in(saved.ops[0])]
        reads = facts.storage[rows]
        last[reads] = np.maximum(last[reads], ops[-1])
    until = table.at(scene.event_after(last))[table.storage]
    return table.hold_until(last[table.storage] >= 0, until)


def _find_repeat(
    repeats: list[AttentionCall], call: AttentionCall, *, before: int
) -> AttentionCall:
    """Return the call that checkpointing made of a call again, before its backward, or itself.

    Backward belongs to the forward that ran first, but reads what the repeated one made.

    Args:
        repeats: The repeated calls of the layer, in program order.
        call: The call.
        before: The first op of its backward.
    """
    at = bisect_left(repeats, before, key=lambda repeat: repeat.ops[0]) - 1
    return repeats[at] if at >= 0 and repeats[at].ops[0] > call.ops[-1] else call
