"""The longest sequence that a program's tables of positions have room for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnprof.analysis.wall import Probe
from attnprof.errors import LengthError


@dataclass(frozen=True, slots=True)
class PositionLimit:
    """A length beyond which a program cannot run, however much memory there is."""

    seq_len: int
    """The longest that it can."""
    rows: int
    """How many rows the table has that ends there."""
    at: str
    """The line of the program that looks rows up, as ``file:line``."""


def find_position_limit(tables: Mapping[int, Sequence[Mapping[str, Any]]]) -> PositionLimit | None:
    """Find the table that ends first, of those of which longer sequences use more.

    Args:
        tables: Per length, what its dry run says of tables: ``at``, ``rows`` and ``used``.
    """
    if len(tables) < 2:
        return None
    short, long = min(tables), max(tables)
    before = {(table["at"], table["rows"]): int(table["used"]) for table in tables[short]}
    limits = []
    for table in tables[long]:
        at, rows, used = str(table["at"]), int(table["rows"]), int(table["used"])
        added = used - before.get((table["at"], table["rows"]), used)
        if added > 0:
            limits.append(PositionLimit(long + (rows - used) * (long - short) // added, rows, at))
    return min(limits, key=lambda limit: limit.seq_len, default=None)


def limit_probe(probe: Probe, limit: PositionLimit | None) -> Probe:
    """Return a probe that refuses lengths for which a program has no positions."""
    if limit is None:
        return probe

    def measure(seq_len: int, capacity_bytes: int) -> int:
        if seq_len > limit.seq_len:
            error = LengthError(
                f"a table of {limit.rows} rows at {limit.at} has no positions beyond "
                f"n = {limit.seq_len}"
            )
            error.rows = limit.seq_len
            raise error
        return probe.measure(seq_len, capacity_bytes)

    return replace(probe, measure=measure)
