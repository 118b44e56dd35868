"""What was derived from a sweep, or from the steps of a run: laws, walls and an outlook."""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from attnprof.vocabulary import Category

_PER_MODEL = frozenset(
    {Category.PARAMETERS, Category.BUFFERS, Category.GRADIENTS, Category.OPTIMIZER_STATE}
)
"""What does not depend on the data."""
_PER_HEAD = frozenset({Category.ATTENTION_SCORES, Category.SOFTMAX})
_WHOLE_NUMBERS = frozenset({Category.INPUTS})

BATCH_DOUBLINGS = range(-2, 5)
HEAD_DOUBLINGS = range(-2, 3)
ITEM_HALVINGS = range(-1, 3)


@dataclass(frozen=True, slots=True)
class Scale:
    """How a program is thought to differ from the one that was swept."""

    batch: float = 1.0
    heads: float = 1.0
    """At the same width: each is then narrower."""
    item: float = 1.0
    """Bytes per element."""

    def list_factors(self) -> dict[str, float]:
        """Return by how much each category grows."""
        return {category.value: self.apply(category.value, 1.0) for category in Category}

    @property
    def is_one(self) -> bool:
        """Whether nothing differs."""
        return self == Scale()

    def apply(self, category: str, size_bytes: float) -> float:
        """Return a category's bytes in the program that differs."""
        size = size_bytes
        if category not in _PER_MODEL:
            size *= self.batch
        if category in _PER_HEAD:
            size *= self.heads
        return size if category in _WHOLE_NUMBERS else size * self.item


def list_scales() -> list[Scale]:
    """Return all that can be asked for."""
    return [
        Scale(2.0**batch, 2.0**heads, 2.0**-halvings)
        for batch in BATCH_DOUBLINGS
        for heads in HEAD_DOUBLINGS
        for halvings in ITEM_HALVINGS
    ]


@dataclass(frozen=True, slots=True)
class GrowthDigest:
    """A growth's derived values."""

    values: Mapping[str, Any]
    """See `attnprof.report.growth_json`; and ``outlook``: predicted peaks by category."""

    @classmethod
    def open(cls, file: Path) -> "GrowthDigest":
        """Read what was derived from a sweep.

        Raises:
            ValueError: It is damaged.
        """
        return cls(json.loads(file.read_text("utf-8"))["growth"])

    def predict(self, scale: Scale) -> list[tuple[int, int]]:
        """Return lengths and predicted peaks of a program that differs in its scale.

        Of the instants that may be its peak the highest counts, with every category scaled by
        what it depends on. None if the categories of predictions are not known.
        """
        return [
            (
                row["seq_len"],
                round(max(sum(map(scale.apply, at, at.values())) for at in row["instants"])),
            )
            for row in self.values["outlook"]
            if row["instants"]
        ]

    def find_wall(self, capacity_bytes: int, scale: Scale) -> int | None:
        """Return about the longest length that fits; None if it lies outside of the outlook."""
        return interpolate(self.predict(scale), capacity_bytes)


def interpolate(points: list[tuple[int, int]], size_bytes: int) -> int | None:
    """Return the length at which a rising curve reaches a size, read off between its points."""
    sizes = [size for _, size in points]
    at = bisect_left(sizes, size_bytes)
    if not 0 < at < len(points):
        return None
    (n0, s0), (n1, s1) = points[at - 1], points[at]
    if s1 <= s0 or s0 <= 0:
        return n0
    share = (log(size_bytes) - log(s0)) / (log(s1) - log(s0))
    return int(exp(log(n0) + share * (log(n1) - log(n0))))
