"""Attention that a layer's call does piece by piece: some queries, heads or sequences at a time.

Each piece is an attention call with the sizes of what it was given. What the layer's call attended
with in all shows where Q and K of all pieces lie in one tensor each: together, the pieces have them
once.
"""

import math
from dataclasses import astuple, dataclass

from attnprof.attribution.axes import FEATURE, TOKEN
from attnprof.attribution.batches import Sequences
from attnprof.attribution.calls import AttentionCall, Extent
from attnprof.attribution.facts import Facts
from attnprof.attribution.flow import Flow
from attnprof.attribution.origins import Origin
from attnprof.attribution.products import factors, is_product
from attnprof.vocabulary import AttentionKind

_WITH_ALL_KEYS = (AttentionKind.MATERIALISED, AttentionKind.FUSED)
_FARTHEST = 4
"""Ops on each element of a piece (scales, rotations, copies) that are looked through."""


@dataclass(frozen=True, slots=True)
class _Whole:
    """The tensor that the memory of Q, K or V of a piece was written as."""

    writer: int
    """The output row that wrote it."""
    tokens: int
    """Of all sequences."""
    features: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """What Q and K of all pieces are parts of; that may be one and the same."""

    query: _Whole
    key: _Whole
    key_features: int
    """Those of a head of K, with V's where the same op wrote both."""

    def may_have(self, heads: int, piece: AttentionCall) -> bool:
        """Return whether Q may have so many heads; more are the same heads again."""
        taken = piece.kv_heads * self.key_features if self.query == self.key else 0
        own = heads * piece.head_dim
        return own == self.query.features or own + taken <= self.query.features  # K may be Q

    def count_key_heads(self, heads: int, piece: AttentionCall) -> int:
        """Return how many heads K has if Q has so many: what of its features is not Q's."""
        if heads == piece.heads:
            return piece.kv_heads
        taken = heads * piece.head_dim if self.query == self.key else 0
        kv_heads, rest = divmod(self.key.features - taken, self.key_features)
        if rest or kv_heads < 1 or heads % kv_heads:  # there is something else besides
            return min(heads, piece.kv_heads * max(1, heads // piece.heads))
        return kv_heads


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
        is_empty = not all((call.head_dim, *astuple(call.own_extent)))
        if scope >= 0 and call.kind in _WITH_ALL_KEYS and not is_empty:
            together.setdefault((call.layer, scope, call.kind), []).append(call)
    several = [group for group in together.values() if len(group) > 1]
    if not several:
        return
    sequences = Sequences(facts, flow, [call for group in several for call in group])
    for group in several:
        operands = [_find_operands(facts, call) for call in group]
        pairs = [pair for pair in operands if pair]
        wholes = {tuple(_read(facts, flow, row) for row in pair) for pair in pairs}
        if len(pairs) < len(group) or len(wholes) > 1:
            continue
        query, key = wholes.pop()
        parts = _Parts(query, key, _measure_keys(facts, flow, group[0], pairs[0], key))
        asked = [facts.signature_of(row).numel // group[0].head_dim for row, _ in pairs]
        whole = _join(group, asked, parts, sequences.count(group[0]))
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


def _read(facts: Facts, flow: Flow, row: int) -> _Whole:
    """Return the tensor that what an input row reads, or was made from one by one, lies in."""
    for _ in range(_FARTHEST):
        made = int(facts.producer_row[row])
        if made < 0 or is_product(facts, int(facts.row_op[made])):
            break
        numel = facts.signature_of(row).numel
        same = [
            given
            for given in facts.rows_in(int(facts.row_op[made]))
            if facts.signature_of(given).numel == numel
            and flow.origin_of_input(given) is Origin.ACTIVATION
        ]
        if facts.signature_of(made).numel != numel or not same:
            break
        row = same[0]
    writer = int(facts.producer_row[row])
    signature, bits = flow.written(writer) if writer in flow.bits else (facts.signature_of(row), ())
    written = list(zip(signature.shape, bits, strict=False))
    return _Whole(
        writer,
        tokens=math.prod(size for size, bit in written if bit & TOKEN),
        features=math.prod(size for size, bit in written if bit == FEATURE),
    )


def _measure_keys(
    facts: Facts, flow: Flow, piece: AttentionCall, pair: tuple[int, int], key: _Whole
) -> int:
    """Return the features of a head of K, and those of V where the same op wrote both."""
    others = [row for row in piece.key_rows if row not in pair]
    is_joint = any(_read(facts, flow, row) == key for row in others)
    return piece.head_dim + (piece.value_dim or piece.head_dim) * is_joint


def _join(group: list[AttentionCall], asked: list[int], parts: _Parts, outer: int) -> Extent | None:
    """Return what the pieces of one Q and K are together; None if they are no pieces.

    Args:
        group: The pieces.
        asked: How many queries each has, of all its heads and sequences.
        parts: What has their Q and K.
        outer: How many sequences these are from; 0 if unknown.
    """
    own, query, key = group[0].own_extent, parts.query, parts.key
    longest, widest = (max(getattr(c, name) for c in group) for name in ("q_len", "k_len"))
    for batch in dict.fromkeys((outer, own.batch)):
        if not batch or query.tokens % batch or key.tokens % batch:
            continue
        q_len, k_len = query.tokens // batch, key.tokens // batch
        is_in_part = (longest, widest) != (q_len, k_len)
        if longest > q_len or widest > k_len or (batch < own.batch and is_in_part):
            continue
        scores = sum(count * call.k_len for count, call in zip(asked, group, strict=True))
        heads, rest = divmod(scores, query.tokens * k_len)
        if rest and widest == k_len:  # some meet no keys that come later
            heads, rest = divmod(sum(asked), query.tokens)
        of_piece = max(count // call.q_len for count, call in zip(asked, group, strict=True))
        if not rest and of_piece <= heads * batch and parts.may_have(heads, group[0]):
            kv_heads = parts.count_key_heads(heads, group[0])
            return Extent(batch, heads, kv_heads, q_len, k_len)
    return None
