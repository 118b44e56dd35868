"""The one sentence: how high the peak was, where, and how much of it grows with n²."""

import polars as pl

from attnprof.analysis.peak import Peak
from attnprof.units import format_bytes
from attnprof.vocabulary import AttentionKind, Category

QUADRATIC = (Category.SOFTMAX, Category.ATTENTION_SCORES, Category.ATTENTION_MASK)
"""The categories of what has a score matrix's shape."""

_LINEAR_KINDS = (AttentionKind.BANDED, AttentionKind.LOW_RANK, AttentionKind.LINEAR)
"""Kinds whose scores have a fixed number of keys per query: they grow with n, not n²."""


def measure_quadratic(peak: Peak, layers: pl.DataFrame) -> dict[str, int]:
    """Return the bytes at the peak that grow with n², per category, largest first.

    Scores, softmax results and masks count, but for those of layers whose scores are banded or
    low-rank.
    """
    kinds = [kind.value for kind in _LINEAR_KINDS]
    linear = layers.filter(pl.col("kind").is_in(kinds))["layer"]
    category = pl.col("category").cast(pl.String)
    held = (
        peak.allocations.filter(
            category.is_in([c.value for c in QUADRATIC])
            & ~pl.col("layer").cast(pl.String).is_in(linear.implode())
        )
        .group_by(category)
        .agg(pl.col("size_bytes").sum())
        .sort("size_bytes", "category", descending=[True, False])
    )
    return dict(held.iter_rows())


def write_verdict(
    peak: Peak, layers: pl.DataFrame, *, step: int | None = None, has_ops: bool = True
) -> str:
    """Return the sentence.

    Args:
        peak: The peak to speak of.
        layers: `Run.layers` of its run.
        step: The step that was asked for, if one was.
        has_ops: Whether attention would have been found; an imported run has no ops to find it by.
    """
    if not peak.total_bytes:
        return (
            "Nothing was recorded: no torch operator made a tensor while attnprof watched, "
            "so there is no peak."
        )
    what = "The peak" if step is None else f"The peak of step {step}"
    where = f" in step {peak.step}, {peak.phase}" if step is None else f" in {peak.phase}"
    if peak.layer:
        where += f", at {peak.layer}"
    size = format_bytes(peak.total_bytes)
    return f"{what} was {size} on {peak.device}{where}; {_judge(peak, layers, has_ops)}."


def _judge(peak: Peak, layers: pl.DataFrame, has_ops: bool) -> str:
    quadratic = measure_quadratic(peak, layers)
    total = sum(quadratic.values())
    if total:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in quadratic.items())
        share = format_share(total, peak.total_bytes)
        return f"{share} of it was attention that grows with n²: {parts}"
    name, size = next(iter(peak.by_category().items()))
    share = format_share(size, peak.total_bytes)
    most = f"most of it was {name}, {format_bytes(size)} ({share})"
    if not has_ops:
        return most
    nothing = "nothing in it grows with n²" if len(layers) else "no attention was found"
    return f"{nothing}; {most}"


def format_share(part: int, whole: int) -> str:
    """Return ``part`` of ``whole`` in per cent: ``"61 %"``, ``"0.4 %"``, ``"<0.1 %"``."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "<0.1 %"
    return f"{percent:.1f} %" if 0 < percent < 10 and round(percent, 1) < 10 else f"{percent:.0f} %"
