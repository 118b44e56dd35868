"""The growth report as text: rich renderables, colourful on a terminal and plain in a pipe."""

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attnprof.analysis.fits import TOTAL, Fit
from attnprof.palette import colour_of
from attnprof.report.growth_notes import collect_growth_notes
from attnprof.report.growth_summary import GrowthSummary, Point, find_residual
from attnprof.report.growth_verdict import (
    format_exponent,
    format_law,
    write_growth_verdict,
)
from attnprof.report.tables import Bar, Column, FittedTable, show_name
from attnprof.report.text import heading, label_layer, render_notes
from attnprof.units import format_bytes

SOURCE_WORDS = {"measured": "measured", "dry_run": "dry run", "steps": "steps"}
"""What sources are called in tables."""


def render_growth_text(summary: GrowthSummary) -> RenderableType:
    """Return the whole report."""
    parts: list[RenderableType] = [
        _render_header(summary),
        Text(),
        Text(show_name(write_growth_verdict(summary)), style="bold"),
    ]
    for title, body in (
        (f"{_name_focus(summary)} by length", render_lengths(summary)),
        ("Law by category", _render_laws(summary)),
        ("Law by layer", _render_layers(summary)),
        ("How far to trust this", render_notes(collect_growth_notes(summary))),
    ):
        if body is not None:
            parts += [Text(), heading(title), Padding(body, (0, 0, 0, 2))]
    return Group(*parts)


def _name_focus(summary: GrowthSummary) -> str:
    return "Peak" if summary.focus == TOTAL else f"Most bytes of {summary.focus}"


def _render_header(summary: GrowthSummary) -> Text:
    header = Text.assemble(("attnprof", "bold"), "  ", show_name(summary.name), "\n")
    where = [] if summary.path is None else [str(summary.path)]
    return header.append(" · ".join(show_name(word) for word in (*where, *summary.about)))


def render_lengths(summary: GrowthSummary) -> RenderableType | None:
    """Return a row per length: what each source found, the law, and how far off that is."""
    if not summary.points:
        return None
    fit = summary.fit
    sources = list_sources(summary)
    lengths = sorted({point.seq_len for point in summary.points})
    largest = max((p.held_bytes(summary.focus) or 0 for p in summary.points), default=0)
    rows = [_length_row(summary, n, sources, fit, largest) for n in lengths]
    columns = [
        Column("n", right=True),
        *(Column(SOURCE_WORDS[source], right=True) for source in sources),
        *([Column("law", right=True, drop=2), Column("off by", right=True)] if fit else []),
        Column("", drop=1),
    ]
    return FittedTable(columns, rows)


def list_sources(summary: GrowthSummary) -> list[str]:
    """Return the sources that occur, in the order in which they are shown."""
    found = {point.source for point in summary.points}
    return [source for source in SOURCE_WORDS if source in found]


def _length_row(
    summary: GrowthSummary, seq_len: int, sources: list[str], fit: Fit | None, largest: int
) -> list[Any]:
    points = [p for source in sources for p in summary.find_points(source) if p.seq_len == seq_len]
    by_source = {point.source: point for point in points}
    cells = [show_size(by_source.get(source), summary.focus) for source in sources]
    row: list[Any] = [f"{seq_len:,}", *cells]
    if fit is not None:
        row += [format_bytes(fit.predict(seq_len)), show_residual(fit, by_source.get(fit.source))]
    size = max((p.held_bytes(summary.focus) or 0 for p in points), default=0)
    return [*row, Bar(size / largest if largest else 0.0, colour_of("preexisting"))]


def show_size(point: Point | None, category: str) -> str:
    """Return the most bytes of a category, or why they are not known."""
    if point is None:
        return "–"
    size = point.held_bytes(category)
    if point.is_done and size is not None:
        return format_bytes(size)
    return point.status.replace("_", " ")


def show_residual(fit: Fit, point: Point | None) -> str:
    """Return how far a point is from its law: ``"+0.3 %"``."""
    residual = None if point is None else find_residual(fit, point)
    return "–" if residual is None else f"{100 * residual:+.2f} %"


def _render_laws(summary: GrowthSummary) -> RenderableType | None:
    if not summary.fits:
        return None
    longest = next(p for p in summary.points if p.sizes and p.seq_len == summary.longest)
    rows: list[list[Any]] = []
    for name, fit in summary.fits.items():
        size = longest.sizes.get(name, 0)
        style = "bold" if name == TOTAL else colour_of(name)
        rows.append(
            [
                Text(name, style=style),
                format_exponent(fit),
                format_law(fit.pieces[fit.phase][-1]),
                fit.phase,
                format_bytes(size),
            ]
        )
    columns = [
        Column("category"),
        Column("exponent"),
        Column("law", drop=2),
        Column("in", drop=1),
        Column(f"at n = {summary.longest:,}", right=True),
    ]
    return FittedTable(columns, rows)


def _render_layers(summary: GrowthSummary) -> RenderableType | None:
    if not summary.layer_laws:
        return None
    rows: list[list[Any]] = [
        [
            label_layer(law.layer, law.count),
            Text(law.fit.category, style=colour_of(law.fit.category)),
            format_exponent(law.fit),
            format_law(law.fit.pieces[law.fit.phase][-1]),
            format_bytes(law.each_bytes),
        ]
        for law in summary.layer_laws
    ]
    columns = [
        Column("layer", is_name=True),
        Column("category"),
        Column("exponent", drop=1),
        Column("law of each", drop=2),
        Column("each", right=True),
    ]
    return FittedTable(columns, rows)
