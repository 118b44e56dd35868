"""Batch, heads, lengths and kind of an attention call, read off its products."""

import math

from attnprof.attribution.axes import FEATURE, LEFT, RIGHT, SIDES, TOKEN, Bits
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts, Signature
from attnprof.attribution.flow import Flow
from attnprof.attribution.layouts import Layout
from attnprof.attribution.origins import Origin
from attnprof.attribution.pairs import Pair
from attnprof.attribution.products import factors, is_product
from attnprof.vocabulary import AttentionKind

_GATHERS = frozenset({"index_select", "index", "repeat_interleave"})
_FARTHEST = 16
"""Ops between a projection and queries: rotations, padding, windows, copies."""


def read_shapes(facts: Facts, flow: Flow, pair: Pair, call: AttentionCall) -> None:
    """Read B, H, Tq, Tk and D from the softmax result and the operands of the first product."""
    row = call.result_rows[0]
    signature, bits = _choose_layout(facts, flow, row)
    second, operand = pair.seconds[0]
    left_factor, right_factor = factors(facts, second)
    consumed = flow.bits_of_input(operand)
    contracted = consumed[-1] if operand == left_factor else consumed[-2]
    columns = facts.signature_of(operand).shape[-1 if operand == left_factor else -2]
    key_side = contracted & SIDES or (RIGHT if pair.sides == SIDES else pair.sides)
    if columns == 1 and is_product(facts, second):  # a single key leaves no bit
        key_side = SIDES & ~pair.sides or RIGHT
    sided = _find_key_dims(bits, key_side)
    key_dims = sided
    if is_product(facts, second):
        key_dims = _choose_contracted(sided, signature.shape, columns)
    bits = tuple(b & ~SIDES if i in sided - key_dims else b for i, b in enumerate(bits))
    q_len, k_len, rest, key_bits, query_bits = 1, 1, [], 0, 0
    for dim, (size, bit) in enumerate(zip(signature.shape, bits, strict=True)):
        if dim in key_dims:
            k_len *= size
            key_bits |= bit
        elif bit & (LEFT | RIGHT):
            q_len *= size
            query_bits |= bit
        elif size > 1 and not bit and dim == len(bits) - 2 and q_len == 1:
            q_len = size  # queries that were asked one after the other
        elif size > 1:
            rest.append((size, bit))
    principal = _choose_principal(facts, pair, key_side)
    first_left, first_right = factors(facts, principal)
    head_dim = facts.signature_of(first_left).shape[-1]
    call.q_len, call.k_len, call.head_dim = q_len, k_len, head_dim
    is_merged = len(signature.shape) < 4
    call.heads = _count_heads(facts, flow, first_left if is_merged else -1, rest)
    # Data handed in as (B, H, T, D), without projections, is all tokens but for the last dimension.
    is_clear = all(b in (TOKEN, FEATURE) for _, b in rest) and (
        any(b == FEATURE for _, b in rest) or _is_projected(facts, flow, first_left)
    )
    of_tokens = key_dims | {i for i, bit in enumerate(bits) if bit & (LEFT | RIGHT)}
    if len(signature.shape) == 4 and not is_clear and 0 not in of_tokens:
        call.heads = signature.numel // max(1, q_len * k_len * signature.shape[0])
    call.batch = max(1, signature.numel // max(1, q_len * k_len * call.heads))
    call.dtype = signature.dtype
    call.k_len = min(call.k_len, _count_met(facts, pair, call))
    is_left = operand == left_factor
    values = facts.signature_of(right_factor if is_left else left_factor).shape
    call.value_dim = values[-1 if is_left else -2]
    call.keys_row = first_right if key_side == RIGHT else first_left
    made = facts.signature_of(facts.rows_out(principal)[0]).shape
    _count_kv_heads(facts, flow, call, made[-1 if key_side == RIGHT else -2])
    fixed_keys = key_bits & TOKEN == 0 and key_bits & FEATURE and not query_bits & FEATURE
    # With landmarks the softmaxes differ in shape.
    sizes = {facts.signature_of(row).numel for row in call.result_rows}
    is_low_rank = fixed_keys or (pair.is_chain and len(sizes) > 1)
    call.kind = AttentionKind.LOW_RANK if is_low_rank else AttentionKind.MATERIALISED


def _count_kv_heads(facts: Facts, flow: Flow, call: AttentionCall, columns: int) -> None:
    """Read the heads of K from its size, and how often they are repeated.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        call: The call, but for these.
        columns: How many keys the first product meets.
    """
    repeats = call.key_repeats = count_repeats(facts, call.keys_row)
    # Where heads share K in the product itself, K is as much smaller.
    heads = facts.signature_of(call.keys_row).numel // repeats
    heads //= max(1, call.batch * min(call.k_len, columns) * call.head_dim)
    if repeats > 1:
        heads = _count_repeated_heads(facts, flow, call.keys_row, call.head_dim) or heads
    is_shared = 0 < heads <= call.heads and call.heads % heads == 0
    call.kv_heads = heads if is_shared else max(1, call.heads // repeats)


def _is_projected(facts: Facts, flow: Flow, row: int) -> bool:
    """Return whether the tensor in an input row was made by a projection, not long before."""
    for _ in range(_FARTHEST):
        made = int(facts.producer_row[row])
        rows = facts.rows_in(int(facts.row_op[made])) if made >= 0 else range(0)
        own = [r for r in rows if flow.origin_of_input(r) is Origin.ACTIVATION]
        if not own:
            return False
        if is_product(facts, int(facts.row_op[made])) and len(own) < len(rows):
            return True
        row = max(own, key=lambda r: facts.signature_of(r).numel)
    return False


def _choose_principal(facts: Facts, pair: Pair, key_side: int) -> int:
    """Return the first product that shapes are read off: of several, that with the most keys.

    Others may be those of global tokens, or a bias without heads. With landmarks it is the first,
    which queries are in.
    """
    firsts = [op for op in pair.firsts if op not in pair.aside] or pair.firsts
    if pair.is_chain:
        return firsts[0]

    def count_keys(op: int) -> tuple[int, int]:
        left, right = factors(facts, op)
        keys = facts.signature_of(right if key_side == RIGHT else left).numel
        depth = facts.signature_of(left).shape[-1]
        return keys // max(1, depth), facts.signature_of(facts.rows_out(op)[0]).numel

    return max(firsts, key=count_keys)


def _count_met(facts: Facts, pair: Pair, call: AttentionCall) -> int:
    """Return how many columns of a softmax result meet values.

    Those that only take part in the softmax (an attention sink) meet none. Pieces with all rows may
    meet values of their own, as of global and of local tokens; other pieces are of some rows.
    """
    rows = facts.signature_of(call.result_rows[0]).numel // max(1, call.k_len)
    met, together = [], 0
    for op, row in pair.seconds:
        read = facts.signature_of(row)
        columns = read.shape[-1 if row == factors(facts, op)[0] else -2]
        if not is_product(facts, op):  # written out: the last dimension is that of features
            columns = call.k_len
        met.append(columns)
        if read.numel == rows * columns:
            together += columns
    is_whole = len(call.result_rows) == 1 and max(met) < together <= call.k_len
    return together if is_whole else max(met)


def _choose_contracted(dims: set[int], shape: tuple[int, ...], size: int) -> set[int]:
    """Return those dimensions that a second product contracts, of so many keys.

    Where no sequence has queries of its own, the first product may have taken all keys of all
    sequences for its columns.
    """
    chosen: set[int] = set()
    reached = 1
    for dim in sorted(dims, reverse=True):
        if reached * shape[dim] <= size:
            chosen.add(dim)
            reached *= shape[dim]
    return chosen if reached == size else dims


def _count_heads(facts: Facts, flow: Flow, queries: int, rest: list[tuple[int, int]]) -> int:
    """Return the product of the dimensions, beside those of Q and K, that stem from features.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        queries: The operand row of Q if batch and heads may be one dimension, else -1.
        rest: Size and bits of these dimensions.
    """
    heads = 1
    for size, bit in rest:
        if bit & FEATURE:  # in (B*H, Tq, Tk) not all of it
            merged = 0 if queries < 0 else _count_merged_heads(facts, flow, queries, size)
            heads *= merged or (size if bit == FEATURE else 1)
    return heads


def _choose_layout(facts: Facts, flow: Flow, row: int) -> Layout:
    """Return the shape of a softmax result and its bits, unfolded where that says more."""
    as_is = facts.signature_of(row), flow.bits[row]
    unfolded = flow.written(row)
    is_clear = len(as_is[1]) >= 4 and not any(b & TOKEN and b & FEATURE for b in as_is[1])
    is_unknown = any(
        size > 1 and not bit for size, bit in zip(unfolded[0].shape, unfolded[1], strict=True)
    )
    return as_is if is_clear or is_unknown else unfolded


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


def count_repeats(facts: Facts, row: int) -> int:
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


def _count_repeated_heads(facts: Facts, flow: Flow, row: int, head_dim: int) -> int:
    """Return how many heads K has where it is repeated, for other heads or sequences; 0 if unknown.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        row: The input row of the first product that K is in.
        head_dim: The features of a head.
    """
    for _ in range(8):
        if _count_expanded(facts.signature_of(row)) > 1:
            break
        made = int(facts.producer_row[row])
        op = int(facts.row_op[made])
        inputs = facts.rows_in(op)
        if made < 0 or not inputs or is_product(facts, op):
            return 0
        row = inputs[0]
        if facts.signature_of(made).numel > facts.signature_of(row).numel:
            break
    else:
        return 0
    bits, shape = flow.bits_of_input(row), facts.signature_of(row).shape
    features = math.prod(s for s, bit in zip(shape, bits, strict=True) if bit == FEATURE)
    is_clear = not any(bit & FEATURE and bit & TOKEN for bit in bits)
    # Of K that the program was given, and did not project, all but the last dimension is tokens.
    is_known = is_clear and features > head_dim > 0 and features % head_dim == 0
    return features // head_dim if is_known else 0


def _count_expanded(signature: Signature) -> int:
    """Return how often a view shows each element, by its dimensions of stride 0."""
    return math.prod(
        size
        for size, stride in zip(signature.shape, signature.stride, strict=True)
        if stride == 0 and size > 1
    )
