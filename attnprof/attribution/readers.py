"""Which modules' calls read a tensor."""

from functools import cached_property

import numpy as np

from attnprof.attribution.facts import Facts, Ints


class Readers:
    """The calls that read storages; looked up when first asked for."""

    def __init__(self, facts: Facts) -> None:
        """Begin without any."""
        self._facts = facts

    @cached_property
    def _scopes(self) -> tuple[Ints, Ints]:
        """Of all input rows their storages, rising, and their scopes."""
        facts = self._facts
        rows = np.flatnonzero(facts.is_input)
        rows = rows[np.argsort(facts.storage[rows], kind="stable")]
        return facts.storage[rows], facts.scope[facts.row_op[rows]]

    def is_shared(self, row: int) -> bool:
        """Return whether calls of several modules read what an output row wrote.

        That of the module that made it does not count.
        """
        facts = self._facts
        storages, scopes = self._scopes
        first, last = np.searchsorted(storages, facts.storage[row] + np.array([0, 1]))
        maker = facts.scope[facts.row_op[row]]
        return len(np.setdiff1d(scopes[first:last], [maker])) > 1
