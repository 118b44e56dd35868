"""Scores written as a product of every query with every key, summed up over their features.

``(q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)`` is QKᵀ without a matrix product: each operand is
broadcast along the tokens of the other, and the sum contracts the features that both share. So is
``(q * k).sum(-1)`` with one query for all keys, as of a decoder that attends at every step; but
that is attention only if a softmax follows.
"""

from dataclasses import dataclass, replace

from attnprof.attribution.axes import FEATURE, LEFT, RIGHT, TOKEN, Bits, without_sides
from attnprof.attribution.facts import Facts
from attnprof.attribution.products import MULTIPLICATIONS

OUTER_OPS = MULTIPLICATIONS | {"sum"}
"""The only ops that are worth asking for."""


@dataclass(frozen=True, slots=True)
class Outer:
    """A product of every query with every key, not summed up yet."""

    ops: tuple[int, ...]
    """The multiplication, and those by decays and the like after it."""
    left: int
    """The dimension that runs over the tokens of the first operand; -1 if it is one query."""
    right: int
    shared: tuple[int, ...]
    """The dimensions of features."""

    @property
    def sides(self) -> int:
        """The sides that there are."""
        return (LEFT if self.left >= 0 else 0) | (RIGHT if self.right >= 0 else 0)


class OuterProducts:
    """What becomes of such products."""

    def __init__(self, facts: Facts) -> None:
        """Begin without any."""
        self._facts = facts
        self._found: dict[int, Outer] = {}  # per output row

    def follow(self, op: int, bits: list[Bits], *, of_data: bool) -> None:
        """Note if an op multiplies every query with every key, or scales such products.

        Args:
            op: The op.
            bits: Where the dimensions of its operands come from.
            of_data: Whether all of them are activations.
        """
        facts = self._facts
        rows, outs = facts.rows_in(op), facts.rows_out(op)
        if facts.short_names[facts.code[op]] not in MULTIPLICATIONS or len(rows) != 2:
            return
        shape = facts.signature_of(outs[0]).shape
        if len(shape) < 3:  # queries, keys and features
            return
        for row in rows:
            outer = self._found.get(int(facts.producer_row[row]))
            if outer is not None and facts.signature_of(row).shape == shape:
                self._found[outs[0]] = replace(outer, ops=(*outer.ops, op))
                return
        found = self._read(op, shape, bits) if of_data else None
        if found is not None:
            self._found[outs[0]] = found

    def _read(self, op: int, shape: tuple[int, ...], bits: list[Bits]) -> Outer | None:
        if not len(bits[0]) == len(bits[1]) == len(shape):
            return None
        # What is broadcast stems from nothing, also where it was expanded and computed with before.
        dims = range(len(shape))
        lefts = [i for i in dims if bits[0][i] & TOKEN and not bits[1][i]]
        rights = [i for i in dims if bits[1][i] & TOKEN and not bits[0][i]]
        shared = tuple(i for i in dims if shape[i] > 1 and bits[0][i] == bits[1][i] == FEATURE)
        if len(lefts) > 1 or len(rights) > 1 or not lefts + rights or not shared:
            return None
        if len(lefts) != len(rights):  # one query: not as many that nobody knows the origin of
            alone = self._facts.rows_in(op)[0 if rights else 1]
            signature, dim = self._facts.signature_of(alone), (lefts + rights)[0]
            if signature.shape[dim] > 1 and signature.stride[dim]:
                return None
        return Outer((op,), lefts[0] if lefts else -1, rights[0] if rights else -1, shared)

    def sum_up(self, op: int, bits: Bits) -> tuple[Outer, Bits] | None:
        """Return the product whose features an op sums up, and the bits of these scores."""
        facts = self._facts
        rows, outs = facts.rows_in(op), facts.rows_out(op)
        if facts.short_names[facts.code[op]] != "sum" or len(rows) != 1:
            return None
        outer = self._found.get(int(facts.producer_row[rows[0]]))
        read, out = (facts.signature_of(row).shape for row in (rows[0], outs[0]))
        if outer is None or len(read) != len(bits):
            return None
        for dim in reversed(outer.shared):
            if read[:dim] + read[dim + 1 :] == out:
                marked = list(without_sides(bits))
                for at, side in ((outer.left, LEFT), (outer.right, RIGHT)):
                    if at >= 0:
                        marked[at] |= side
                return outer, (*marked[:dim], *marked[dim + 1 :])
        return None
