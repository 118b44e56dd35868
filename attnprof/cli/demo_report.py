"""What the demo says at its end: predicted from one run, measured in the other."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attnprof.report.compare import compare_peaks
from attnprof.report.compare_text import render_changes
from attnprof.report.tables import Column, FittedTable, show_name
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
    saved = before.total_bytes - after.total_bytes
    changes = render_changes(compare_peaks(before, after), first="materialised", second="fused")
    quadratic = measure_quadratic(before, materialised.layers())
    subtracted = before.total_bytes - sum(quadratic.values())
    sentence = (
        f"Fused attention lowers the peak from {format_bytes(before.total_bytes)} to "
        f"{format_bytes(after.total_bytes)}: it saves {format_bytes(saved)}, "
        f"{format_share(saved, before.total_bytes)}."
    )
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
            [name, format_bytes(peak.total_bytes), how, show_name(f"{peak.phase}, {peak.layer}")]
            for name, peak, how in rows
        ],
    )
    return Group(
        Text(sentence, style="bold"),
        Text(),
        heading("Predicted, then measured"),
        Padding(peaks, (0, 0, 0, 2)),
        Text(f"  The prediction is off by {_describe_error(error, after.total_bytes)}."),
        Text(
            "  It replays the run without what fused attention leaves out. Subtracting that from\n"
            f"  the peak would have said {format_bytes(subtracted)}, but the peak moves elsewhere."
        ),
        Text(),
        heading("Category by category, each run at its own peak"),
        Padding(changes, (0, 0, 0, 2)),
        Text(),
        heading("The training did not change"),
        Padding(_render_losses(losses), (0, 0, 0, 2)),
    )


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
