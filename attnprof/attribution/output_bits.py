"""Where the dimensions of an op's result come from, if the op is no product."""

from itertools import pairwise
from typing import Any

from attnprof.attribution import axes
from attnprof.attribution.axes import TOKEN, Bits
from attnprof.attribution.facts import Facts
from attnprof.attribution.products import CONVOLUTION, EMBEDDING, is_index

_FEWEST_STEPS = 3
"""So many have to be put together."""
_LONGEST_STEP = 64
"""Ops of one step of a recurrent network, at most."""


class OutputBits:
    """The bits of output rows; ops with the same operands are asked for once."""

    def __init__(self, facts: Facts) -> None:
        """Begin without any."""
        self._facts = facts
        self._memo: dict[tuple[Any, ...], Bits] = {}

    def choose_heard(self, out: range, scores: list[int], leading: list[int]) -> list[int]:
        """Return the input rows of an op that say what its outputs' dimensions are.

        A position embedding is a parameter, but adding it makes no features of tokens. Nor does a
        bias that was made of tokens make tokens of the heads of scores, nor an index of them tokens
        of the heads of what it gathers.

        Args:
            out: The op's output rows.
            scores: The scores among its input rows.
            leading: Those of its input rows that are furthest from being constant.
        """
        facts = self._facts
        if scores:
            shapes = [facts.signature_of(row).shape for row in out[:1]]
            if alike := [row for row in scores if facts.signature_of(row).shape in shapes]:
                return alike
        if len(leading) < 2 or not any(is_index(facts, row) for row in leading):
            return leading
        ranks = [len(facts.signature_of(row).shape) for row in out[:1]]
        values = [
            row
            for row in leading
            if len(facts.signature_of(row).shape) in ranks and not is_index(facts, row)
        ]
        return values or leading

    def find(self, row: int, kind: int, rows: range, bits: list[Bits], heard: list[int]) -> Bits:
        """Return the bits of an output row.

        Args:
            row: The output row.
            kind: What `products.classify` says of the op.
            rows: The op's input rows.
            bits: The bits of the tensors in them.
            heard: Those of the input rows that say what the dimensions are.
        """
        facts = self._facts
        out = int(facts.signature[row])
        signature = facts.signatures[out]
        if kind == EMBEDDING and len(bits) > 1:
            return axes.of_embedding(signature, bits[1])
        if kind == CONVOLUTION and bits:
            return axes.of_convolution(signature, bits[0])
        inputs = tuple((int(facts.signature[r]), bits[r - rows.start]) for r in heard)
        key = (out, inputs)
        found = self._memo.get(key)
        if found is None:
            found = axes.through_op(signature, [(facts.signatures[s], b) for s, b in inputs])
            self._memo[key] = found
        step = self._find_steps(row, rows)
        return found if step < 0 else (*found[:step], TOKEN, *found[step + 1 :])

    def _find_steps(self, row: int, rows: range) -> int:
        """Return the dimension along which a recurrent network's steps are put together, or -1.

        Each was made from the one before, so that they are tokens: heads are not.
        """
        if len(rows) < _FEWEST_STEPS:  # as of nearly all ops
            return -1
        facts = self._facts
        name = facts.short_names[facts.code[facts.row_op[row]]]
        if name not in ("stack", "cat"):
            return -1
        out, piece = facts.signature_of(row).shape, facts.signature_of(rows[0]).shape
        one = 1 if name == "cat" else 0
        dims = [
            dim
            for dim, size in enumerate(out)
            if size == len(rows) and out[:dim] + (1,) * one + out[dim + 1 :] == piece
        ]
        is_recurrent = dims and all(
            self._depends(later, before)
            for before, later in (*pairwise(rows[:3]), *pairwise(rows[-2:]))
        )
        return dims[0] if is_recurrent else -1

    def _depends(self, later: int, before: int) -> bool:
        """Return whether the tensor in an input row was made from that in another, just before."""
        facts = self._facts
        storage, since = int(facts.storage[before]), int(facts.producer_row[before])
        todo, seen = [int(facts.producer_row[later])], set[int]()
        while todo and len(seen) < _LONGEST_STEP:
            made = todo.pop(0)
            if made <= since or made in seen:
                continue
            seen.add(made)
            rows = facts.rows_in(int(facts.row_op[made]))
            if any(int(facts.storage[row]) == storage for row in rows):
                return True
            todo += [int(facts.producer_row[row]) for row in rows]
        return False
