"""Where queries and keys meet without being multiplied: broadcast against each other, and added.

Additive attention scores ``v · tanh(q_i + k_j)``, graph attention ``a · h_i + b · h_j``: one
operand runs over queries and is repeated for every key, the other the other way round. Such a sum
is made for other reasons too (decays between tokens, positions in rows and columns).
`SumFlow` follows what becomes of it; only a softmax and a product with values make it attention.
"""

from dataclasses import dataclass

import numpy as np

from attnprof.attribution.axes import FEATURE, LEFT, RIGHT, SIDES, TOKEN, Bits
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Bools, Facts
from attnprof.attribution.flow import Flow
from attnprof.attribution.layouts import Factors
from attnprof.attribution.origins import Origin
from attnprof.attribution.pairs import Pair, Pattern
from attnprof.attribution.products import INTEGERS, factors, is_product

_JOINING = frozenset({"add", "add_", "sub", "sub_", "cat"})
"""Sums; and a concatenation, which becomes one in the projection that follows."""
_MOST_JOINED = 4
"""Tensors that are concatenated, at most: queries, keys, and what is made of both."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """A sum of queries and keys."""

    left: int
    """The dimension of its result that runs over the first operand's tokens; -1 for one query."""
    right: int
    """The same of the second operand."""
    parts: tuple[Factors, ...] = ()
    """The parts of its dimensions, with sides, where both lie in one."""


def find_meetings(facts: Facts, flow: Flow, is_forward: Bools) -> dict[int, Meeting]:
    """Return those of the forward ops that are sums of queries and keys."""
    may_join = np.array([name in _JOINING for name in facts.short_names], np.bool_)
    found = {}
    for op in np.flatnonzero(may_join[facts.code] & is_forward).tolist():
        is_cat = facts.short_names[facts.code[op]] == "cat"
        if 2 <= len(facts.rows_in(op)) <= (_MOST_JOINED if is_cat else 2):
            meeting = _read(facts, flow, op)
            if meeting is not None:
                found[op] = meeting
    return found


def _read(facts: Facts, flow: Flow, op: int) -> Meeting | None:
    rows = facts.rows_in(op)
    out = facts.signature_of(facts.rows_out(op)[0])
    if out.dtype in INTEGERS or any(flow.origin_of_input(r) != Origin.ACTIVATION for r in rows):
        return None
    dims = range(len(out.shape))
    bits = [_align(flow.bits_of_input(row), len(out.shape)) for row in rows]
    for at, second in enumerate(bits[1:], 1):  # what follows may be made of both, as products
        first = bits[0]
        lefts = [i for i in dims if first[i] & TOKEN and not second[i]]
        rights = [i for i in dims if second[i] & TOKEN and not first[i]]
        if len(lefts) == len(rights) == 1:
            return Meeting(lefts[0], rights[0])
        if len(rows) > 2:
            continue
        if not lefts and not rights and (folded := _read_folded(flow, rows, out.shape)):
            return folded
        # One query, as of a decoder that attends at every step.
        has_features = any(first[i] == second[i] == FEATURE for i in dims)
        if len(lefts) + len(rights) == 1 and has_features:
            alone = rows[0] if not lefts else rows[at]
            if _is_query(facts, alone, (lefts + rights)[0] - len(dims)):
                left, right = (found[0] if found else -1 for found in (lefts, rights))
                return Meeting(left, right)
    return None


def _is_query(facts: Facts, row: int, dim: int) -> bool:
    """Return whether one query is in an input row, to be joined with all keys along a dimension.

    To be added, it has to have features of its own: what was subtracted from a whole sequence may
    be its mean, or its maximum. To be concatenated, it has to be repeated.
    """
    signature, made = facts.signature_of(row), int(facts.producer_row[row])
    op = int(facts.row_op[made]) if made >= 0 else -1
    is_once = len(signature.shape) < -dim or signature.shape[dim] == 1 or not signature.stride[dim]
    if facts.short_names[facts.code[facts.row_op[row]]] != "cat":
        return op >= 0 and is_once and is_product(facts, op)
    return is_once or (op >= 0 and _is_repeated(facts, op))


def _is_repeated(facts: Facts, op: int) -> bool:
    """Return whether an op copies its only operand several times."""
    given = facts.rows_in(op)
    is_expanded = len(given) == 1 and not all(facts.signature_of(given[0]).stride)
    return is_expanded or facts.short_names[facts.code[op]] == "repeat"


def _read_folded(flow: Flow, rows: range, shape: tuple[int, ...]) -> Meeting | None:
    """Return a sum in which queries and keys are one dimension: all pairs, one after the other."""
    first, second = map(flow.unfolded.parts_of_input, rows)
    if not len(first) == len(second) == len(shape):
        return None
    found: list[Factors] = []
    folded: list[int] = []
    for dim, (a, b) in enumerate(zip(first, second, strict=True)):
        if len(a) == 1 or [size for size, _ in a] != [size for size, _ in b]:
            found.append(((shape[dim], a[0][1] | b[0][1]),))
            continue
        pairs = [(own, other) for (_, own), (_, other) in zip(a, b, strict=True)]
        lefts = [i for i, (own, other) in enumerate(pairs) if own & TOKEN and not other]
        rights = [i for i, (own, other) in enumerate(pairs) if other & TOKEN and not own]
        sides = {i: LEFT for i in lefts} | {i: RIGHT for i in rights}
        found.append(
            tuple((a[i][0], pairs[i][0] | pairs[i][1] | sides.get(i, 0)) for i in range(len(a)))
        )
        if len(lefts) == len(rights) == 1:
            folded.append(dim)
    return Meeting(folded[0], folded[0], tuple(found)) if len(folded) == 1 else None


def _align(bits: Bits, dimensions: int) -> Bits:
    return (0,) * (dimensions - len(bits)) + bits


class SumFlow(Flow):
    """A second pass, which follows sums of queries and keys instead of products."""

    def __init__(
        self, facts: Facts, is_forward: Bools, roles: dict[int, str], meetings: dict[int, Meeting]
    ) -> None:
        """Follow the data; arguments as of `Flow`, and the sums."""
        self._meetings = meetings
        super().__init__(facts, is_forward, roles)

    def _visit(self, op: int) -> None:
        super()._visit(op)
        meeting = self._meetings.get(op)
        out = self._facts.rows_out(op)[0]
        if meeting is None or out in self.pair_of:  # more that is added to scores
            return
        marked = list(self.bits[out])
        sides = 0
        for dim, side in ((meeting.left, LEFT), (meeting.right, RIGHT)):
            if dim >= 0:
                marked[dim] |= side
                sides |= side
        self.bits[out] = tuple(marked)
        self.unfolded.lay_out(out, meeting.parts)
        self.pair_of[out] = self._pairs.begin(Pair(Pattern.SUMS, [op], sides=sides))

    def _begin_pair(self, op: int, out: int, pattern: Pattern, consumed: set[int]) -> None:
        """Begin nothing: products have been followed before."""

    def _follow_outer(self, op: int, bits: list[Bits], *, of_data: bool) -> None:
        """Begin nothing."""

    def _are_projected(self, rows: range) -> bool:
        """Let them go through as many as they do: a sum is scored by a network."""
        return False

    def _pass_projection(self, op: int, rows: range) -> None:
        """Let the scores of one query pass the projection that sums up their features.

        And that which makes a sum of a concatenation.
        """
        facts = self._facts
        numbers = {n for row in rows if (n := self._pair_of_input(row)) is not None}
        is_sum = facts.signature_of(facts.rows_out(op)[0]).shape[-1] == 1
        makers = {int(facts.row_op[facts.producer_row[row]]) for row in rows}
        is_sum |= any(facts.short_names[facts.code[m]] == "cat" for m in makers & {*self._meetings})
        if is_sum and any(self._pairs[n].sides != SIDES for n in numbers):
            self._carry_pair(op, rows)
        else:
            super()._pass_projection(op, rows)


def is_attention(facts: Facts, flow: Flow, pair: Pair) -> bool:
    """Return whether a sum of queries and keys was made for attention: what reads it says so.

    The values meet the keys' side alone, and the queries' is still there. Of a single query no
    side tells; then nothing but the scores may be made of the sum while it has features, which
    else is a sequence that something was added to.
    """
    root = flow.find_pair(flow.pair_of[facts.rows_out(pair.firsts[0])[0]])
    for second, row in pair.seconds:
        values = next(r for r in factors(facts, second) if r != row)
        made = flow.pair_of.get(int(facts.producer_row[values]))
        if made is not None and flow.find_pair(made) == root:
            return False
        bits = flow.bits_of_input(row)
        sides = [bit & SIDES for bit in bits if bit & SIDES]
        if pair.sides == SIDES and sorted(sides) != [LEFT, RIGHT]:
            return False
    return pair.sides == SIDES or not _is_read_besides(facts, pair)


def _is_read_besides(facts: Facts, pair: Pair) -> bool:
    """Return whether an op outside of a pair reads sums that still have their features."""
    own = pair.ops
    whole = {facts.signature_of(facts.rows_out(op)[0]).numel for op in pair.firsts}
    sums = [
        op
        for op in (*pair.firsts, *pair.between)
        if facts.signature_of(facts.rows_out(op)[0]).numel in whole
    ]
    return any(
        facts.writes[user] and not facts.is_backward[user] and user not in own
        for op in sums
        for user in facts.users_of(op)
    )


def read_sums(facts: Facts, call: AttentionCall) -> None:
    """Correct what was read of a call as if its scores were products.

    Its width is that of the sums, one in graph attention. Copies that repeat queries for every key,
    or keys for every query, are as large as the sums. What joins before these have been summed up
    over features (their weights, a bias) is no mask.
    """
    scores = call.batch * call.heads * call.q_len * call.k_len
    for op in sorted(call.firsts):
        whole = facts.signature_of(facts.rows_out(op)[0]).numel
        rows = facts.rows_in(op)
        joined = len(rows) if facts.short_names[facts.code[op]] == "cat" else 1
        call.head_dim = whole // scores // joined
        # A concatenation is kept by the projection that follows, and its result by the next op.
        call.sum_width = (joined + 1) * call.head_dim if joined > 1 else call.head_dim
        for row in rows:
            made = int(facts.producer_row[row])
            size = facts.signature_of(made).numel if made >= 0 else 0
            is_keys = call.q_len == 1 and not _is_repeated(facts, int(facts.row_op[made]))
            if size * joined == whole and not is_keys and not is_product(facts, facts.row_op[made]):
                call.score_ops.add(int(facts.row_op[made]))
    call.ops = sorted({*call.ops, *call.score_ops})
    call.kv_heads = call.heads
    call.mask_rows = [
        row
        for row in call.mask_rows
        if facts.signature_of(facts.rows_out(int(facts.row_op[row]))[0]).numel <= call.score_numel
    ]
