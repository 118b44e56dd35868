"""The growth report for programs: the numbers of the text, as plain JSON values."""

import json
from dataclasses import asdict
from typing import Any

from attnprof.analysis.fits import TOTAL, Fit
from attnprof.analysis.wall import Wall
from attnprof.report.growth_notes import collect_growth_notes
from attnprof.report.growth_summary import Capacity, GrowthSummary, Point, find_residual
from attnprof.report.growth_verdict import write_growth_verdict

FORMAT_VERSION = 1
"""Raised when a key changes its meaning or goes away; new keys do not raise it."""


def render_growth_json(summary: GrowthSummary) -> str:
    """Return the report as JSON text, two spaces deep; bytes are integers."""
    return json.dumps(describe_growth(summary), indent=2, allow_nan=False)


def describe_growth(summary: GrowthSummary) -> dict[str, Any]:
    """Return the report as values that JSON knows.

    The ``size_bytes`` of ``holders`` sum to the peak of the longest length.
    """
    fit = summary.fit
    return {
        "format_version": FORMAT_VERSION,
        "growth": {
            "name": summary.name,
            "path": None if summary.path is None else str(summary.path),
            "about": list(summary.about),
        },
        "focus": summary.focus,
        "verdict": write_growth_verdict(summary),
        "points": [_describe_point(point, fit) for point in summary.points],
        "fits": [describe_fit(fit) for fit in summary.fits.values()],
        "longest": summary.longest,
        "holders": [asdict(holder) for holder in summary.holders],
        "layers": [
            {
                "layer": law.layer,
                "count": law.count,
                "each_bytes": law.each_bytes,
                **describe_fit(law.fit),
            }
            for law in summary.layer_laws
        ],
        "predicted": _describe_sizes(summary.predicted),
        "theory_saved_softmax": _describe_sizes(summary.theory),
        "capacities": [describe_capacity(capacity) for capacity in summary.capacities],
        "assumptions": list(summary.assumptions),
        "notes": [asdict(note) for note in collect_growth_notes(summary)],
    }


def _describe_point(point: Point, fit: Fit | None) -> dict[str, Any]:
    return {
        "seq_len": point.seq_len,
        "source": point.source,
        "status": point.status,
        "reason": point.reason,
        "peak_bytes": point.held_bytes(),
        "by_category": {name: size for name, size in point.sizes.items() if name != TOTAL},
        "residual": None if fit is None else find_residual(fit, point),
    }


def describe_fit(fit: Fit) -> dict[str, Any]:
    """Return a fit: coefficients per phase are of c0 + c1·n + c2·n², in bytes."""
    return {
        "category": fit.category,
        "source": fit.source,
        "phase": fit.phase,
        "law": fit.law,
        "coefficients": {phase: list(terms) for phase, terms in fit.coefficients.items()},
        "exponent": fit.exponent,
        "exponent_interval": None if fit.exponent_interval is None else list(fit.exponent_interval),
        "r2": fit.r2,
        "max_relative_error": fit.max_relative_error,
        "changes": [
            {"phase": c.phase, "below": c.below, "above": c.above, "before": c.before.words}
            for c in fit.changes
        ],
    }


def describe_capacity(capacity: Capacity) -> dict[str, Any]:
    """Return a capacity and its wall."""
    return {
        "name": capacity.name,
        "size_bytes": capacity.size_bytes,
        "wall": None if capacity.wall is None else describe_wall(capacity.wall),
        "why_no_wall": capacity.why_no_wall,
    }


def describe_wall(wall: Wall) -> dict[str, Any]:
    """Return a wall, with its evidence in a sentence."""
    return {**asdict(wall), "sentence": wall.sentence}


def _describe_sizes(sizes: tuple[tuple[int, int], ...]) -> list[dict[str, int]]:
    return [{"seq_len": n, "size_bytes": size} for n, size in sizes]
