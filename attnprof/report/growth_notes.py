"""How far a growth report can be trusted: its points, its law, its wall, its assumptions."""

import shlex

from attnprof.analysis.fits import Fit
from attnprof.report.growth_summary import GrowthSummary, find_shared_lengths
from attnprof.report.growth_verdict import BAD_FIT, format_fraction
from attnprof.report.notes import Note
from attnprof.store.lengths import STEPS
from attnprof.vocabulary import Status

_EXACT = 1e-6
"""Relative error below which a law is as good as its floating-point numbers."""
_WORDS = {"measured": "measured", "dry_run": "run dry", "steps": "taken from steps"}


def collect_growth_notes(summary: GrowthSummary) -> list[Note]:
    """Return the remarks on a report; where its points come from is always among them."""
    notes = [_note_points(summary), *_note_ends(summary)]
    fit = summary.fit
    if fit is not None:
        notes += [_note_law(fit), *_note_changes(fit)]
    notes += _note_agreement(summary)
    for capacity in summary.capacities:
        wall = capacity.wall
        if wall is not None:
            notes.append(Note("wall", f"{capacity.name}: {wall.sentence}"))
            is_device = not capacity.name[:1].isdigit()
            if is_device and wall.counts == "live":
                notes.append(_note_live(capacity.name))
        else:
            notes.append(Note("wall", f"{capacity.name}: {capacity.why_no_wall}", is_warning=True))
    if any(point.source == STEPS for point in summary.points):
        notes.append(Note("steps", "one run's steps; only those of one batch size are compared"))
    return notes + [Note("assumed", text) for text in summary.assumptions]


def _note_live(device: str) -> Note:
    text = (
        f"{device}: live bytes are less than a GPU's allocator reserves, and on a CPU other "
        f"kernels ran; for both: attnprof sweep … --dry-run --device {shlex.quote(device)}"
    )
    return Note("wall", text, is_warning=True)


def _note_points(summary: GrowthSummary) -> Note:
    counts = {
        source: sum(p.is_done for p in summary.find_points(source))
        for source in _WORDS
        if summary.find_points(source)
    }
    parts = [f"{count} {_WORDS[source]}" for source, count in counts.items()]
    return Note("lengths", ", ".join(parts) or "none", is_warning=not any(counts.values()))


def _note_ends(summary: GrowthSummary) -> list[Note]:
    """Say which lengths did not run to their end; running out of memory is a finding."""
    return [
        Note(
            f"n = {point.seq_len:,}",
            point.status.replace("_", " ") + (f": {point.reason}" if point.reason else ""),
            is_warning=point.status != Status.OUT_OF_MEMORY,
        )
        for point in summary.points
        if not point.is_done
    ]


def _note_law(fit: Fit) -> Note:
    lengths = fit.points["seq_len"].n_unique()
    error = fit.max_relative_error
    if lengths == 2:
        return Note("law", "two lengths lie on many laws; give three or more", is_warning=True)
    off = "exactly" if error < _EXACT else f"within {format_fraction(error)} of"
    text = f"{off} what was found at {lengths} lengths"
    return Note("law", text, is_warning=error > BAD_FIT)


def _note_changes(fit: Fit) -> list[Note]:
    return [
        Note(
            "change",
            f"the law of {change.phase} changes between n = {change.below:,} and "
            f"n = {change.above:,}, from {change.before.words} to {change.after.words}"
            + (f": {change.cause}" if change.cause else ""),
            is_warning=True,
        )
        for change in fit.changes
    ]


def _note_agreement(summary: GrowthSummary) -> list[Note]:
    """Compare dry runs with measured ones of the same lengths."""
    pairs = find_shared_lengths(summary.points)
    errors = {
        measured.seq_len: abs((dry.held_bytes() or 0) / size - 1)
        for measured, dry in pairs
        if (size := measured.held_bytes())
    }
    if not errors:
        return []
    worst = max(errors, key=lambda n: errors[n])
    if not errors[worst]:
        return [Note("dry runs", f"equal to measured peaks to the byte, at {len(errors)} lengths")]
    off = format_fraction(errors[worst])
    return [Note("dry runs", f"differ from measured peaks by at most {off}, at n = {worst:,}")]
