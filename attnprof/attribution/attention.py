"""Attention calls: which ops make scores, which make softmax, what is kept on the way."""

import math
import re
from dataclasses import dataclass, field

from attnprof.attribution.axes import FEATURE, LEFT, RIGHT, TOKEN, Bits
from attnprof.attribution.facts import Facts, Signature
from attnprof.attribution.flow import Flow
from attnprof.attribution.pairs import Pair, Pattern
from attnprof.attribution.paths import common_path
from attnprof.attribution.products import CONVOLUTIONS, factors, is_product
from attnprof.vocabulary import AttentionKind

_FUSED = re.compile(
    r"scaled_dot_product_(?!.*(math|backward))|flash_attn|flash_attention|efficient_attention"
    r"|cudnn_attention|flex_attention|fmha|mem_eff|sdpa_fwd"
)
_OPAQUE = re.compile(r"_native_multi_head_attention|_transformer_encoder_layer_fwd")
_SOFTMAX = re.compile(r"softmax")
_DROPOUT = re.compile(r"dropout|bernoulli")


@dataclass(slots=True)
class AttentionCall:
    """One call of one attention layer, as the ops show it."""

    kind: AttentionKind
    layer: str
    ops: list[int]
    """All its ops: products, what lies between, what passes by; ascending."""
    score_ops: set[int] = field(default_factory=set)
    """From the first product up to the normaliser's input."""
    softmax_ops: set[int] = field(default_factory=set)
    """From the normaliser to the second product."""
    seconds: set[int] = field(default_factory=set)
    result_rows: list[int] = field(default_factory=list)
    """Output rows of the normaliser: the softmax results."""
    path_rows: list[int] = field(default_factory=list)
    """Output rows on the way from the first product to the second, as large as scores."""
    mask_rows: list[int] = field(default_factory=list)
    """Operand rows of masks and biases broadcast against the scores."""
    softmax_rows: list[int] = field(default_factory=list)
    """Operand rows joined with the normalised scores, such as a dropout mask made elsewhere."""
    io_rows: list[int] = field(default_factory=list)
    """Operand rows of Q, K, V and the output."""
    key_rows: list[int] = field(default_factory=list)
    """Of `io_rows`, the operands that may hold K or V."""
    pattern: Pattern | None = None
    """What the first product makes; None for single ops."""
    is_recompute: bool = False
    has_normaliser: bool = False
    has_dropout: bool = False
    batch: int = 0
    heads: int = 0
    kv_heads: int = 0
    q_len: int = 0
    k_len: int = 0
    head_dim: int = 0
    dtype: str = ""
    backend: str = ""
    """The op that did it: the normaliser's or the fused op's name."""


def find_calls(facts: Facts, flow: Flow) -> list[AttentionCall]:
    """Return all attention calls of a run, in program order."""
    read = (_read_pair(facts, flow, pair) for pair in flow.pairs())
    # Mixing with a fixed set of slots (experts, streams) looks like low-rank attention but for
    # the softmax between the products.
    calls = [c for c in read if c.has_normaliser or c.pattern is not Pattern.LOW_RANK]
    calls += _find_single_ops(facts, flow)
    return sorted(calls, key=lambda call: call.ops[0])


def _read_pair(facts: Facts, flow: Flow, pair: Pair) -> AttentionCall:
    root = flow.find_pair(flow.pair_of[facts.rows_out(pair.firsts[0])[0]])
    path = _walk_path(facts, flow, pair, root)
    ops = sorted({*pair.firsts, *pair.between, *pair.beside, *(op for op, _ in pair.seconds)})
    named = [op for op in ops if op not in pair.beside]
    layer = common_path([facts.module_paths[facts.op_module[op]] for op in named])
    call = AttentionCall(AttentionKind.LINEAR, layer, ops)
    call.pattern = pair.pattern
    call.seconds = {op for op, _ in pair.seconds}
    call.is_recompute = bool(facts.is_recompute[ops[0]])
    for op in sorted(set(pair.firsts) - call.seconds):
        call.key_rows += factors(facts, op)
    for op, row in pair.seconds:
        call.key_rows.append(next(r for r in factors(facts, op) if r != row))
        call.io_rows.append(facts.rows_out(op)[0])
    call.io_rows += call.key_rows
    if pair.pattern is Pattern.STATE:
        call.path_rows = [row for op in sorted(path) for row in facts.rows_out(op)]
        return call
    stages = _split_at_normaliser(facts, pair, path, sorted(path | {*pair.firsts}))
    call.score_ops, call.softmax_ops, normalisers, call.has_normaliser = stages
    _add_side_ops(facts, pair, call)
    call.result_rows = [facts.rows_out(op)[0] for op in normalisers]
    size = facts.signature_of(call.result_rows[0]).numel
    call.path_rows = [
        row
        for op in sorted(path)
        for row in facts.rows_out(op)
        if row in flow.pair_of
        and flow.find_pair(flow.pair_of[row]) == root
        and (op not in pair.aside or facts.signature_of(row).numel == size)
    ]
    call.has_dropout = any(
        _DROPOUT.search(facts.short_names[facts.code[op]]) for op in call.softmax_ops
    )
    call.backend = facts.short_names[facts.code[normalisers[0]]]
    _read_shapes(facts, flow, pair, call)
    _find_masks(facts, flow, call, root)
    return call


def _walk_path(facts: Facts, flow: Flow, pair: Pair, root: int) -> set[int]:
    """Return the ops from first products to second ones, first ones included."""
    todo = [int(facts.producer_row[row]) for _, row in pair.seconds]
    path: set[int] = set()
    while todo:
        row = todo.pop()
        number = flow.pair_of.get(row)
        if number is None or flow.find_pair(number) != root:
            continue
        op = int(facts.row_op[row])
        if op not in path:
            path.add(op)
            todo.extend(int(facts.producer_row[r]) for r in facts.rows_in(op))
    return path


def _split_at_normaliser(
    facts: Facts, pair: Pair, path: set[int], ops: list[int]
) -> tuple[set[int], set[int], list[int], bool]:
    """Split the ops between two products into scores and softmax; return the normalisers too.

    The normaliser is the softmax where there is one, else an exponential with the division that
    follows, else a sigmoid. If there is none, what enters the second product is normalised.
    """
    names = {op: facts.short_names[facts.code[op]] for op in ops}
    found = True
    starts = [op for op in ops if _SOFTMAX.search(names[op])]
    results = starts
    if not starts:
        starts = [op for op in ops if names[op] in ("exp", "exp_", "exp2")]
        divisions = [op for op in ops if starts and op > starts[0] and names[op] in ("div", "div_")]
        results = divisions[:1] or starts[-1:]
    if not starts:
        starts = results = [op for op in ops if names[op] in ("sigmoid", "sigmoid_")]
    if not starts:
        found = False
        entering = {int(facts.row_op[facts.producer_row[row]]) for _, row in pair.seconds}
        starts = results = sorted(entering & path) or ops[-1:]
    after: set[int] = set()
    for op in ops:
        made_from = {int(facts.row_op[facts.producer_row[r]]) for r in facts.rows_in(op)}
        if op in starts or (made_from & after and op not in pair.firsts):
            after.add(op)
    return set(ops) - after, after, results, found


def _add_side_ops(facts: Facts, pair: Pair, call: AttentionCall) -> None:
    """Sort what passes by, and what is not consumed, into the stage it was made from."""
    for op in sorted({*pair.between, *pair.beside} - call.score_ops - call.softmax_ops):
        made_from = {int(facts.row_op[facts.producer_row[r]]) for r in facts.rows_in(op)}
        (call.softmax_ops if made_from & call.softmax_ops else call.score_ops).add(op)


def _read_shapes(facts: Facts, flow: Flow, pair: Pair, call: AttentionCall) -> None:
    """Read B, H, Tq, Tk and D from the softmax result and the operands of the first product."""
    row = call.result_rows[0]
    signature, bits = flow.written(row)
    second, operand = pair.seconds[0]
    left_factor, _ = factors(facts, second)
    consumed = flow.bits_of_input(operand)
    contracted = consumed[-1] if operand == left_factor else consumed[-2]
    key_side = contracted & (LEFT | RIGHT) or RIGHT
    key_dims = _find_key_dims(bits, key_side)
    q_len, k_len, rest, key_bits, query_bits = 1, 1, [], 0, 0
    for dim, (size, bit) in enumerate(zip(signature.shape, bits, strict=True)):
        if dim in key_dims:
            k_len *= size
            key_bits |= bit
        elif bit & (LEFT | RIGHT):
            q_len *= size
            query_bits |= bit
        elif size > 1:
            rest.append((size, bit))
    principal = next((op for op in pair.firsts if op not in pair.aside), pair.firsts[0])
    first_left, first_right = factors(facts, principal)
    head_dim = facts.signature_of(first_left).shape[-1]
    heads = 1
    for size, bit in rest:
        if bit & FEATURE:  # in (B*H, Tq, Tk) not all of it
            found = _count_merged_heads(facts, flow, first_left, size)
            heads *= found or (size if bit == FEATURE else 1)
    call.q_len, call.k_len, call.head_dim, call.heads = q_len, k_len, head_dim, heads
    call.batch = max(1, signature.numel // max(1, q_len * k_len * heads))
    if len(signature.shape) == 4:
        call.batch, call.heads = (
            signature.shape[0],
            signature.numel // max(1, q_len * k_len * signature.shape[0]),
        )
    call.dtype = signature.dtype
    # Columns that only take part in the softmax (an attention sink) meet no value.
    met = facts.signature_of(operand).shape[-1 if operand == left_factor else -2]
    call.k_len = min(call.k_len, met)
    keys = first_right if key_side == RIGHT else first_left
    repeats = _count_repeats(facts, keys)
    # Where heads share K in the product itself, K is as much smaller.
    shared = facts.signature_of(keys).numel // repeats
    shared //= max(1, call.batch * call.k_len * call.head_dim)
    is_shared = 0 < shared <= call.heads and call.heads % shared == 0
    call.kv_heads = shared if is_shared else max(1, call.heads // repeats)
    fixed_keys = key_bits & TOKEN == 0 and key_bits & FEATURE and not query_bits & FEATURE
    call.kind = AttentionKind.LOW_RANK if fixed_keys else _name_kind(facts, call, keys)


def _count_merged_heads(facts: Facts, flow: Flow, row: int, merged: int) -> int:
    """Return how many heads are in a dimension of batch and heads together, or 0 if unknown.

    Read off the memory of Q: of the dimensions it was written with, those that are features and
    lie within the merged dimension.
    """
    for _ in range(6):
        read, made = facts.signature_of(row), int(facts.producer_row[row])
        bits = flow.bits.get(made)
        if bits is None or not read.shape or read.shape[0] != merged:
            return 0
        written = facts.signature_of(made)
        if written.shape != read.shape:
            return _count_overlap(read, written, bits, merged)
        op = int(facts.row_op[made])  # element by element, on the merged view: look further back
        same = [r for r in facts.rows_in(op) if facts.signature_of(r).shape == read.shape]
        if not same or is_product(facts, op):
            return 0
        row = same[0]
    return 0


def _count_overlap(read: Signature, written: Signature, bits: Bits, merged: int) -> int:
    begin, end = read.stride[0], read.stride[0] * merged
    heads = 1
    for size, stride, bit in zip(written.shape, written.stride, bits, strict=True):
        if bit == FEATURE and size > 1:
            heads *= max(1, min(end, stride * size) // max(begin, stride))
    return heads


def _find_key_dims(bits: Bits, key_side: int) -> set[int]:
    """Return which dimensions of a softmax result run over keys.

    Where a band was cut out of a matrix by skewing it, its dimensions stem from both sides; the
    last one then runs over the band.
    """
    of_keys = {i for i, bit in enumerate(bits) if bit & (LEFT | RIGHT) == key_side}
    mixed = [i for i, bit in enumerate(bits) if bit & (LEFT | RIGHT) == LEFT | RIGHT]
    return of_keys or set(mixed[-1:])


def _count_repeats(facts: Facts, row: int) -> int:
    """Return how often K's heads were repeated to match Q's (grouped-query attention)."""
    repeats = 1
    for _ in range(8):
        signature = facts.signature_of(row)
        repeats *= _count_expanded(signature)
        made = int(facts.producer_row[row])
        if made < 0 or is_product(facts, int(facts.row_op[made])):
            break
        op = int(facts.row_op[made])
        inputs = facts.rows_in(op)
        if len(inputs) != 1 and facts.short_names[facts.code[op]] not in _GATHERS:
            break
        row = inputs[0]
        # An expanded view is copied in full: what its strides say must not be counted again.
        source = facts.signature_of(row)
        held = max(1, source.numel // _count_expanded(source))
        written = facts.signature_of(made).numel
        if written % held == 0 and _count_expanded(source) == 1:
            repeats *= written // held
    return repeats


_GATHERS = frozenset({"index_select", "index", "repeat_interleave"})


def _count_expanded(signature: Signature) -> int:
    """Return how often a view shows each element, by its dimensions of stride 0."""
    return math.prod(
        size
        for size, stride in zip(signature.shape, signature.stride, strict=True)
        if stride == 0 and size > 1
    )


def _name_kind(facts: Facts, call: AttentionCall, keys: int) -> AttentionKind:
    """Tell full score matrices from bands, windows and low-rank ones."""
    if len(call.result_rows) > 1:  # landmarks: the softmaxes differ in shape
        shapes = {facts.signature_of(row).numel for row in call.result_rows}
        if len(shapes) > 1:
            return AttentionKind.LOW_RANK
    tokens = _count_tokens(facts, keys, call)
    scores = facts.signature_of(call.result_rows[0]).numel
    queries = call.batch * call.heads * call.q_len
    if tokens and queries and scores < queries * tokens:
        return AttentionKind.BANDED
    return AttentionKind.MATERIALISED


def _count_tokens(facts: Facts, keys: int, call: AttentionCall) -> int:
    """Return how many tokens the layer's keys cover, or 0 if that cannot be told.

    Counted in the module call that contains the whole layer: the leading dimension of its input
    is the batch.
    """
    outer = _outer_batch(facts, call.ops[0])
    if not outer:
        return 0
    row = keys
    for _ in range(12):
        made = int(facts.producer_row[row])
        if made < 0:
            break
        op = int(facts.row_op[made])
        if is_product(facts, op):
            signature = facts.signature_of(made)
            is_convolution = facts.short_names[facts.code[op]] in CONVOLUTIONS
            width = signature.shape[1 if is_convolution else -1]
            return signature.numel // width // outer if width else 0
        inputs = facts.rows_in(op)
        if not len(inputs):
            break
        row = max(inputs, key=lambda r: facts.signature_of(r).numel)
    return 0


def _outer_batch(facts: Facts, op: int) -> int:
    """Return the batch size of the outermost forward that ``op`` ran in, or 0 if unknown."""
    scope = int(facts.scope[op])
    batch: int = facts.batch_of_scope.get(scope, 0)
    return batch


def _find_masks(facts: Facts, flow: Flow, call: AttentionCall, root: int) -> None:
    own = call.score_ops | call.softmax_ops
    products = set(call.seconds)
    for op in sorted(own):
        skip = set(factors(facts, op)) if is_product(facts, op) else set()
        if op in products:
            continue
        for row in facts.rows_in(op):
            made = int(facts.producer_row[row])
            if row in skip or (made >= 0 and int(facts.row_op[made]) in own):
                continue
            if facts.signature_of(row).numel >= max(2, call.k_len):
                (call.softmax_rows if op in call.softmax_ops else call.mask_rows).append(row)


def _find_single_ops(facts: Facts, flow: Flow) -> list[AttentionCall]:
    """Return the calls that are one op: fused kernels, and whole layers in one op."""
    fused = [bool(_FUSED.search(n)) and "backward" not in n for n in facts.short_names]
    opaque = [bool(_OPAQUE.search(n)) for n in facts.short_names]
    calls = []
    for op in range(facts.count) if any(fused) or any(opaque) else ():
        code = facts.code[op]
        if (fused[code] or opaque[code]) and not facts.is_backward[op]:
            layer = facts.module_paths[facts.op_module[op]]
            kind = AttentionKind.FUSED if fused[code] else AttentionKind.OPAQUE
            call = AttentionCall(kind, layer, [op], seconds={op})
            call.is_recompute = bool(facts.is_recompute[op])
            call.backend = facts.short_names[code]
            if fused[code]:
                _read_fused(facts, flow, call)
            calls.append(call)
    return calls


def _read_fused(facts: Facts, flow: Flow, call: AttentionCall) -> None:
    op = call.ops[0]
    rows = [r for r in facts.rows_in(op) if len(facts.signature_of(r).shape) >= 3]
    outs = facts.rows_out(op)
    call.io_rows = [*rows[:3], *outs]
    call.key_rows = list(rows[1:3]) or list(rows)
    call.mask_rows = [
        r
        for r in facts.rows_in(op)
        if r not in rows[:3]
        and facts.signature_of(r).numel > 1
        and len(rows) >= 3
        and len(facts.signature_of(r).shape) >= 2
    ]
    if len(rows) < 3:
        return
    q, k = facts.signature_of(rows[0]).shape, facts.signature_of(rows[1]).shape
    # torch's own kernels take (B, H, T, D); others, such as flash_attn, (B, T, H, D).
    head_at = -3 if facts.code_names[facts.code[op]].startswith("aten::") else -2
    time_at = -2 if head_at == -3 else -3
    call.batch, call.head_dim, call.dtype = q[0], q[-1], facts.signature_of(rows[0]).dtype
    call.heads, call.kv_heads = q[head_at], k[head_at]
    call.q_len, call.k_len = q[time_at], k[time_at]
