"""Ops in which the scores of several products meet."""

from attnprof.attribution.facts import Facts
from attnprof.attribution.pairs import Pairs
from attnprof.attribution.readers import Readers


class Joins:
    """Which scores go on where those of several pairs meet."""

    def __init__(self, facts: Facts, pairs: Pairs) -> None:
        """Ask of the pairs of a run, which grow while its data is followed."""
        self._facts = facts
        self._pairs = pairs
        self._readers = Readers(facts)

    def first_output(self, number: int) -> int:
        """Return the output row of a pair's first product."""
        return self._facts.rows_out(self._pairs[number].firsts[0])[0]

    def find_going_on(self, op: int, rows: range, met: list[int | None]) -> set[int]:
        """Return which of the pairs that meet in an op go on as scores.

        Where several do, those whose attention is done are a bias to the others; among themselves,
        in a loss say, they are scores no more. So is what a model makes once for all its layers.

        Args:
            op: The op.
            rows: Its input rows.
            met: Per row the number of its pair.
        """
        numbers = {number for number in met if number is not None}
        if len(numbers) < 2:
            return numbers
        numbers = {n for n in numbers if not self._pairs.is_read(n)}
        scope, producer = int(self._facts.scope[op]), self._facts.producer_row
        inside = {n for n in numbers if self._facts.ran_within(self._pairs[n].firsts[0], scope)}
        if not inside:
            return numbers
        shared = {
            number
            for row, number in zip(rows, met, strict=True)
            if number is not None
            and number not in inside
            and any(map(self._readers.is_shared, (producer[row], self.first_output(number))))
        }
        return numbers - shared
