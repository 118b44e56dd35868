"""Second products written out: values weighed by scores one by one, and summed up over keys.

``(weights.unsqueeze(-1) * values.unsqueeze(-3)).sum(-2)`` is PV without a matrix product. The same
is done with values that were gathered for every query, and key by key, adding up.
"""

from dataclasses import dataclass

from attnprof.attribution.axes import FEATURE, SIDES, Bits
from attnprof.attribution.facts import Facts
from attnprof.attribution.products import MULTIPLICATIONS


@dataclass(frozen=True, slots=True)
class _Weighed:
    """Values times scores, not summed up yet."""

    op: int
    row: int
    """The input row that holds the scores."""
    keys: tuple[int, ...]
    """The dimensions of keys."""


class WeightedSums:
    """What becomes of values that are multiplied by scores."""

    def __init__(self, facts: Facts) -> None:
        """Begin without any."""
        self._facts = facts
        self._found: dict[int, _Weighed] = {}  # per output row

    def follow(self, op: int, scores: list[int], bits: list[Bits], *, of_data: bool) -> int | None:
        """Note if an op multiplies values by scores.

        Returns:
            Its input row of scores if those are of one key, so that nothing is left to sum up.

        Args:
            op: The op.
            scores: Those of its input rows that hold scores.
            bits: Where the dimensions of its operands come from.
            of_data: Whether all of them are activations.
        """
        facts = self._facts
        rows, outs = facts.rows_in(op), facts.rows_out(op)
        is_multiplication = facts.short_names[facts.code[op]] in MULTIPLICATIONS
        if not (is_multiplication and of_data and len(rows) == 2 and len(scores) == 1):
            return None
        at = rows.index(scores[0])
        weights, values = (facts.signature_of(rows[i]).shape for i in (at, 1 - at))
        missing = len(weights) - len(values)
        if missing < 0 or len(facts.signature_of(outs[0]).shape) != len(weights):
            return None
        values, of_values = (1,) * missing + values, (0,) * missing + bits[1 - at]
        both = range(len(weights))
        # A feature of the values is none of the scores', and every key has a value of its own.
        if not any(weights[i] == 1 < values[i] and of_values[i] & FEATURE for i in both):
            return None
        keys = tuple(i for i in both if weights[i] == values[i] > 1 and bits[at][i] & SIDES)
        if keys:
            self._found[outs[0]] = _Weighed(op, rows[at], keys)
            return None
        whole = facts.signature_of(int(facts.producer_row[rows[at]])).numel
        is_column = (
            any(bit & SIDES for bit in bits[at]) and facts.signature_of(rows[at]).numel < whole
        )
        return rows[at] if is_column else None

    def sum_up(self, op: int) -> tuple[int, int] | None:
        """Return the multiplication whose keys an op sums up, and its input row of scores."""
        facts = self._facts
        rows, outs = facts.rows_in(op), facts.rows_out(op)
        if facts.short_names[facts.code[op]] != "sum" or len(rows) != 1:
            return None
        weighed = self._found.get(int(facts.producer_row[rows[0]]))
        if weighed is None:
            return None
        read, out = (facts.signature_of(row).shape for row in (rows[0], outs[0]))
        is_summed = any(
            out in (read[:dim] + read[dim + 1 :], (*read[:dim], 1, *read[dim + 1 :]))
            for dim in weighed.keys
        )
        return (weighed.op, weighed.row) if is_summed else None
