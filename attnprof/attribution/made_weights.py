"""Weights that a forward makes of parameters alone: merged low-rank updates, spectral norms, bases.

Learned queries are made like that too. What is multiplied by a weight is projected, what is
multiplied by queries makes scores, and only what comes after says which of the two it was.
"""

from collections.abc import Sequence

from attnprof.attribution.facts import Facts
from attnprof.attribution.origins import Origin


class MadeWeights:
    """Which tensors are made of parameters alone, with a product among the ops."""

    def __init__(self, facts: Facts) -> None:
        """Begin without any."""
        self._facts = facts
        self._rows: set[int] = set()

    def holds(self, row: int) -> bool:
        """Return whether the tensor in an output row is one."""
        return row in self._rows

    def are_read_by(self, op: int) -> bool:
        """Return whether one of an op's operands is one."""
        return any(map(self._is_one, self._facts.rows_in(op)))

    def _is_one(self, row: int) -> bool:
        return int(self._facts.producer_row[row]) in self._rows

    def follow(self, op: int, origins: Sequence[Origin], *, is_product: bool) -> None:
        """Note what an op makes of parameters alone.

        Args:
            op: The op.
            origins: What its operands are made from.
            is_product: Whether it is a product of matrices.
        """
        if not (is_product or self._rows):
            return
        rows = self._facts.rows_in(op)
        made = [self._is_one(row) for row in rows]
        is_begun = is_product and Origin.PARAMETER in origins
        if (is_begun or any(made)) and all(
            is_made or origin <= Origin.PARAMETER
            for is_made, origin in zip(made, origins, strict=True)
        ):
            self._rows.update(self._facts.rows_out(op))
