"""A prediction as text."""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attnprof.report.advice_text import render_advice
from attnprof.report.prediction import (
    Prediction,
    collect_prediction_notes,
    write_horizon,
    write_prediction_verdict,
)
from attnprof.report.tables import Column, FittedTable, show_name
from attnprof.report.text import heading, render_categories, render_holders, render_notes
from attnprof.report.verdict import format_share
from attnprof.units import format_bytes

_MAX_HOLDERS = 6


def render_prediction_text(prediction: Prediction) -> RenderableType:
    """Return the whole report."""
    header = Text.assemble(("attnprof", "bold"), "  ", show_name(prediction.name), "\n")
    header.append(" · ".join(("dry run", *map(show_name, prediction.about))))
    style = "bold green" if prediction.fits else "bold red"
    parts: list[RenderableType] = [
        header,
        Text(),
        Text(show_name(write_prediction_verdict(prediction)), style=style),
    ]
    for title, body in (
        ("Memory", _render_memory(prediction)),
        ("Peak by category", render_categories(prediction.peak.by_category())),
        ("Who holds the peak", render_holders(prediction.holders, most=_MAX_HOLDERS)),
        ("The wall", Text(show_name(write_horizon(prediction)))),
        ("What would lower it", _render_changes(prediction)),
        ("How far to trust this", render_notes(collect_prediction_notes(prediction))),
    ):
        if body is not None:
            parts += [Text(), heading(title), Padding(body, (0, 0, 0, 2))]
    return Group(*parts)


def _render_memory(prediction: Prediction) -> RenderableType:
    peak, capacity = prediction.peak, prediction.machine.capacity_bytes
    where = f"step {peak.step}, {peak.phase}" + (f", {peak.layer}" if peak.layer else "")
    sizes = [
        ("live at the peak", peak.total_bytes, where),
        ("reserved for it", prediction.needed_bytes, "by the caching allocator"),
        ("available", capacity, f"on {prediction.machine.name}"),
    ]
    rows = [
        [name, format_bytes(size), format_share(size, capacity), show_name(note)]
        for name, size, note in sizes
    ]
    columns = [
        Column(""),
        Column("", right=True),
        Column("", right=True),
        Column("", is_name=True),
    ]
    return FittedTable(columns, rows, has_head=False)


def _render_changes(prediction: Prediction) -> RenderableType:
    nothing = Text("nothing that attnprof knows of would lower it by 1 % or more")
    return render_advice(prediction.advice) or nothing
