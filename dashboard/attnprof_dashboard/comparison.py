"""Two runs side by side: by category, layer, step and phase; for the page and for programs."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from attnprof.analysis.fits import TOTAL
from attnprof.report.compare import Change, describe_change, list_changes
from attnprof.vocabulary import Phase
from attnprof_dashboard.data.digest import DeviceDigest


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, each at its own peak."""

    first_bytes: int
    second_bytes: int
    categories: tuple[Change, ...]
    """The differences sum to the difference of the peaks."""
    layers: tuple[Change, ...]
    """By layer in place of category; they sum to the same."""
    steps: tuple[tuple[int, int | None, int | None], ...]
    """Number of the step and its peak in either run; None where a run has no such step."""
    phases: tuple[tuple[str, int, int], ...]
    """Name of the phase and its peak in either run; 0 where a run has no such phase."""

    @property
    def difference_bytes(self) -> int:
        """What the second peak holds more."""
        return self.second_bytes - self.first_bytes


def compare(first: DeviceDigest, second: DeviceDigest) -> Comparison:
    """Compare two devices of two runs."""
    peaks = [digest.summary["peak"] for digest in (first, second)]
    by_category = [peak["by_category"] for peak in peaks]
    by_layer = [_sum_layers(digest) for digest in (first, second)]
    return Comparison(
        first_bytes=peaks[0]["total_bytes"],
        second_bytes=peaks[1]["total_bytes"],
        categories=tuple(list_changes(*by_category)),
        layers=tuple(list_changes(*by_layer)),
        steps=tuple(_align_steps(first, second)),
        phases=tuple(_align_phases(first, second)),
    )


def _sum_layers(digest: DeviceDigest) -> dict[str, int]:
    frame = digest.live_at(digest.peak_event).group_by("layer").agg(pl.col("size_bytes").sum())
    return {layer or "": size for layer, size in frame.iter_rows()}


def _align_steps(
    first: DeviceDigest, second: DeviceDigest
) -> list[tuple[int, int | None, int | None]]:
    peaks = [
        dict(digest.steps.select("step", "peak_bytes").iter_rows()) if len(digest.steps) else {}
        for digest in (first, second)
    ]
    return [(n, peaks[0].get(n), peaks[1].get(n)) for n in sorted({**peaks[0], **peaks[1]})]


def _align_phases(first: DeviceDigest, second: DeviceDigest) -> list[tuple[str, int, int]]:
    peaks = []
    for digest in (first, second):
        whole = digest.peaks.filter((pl.col("category") == TOTAL) & (pl.col("layer") == ""))
        peaks.append(dict(whole.select("phase", "peak_bytes").iter_rows()))
    known = {**peaks[0], **peaks[1]}
    order = [phase.value for phase in Phase if phase.value in known]
    return [
        (name, peaks[0].get(name, 0), peaks[1].get(name, 0))
        for name in (*order, *(name for name in known if name not in order))
    ]


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as values that JSON knows; bytes are integers."""
    return {
        "format_version": 1,
        "first_bytes": comparison.first_bytes,
        "second_bytes": comparison.second_bytes,
        "difference_bytes": comparison.difference_bytes,
        "by_category": [describe_change(change, "category") for change in comparison.categories],
        "by_layer": [describe_change(change, "layer") for change in comparison.layers],
        "by_step": [
            {"step": n, "first_bytes": a, "second_bytes": b} for n, a, b in comparison.steps
        ],
        "by_phase": [
            {"phase": n, "first_bytes": a, "second_bytes": b} for n, a, b in comparison.phases
        ],
    }
