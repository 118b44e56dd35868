"""Two peaks side by side."""

from dataclasses import dataclass

from attnprof.analysis.peak import Peak
from attnprof.palette import stack_order


@dataclass(frozen=True, slots=True)
class Change:
    """One category at two peaks."""

    category: str
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
    mine, theirs = first.by_category(), second.by_category()
    changes = [Change(name, mine.get(name, 0), theirs.get(name, 0)) for name in {**mine, **theirs}]
    return sorted(changes, key=lambda c: (-abs(c.difference_bytes), stack_order(c.category)))
