"""Attention that a layer's call does piece by piece: some queries, heads or sequences at a time.

Each piece is an attention call with the sizes of what it was given. What the layer's call attended
with in all shows where Q and K of all pieces lie in one tensor each: together, the pieces have them
once.
"""

import math
from dataclasses import dataclass, replace

from attnprof.attribution.axes import FEATURE, TOKEN
from attnprof.attribution.batches import Sequences
from attnprof.attribution.calls import AttentionCall, Extent
from attnprof.attribution.facts import Facts
from attnprof.attribution.flow import Flow
from attnprof.attribution.products import factors, is_product
from attnprof.vocabulary import AttentionKind

_FARTHEST = 4
"""Scales and copies of a piece that are looked through."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Q or K of a piece, and the tensor that its memory was written as."""

    writer: int
    """The output row that wrote it."""
    tokens: int
    """How many tokens it has, of all sequences."""
    features: int
    folded: int
    """The size of what has batch and heads in one, and not all of either."""
    written: tuple[int, ...]
    """Of the tensor, the sizes that stem from tokens."""
    all_features: int

    @property
    def all_tokens(self) -> int:
        return math.prod(self.written)

    @property
    def all_elements(self) -> int:
        return self.all_tokens * self.all_features


def join_pieces(facts: Facts, flow: Flow, calls: list[AttentionCall]) -> None:
    """Note of calls that are pieces of one attention what that is in all.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        calls: The run's attention calls; `AttentionCall.whole` of pieces is set.
    """
    together: dict[tuple[str, int, AttentionKind], list[AttentionCall]] = {}
    for call in calls:
        scope = facts.enclosing_call(call.ops[0], call.layer)
        if scope >= 0 and call.kind in (AttentionKind.MATERIALISED, AttentionKind.FUSED):
            together.setdefault((call.layer, scope, call.kind), []).append(call)
    several = [group for group in together.values() if len(group) > 1]
    sequences = Sequences(facts, flow, [call for group in several for call in group])
    for group in several:
        operands = [_find_operands(facts, call) for call in group]
        if None in operands:
            continue
        parts = [tuple(_read(facts, flow, row) for row in pair) for pair in operands if pair]
        queries, keys = (list(each) for each in zip(*parts, strict=True))
        if len({part.writer for part in queries}) == len({part.writer for part in keys}) == 1:
            whole = _join(group, queries, keys, sequences.count(group[0]))
            for call in group:
                call.whole = whole


def _find_operands(facts: Facts, call: AttentionCall) -> tuple[int, int] | None:
    """Return the input rows of Q and K; None where they are not known apart."""
    if call.keys_row < 0:
        return None
    if call.kind is AttentionKind.FUSED:
        return call.io_rows[0], call.keys_row
    left, right = factors(facts, int(facts.row_op[call.keys_row]))
    return (left, right) if call.keys_row == right else (right, left)


def _read(facts: Facts, flow: Flow, row: int) -> _Part:
    """Return what an input row has of the tensor that it, or what it was scaled from, lies in."""
    for _ in range(_FARTHEST):
        op = int(facts.row_op[facts.producer_row[row]])
        inputs = facts.rows_in(op) if facts.producer_row[row] >= 0 else ()
        if len(inputs) != 1 or is_product(facts, op):
            break
        if facts.signature_of(inputs[0]).numel != facts.signature_of(row).numel:
            break
        row = inputs[0]
    writer = int(facts.producer_row[row])
    sizes = {TOKEN: 1, FEATURE: 1, 0: 1}
    for size, bit in (part for parts in flow.unfolded.parts_of_input(row) for part in parts):
        sizes[bit if bit in sizes else 0] *= size
    signature, bits = flow.written(writer) if writer in flow.bits else (facts.signature_of(row), ())
    written = list(zip(signature.shape, bits, strict=False))
    return _Part(
        writer,
        tokens=sizes[TOKEN],
        features=sizes[FEATURE],
        folded=sizes[0],
        written=tuple(size for size, bit in written if bit == TOKEN),
        all_features=math.prod(size for size, bit in written if bit == FEATURE),
    )


def _join(
    group: list[AttentionCall], queries: list[_Part], keys: list[_Part], outer: int
) -> Extent | None:
    """Return what the pieces of one Q and K are together; None if they are no pieces.

    Args:
        group: The pieces.
        queries: Their parts of Q.
        keys: Their parts of K.
        outer: How many sequences Q and K are from; 0 if unknown.
    """
    own, query, key = group[0].own_extent, queries[0], keys[0]
    if not all(part.tokens * part.features for part in (*queries, *keys)):
        return None  # no tokens at all
    asked = sum(part.tokens for part in queries)
    if own.batch < outer and own.q_len * outer == query.all_tokens:
        extent = replace(own, batch=outer)
        if _count_elements(queries) == query.all_elements:
            return _count_heads(extent, group[0].head_dim, query, keys)
        times, rest = divmod(asked, query.all_tokens)
    else:
        q_len = own.q_len * query.all_tokens // query.tokens
        k_len = own.k_len * key.all_tokens // key.tokens
        scores = sum(q.tokens * k.tokens for q, k in zip(queries, keys, strict=True))
        times, rest = divmod(scores, query.all_tokens * key.all_tokens)
        extent = replace(own, q_len=q_len, k_len=k_len)
        if not times and asked == query.all_tokens:  # none of them meets keys that come later
            return replace(extent, k_len=max(call.k_len for call in group))
    if rest or not times:
        return None
    # Q is read again for every stretch of keys, and K for every stretch of queries.
    q_reads, k_reads = extent.k_len / own.k_len, extent.q_len / own.q_len
    if times > 1 and _count_elements(queries) > math.ceil(q_reads) * query.all_elements:
        return None  # the same heads again
    is_shared = _count_elements(keys) > math.ceil(k_reads) * key.all_elements
    kv_heads = own.kv_heads * (1 if is_shared else times)
    return replace(extent, heads=own.heads * times, kv_heads=kv_heads)


def _count_heads(extent: Extent, head_dim: int, query: _Part, keys: list[_Part]) -> Extent:
    """Return an extent with the heads of a Q that the pieces have once, wherever it was cut."""
    kv_heads = extent.kv_heads
    if _count_elements(keys) == keys[0].all_elements:
        kv_heads = keys[0].all_features // head_dim
    return replace(extent, heads=query.all_features // head_dim, kv_heads=kv_heads)


def _count_elements(parts: list[_Part]) -> int:
    return sum(part.tokens * part.features * part.folded for part in parts)
