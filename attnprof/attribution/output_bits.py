"""Where the dimensions of an op's result come from, if the op is no product."""

from typing import Any

from attnprof.attribution import axes
from attnprof.attribution.axes import Bits
from attnprof.attribution.facts import Facts
from attnprof.attribution.products import CONVOLUTION, EMBEDDING, is_index


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
        shapes = [facts.signature_of(row).shape for row in out[:1]]
        alike = [row for row in scores if facts.signature_of(row).shape in shapes]
        ranks = [len(shape) for shape in shapes]
        values = [
            row
            for row in leading
            if len(facts.signature_of(row).shape) in ranks and not is_index(facts, row)
        ]
        has_index = any(is_index(facts, row) for row in leading)
        return alike or (values if has_index and values else leading)

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
        return found
