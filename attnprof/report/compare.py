"""Two peaks side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnprof.analysis.peak import Peak
from attnprof.palette import stack_order


@dataclass(frozen=True, slots=True)
class Change:
    """One category or layer at two peaks."""

    name: str
    first_bytes: int
    second_bytes: int

    @property
    def difference_bytes(self) -> int:
        """What the second peak holds more; negative where it holds less."""
        return self.second_bytes - self.first_bytes


def compare_peaks(first: Peak, second: Peak) -> list[Change]:
    """Return a row per category of either peak, the largest difference first.

    The differences sum to the difference of the peaks, for the categories sum to each.
    """
    return list_changes(first.by_category(), second.by_category())


def list_changes(first: Mapping[str, int], second: Mapping[str, int]) -> list[Change]:
    """Return a row per name of either, the largest difference first.

    Args:
        first: Bytes at the first peak, by category or layer.
        second: The same at the second.
    """
    changes = [Change(n, first.get(n, 0), second.get(n, 0)) for n in {**first, **second}]
    return sorted(changes, key=lambda c: (-abs(c.difference_bytes), stack_order(c.name), c.name))


def describe_change(change: Change, word: str) -> dict[str, Any]:
    """Return a row as values that JSON knows; the name is under ``word``."""
    return {
        word: change.name,
        "first_bytes": change.first_bytes,
        "second_bytes": change.second_bytes,
        "difference_bytes": change.difference_bytes,
    }
