"""What the demo says at its end: predicted from one run, measured in the other."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attnprof.report.advice_text import show_place
from attnprof.report.compare import compare_peaks
from attnprof.report.compare_text import render_changes
from attnprof.report.tables import Column, FittedTable
from attnprof.report.text import heading
from attnprof.report.verdict import format_share, measure_quadratic
from attnprof.run import Run
from attnprof.units import format_bytes


def render_comparison(
    materialised: Run, fused: Run, losses: Mapping[str, Sequence[float]]
) -> RenderableType:
    """Return the comparison of the demo's two runs.

    Args:
        materialised: The run with score matrices in memory.
        fused: The same program with fused attention.
        losses: Per variant, the loss of each step.
    """
    before, after = materialised.peak(), fused.peak()
    predicted = materialised.what_if("fused_attention").after
    error = predicted.total_bytes - after.total_bytes
    changes = render_changes(compare_peaks(before, after), first="materialised", second="fused")
    quadratic = measure_quadratic(before, materialised.layers())
    subtracted = before.total_bytes - sum(quadratic.values())
    rows = [
        ("materialised", before, "measured"),
        ("fused", predicted, "predicted from the materialised run alone"),
        ("fused", after, "measured"),
    ]
    peaks = FittedTable(
        [
            Column("attention"),
            Column("peak", right=True),
            Column(""),
            Column("where", is_name=True),
        ],
        [
            [name, format_bytes(peak.total_bytes), how, show_place(peak.phase, peak.layer)]
            for name, peak, how in rows
        ],
    )
    return Group(
        Text(write_sentence(before.total_bytes, after.total_bytes), style="bold"),
        Text(),
        heading("Predicted, then measured"),
        Padding(peaks, (0, 0, 0, 2)),
        Text(f"  The prediction is off by {_describe_error(error, after.total_bytes)}."),
        Text(
            "  It replays the run without what fused attention leaves out. Subtracting that from\n"
            f"  the peak would have said {format_bytes(subtracted)}: but the peak can move, and\n"
            "  fused attention keeps something for backward, too."
        ),
        Text(),
        heading("Category by category, each run at its own peak"),
        Padding(changes, (0, 0, 0, 2)),
        Text(),
        heading(describe_losses(losses)),
        Padding(_render_losses(losses), (0, 0, 0, 2)),
    )


def write_sentence(before: int, after: int) -> str:
    """Return what became of the peak; at short lengths fused attention need not lower it."""
    saved = before - after
    change = f"the peak from {format_bytes(before)} to {format_bytes(after)}"
    share = format_share(abs(saved), before)
    if not saved:
        return (
            f"Fused attention saves nothing here: the peak stays at {format_bytes(before)}. "
            "Scores grow with n², so try a larger --seq-len."
        )
    if saved > 0:
        return f"Fused attention lowers {change}: it saves {format_bytes(saved)}, {share}."
    return (
        f"Fused attention saves nothing here: it takes {change}, {format_bytes(-saved)} ({share}) "
        "more. Scores grow with n², so try a larger --seq-len."
    )


def describe_losses(losses: Mapping[str, Sequence[float]]) -> str:
    """Return in a few words how far apart the variants' losses are."""
    steps = list(zip(*losses.values(), strict=True))
    if all(max(of_step) == min(of_step) for of_step in steps):
        return "The training did not change"
    # Fused attention sums in another order; every later step builds on what that has changed.
    if all(max(of_step) - min(of_step) <= 1e-3 * abs(min(of_step)) for of_step in steps):
        return "The training changed by rounding only"
    return "The training changed"


def _describe_error(error: int, measured: int) -> str:
    if not error:
        return "0 bytes (0.00 %)"
    return f"{format_bytes(error)} ({100 * error / measured:+.2f} % of what was measured)"


def _render_losses(losses: Mapping[str, Sequence[float]]) -> FittedTable:
    names = list(losses)
    rows = [
        [str(step), *(f"{loss:.6f}" for loss in of_step), f"{max(of_step) - min(of_step):.1e}"]
        for step, of_step in enumerate(zip(*losses.values(), strict=True))
    ]
    columns = [
        Column("step", right=True),
        *(Column(f"loss, {name}", right=True) for name in names),
        Column("difference", right=True),
    ]
    return FittedTable(columns, rows)
