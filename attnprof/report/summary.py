"""Everything a report says about a run, gathered once, so that all reporters say the same."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from attnprof.analysis.peak import Peak
from attnprof.analysis.steps import describe_steps
from attnprof.analysis.what_if.advice import Advice
from attnprof.report.allocator_summary import AllocatorSummary, summarise_allocator
from attnprof.report.cache_summary import CacheSummary, summarise_cache
from attnprof.report.fold import fold_names
from attnprof.report.notes import Note, collect_notes
from attnprof.report.verdict import measure_quadratic, write_verdict
from attnprof.run import Run


@dataclass(frozen=True, slots=True)
class Holder:
    """Layers that hold the same number of bytes of one category at the peak."""

    layer: str
    """The folded name; empty for what no module made."""
    count: int
    """How many layers the name stands for."""
    category: str
    each_bytes: int
    """What each of them holds."""
    size_bytes: int
    """What they hold together."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive attention layers that are alike in everything but their name."""

    layer: str
    """The folded name."""
    count: int
    row: dict[str, Any]
    """The columns of `Run.layers`, but for ``layer``."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One run, as reports tell it."""

    run: Run
    peak: Peak
    step: int | None
    """The step that was asked for; None for the whole run."""
    categories: dict[str, int]
    """Bytes at the peak, largest first; they sum to the peak."""
    quadratic: dict[str, int]
    """Bytes at the peak that grow with n², by category."""
    holders: list[Holder]
    """Who holds the peak, largest first."""
    layers: list[LayerGroup]
    steps: pl.DataFrame
    """`Run.steps`, of the peak's device."""
    advice: list[Advice]
    """What would lower the peak of the whole run, the largest saving first."""
    notes: list[Note]
    verdict: str
    cache: CacheSummary | None = None
    """What inference keeps; None where nothing is kept."""
    allocator: AllocatorSummary | None = None
    """What the allocator had reserved, and what failed; None where its history is not known."""


def summarise(run: Run, *, step: int | None = None, device: str | None = None) -> Summary:
    """Gather what reports say about ``run``.

    Args:
        run: The run.
        step: Speak of the peak within this step.
        device: Speak of this device's memory; without it, as `Run.peak` chooses.

    Raises:
        ValueError: The run has no such step or device.
    """
    peak = run.peak(step=step, device=device)
    layers = run.layers()
    has_blocks = len(run.allocations) > 0
    return Summary(
        run=run,
        peak=peak,
        step=step,
        categories=peak.by_category(),
        quadratic=measure_quadratic(peak, layers),
        holders=find_holders(peak),
        layers=group_layers(layers),
        steps=describe_steps(run.attribution, device=peak.device) if has_blocks else pl.DataFrame(),
        advice=run.advice(device=peak.device) if has_blocks else [],
        notes=collect_notes(run, peak),
        verdict=write_verdict(peak, layers, step=step, has_ops=not run.is_imported),
        cache=summarise_cache(run, device=peak.device) if has_blocks else None,
        allocator=summarise_allocator(run, peak),
    )


def find_holders(peak: Peak) -> list[Holder]:
    """Return who holds the peak: layer and category, alike layers folded, largest first."""
    alike: dict[tuple[str, int], list[str]] = {}
    for layer, category, size in peak.by_layer().iter_rows():
        alike.setdefault((category, size), []).append(layer)
    holders = [
        Holder(label, len(members), category, size, size * len(members))
        for (category, size), names in alike.items()
        for label, members in fold_names(names).items()
    ]
    return sorted(holders, key=lambda h: (-h.size_bytes, h.layer, h.category))


def group_layers(layers: pl.DataFrame) -> list[LayerGroup]:
    """Fold consecutive attention layers that are alike in all columns."""
    runs: list[tuple[dict[str, Any], list[str]]] = []
    for row in layers.iter_rows(named=True):
        name = row.pop("layer")
        if runs and runs[-1][0] == row:
            runs[-1][1].append(name)
        else:
            runs.append((row, [name]))
    return [
        LayerGroup(label, len(members), row)
        for row, names in runs
        for label, members in fold_names(names).items()
    ]
