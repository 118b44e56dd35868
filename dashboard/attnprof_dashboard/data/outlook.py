"""What a growth says, worked out once: the report's numbers, and predictions far beyond them."""

from dataclasses import replace
from typing import Any

from attnprof.growth import Growth
from attnprof.report.growth_gather import summarise_growth
from attnprof.report.growth_json import describe_growth
from attnprof.report.growth_summary import GrowthSummary
from attnprof.report.growth_verdict import write_growth_verdict
from attnprof_dashboard.data.growth_digest import list_scales

CAPACITIES = ("RTX 4090", "A100 80GB", "H100", "H200", "B200")
"""Devices whose wall is looked for."""
_LENGTHS = 60
_BEYOND = 8
"""Predictions reach so many times the longest length, or past the farthest wall."""


def describe_outlook(growth: Growth) -> dict[str, Any]:
    """Return the growth report's values and, under ``outlook``, predicted peaks by category.

    Args:
        growth: The growth; nothing is run for it.
    """
    summary = summarise_growth(growth, capacities=CAPACITIES)
    values = describe_growth(summary)
    values["verdict"] = write_growth_verdict(replace(summary, capacities=()))
    values["outlook"] = _predict(growth, summary) if summary.fits else []
    return {"growth": values}


def _predict(growth: Growth, summary: GrowthSummary) -> list[dict[str, Any]]:
    first = min(point.seq_len for point in summary.points if point.is_done)
    longest = summary.longest or first
    walls = [c.wall.next_seq_len for c in summary.capacities if c.wall is not None]
    last = max(_BEYOND * longest, round(1.5 * max(walls, default=0)))
    ratio = last / first
    lengths = {round(first * ratio ** (i / _LENGTHS)) for i in range(_LENGTHS + 1)} | {longest}
    factors = [scale.list_factors() for scale in list_scales()]
    program = growth.extrapolation
    found = []
    for n in sorted(lengths):
        peak = growth.predict_peak(n)
        found.append(
            {
                "seq_len": n,
                "peak_bytes": peak.peak_bytes,
                "by_category": peak.by_category,
                "instants": program.list_highest(n, factors) if program else [],
                "phase": peak.phase,
                "method": peak.method,
            }
        )
    return found
