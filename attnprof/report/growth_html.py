"""The growth report as a page: one file, no network, readable without its script."""

from html import escape

from attnprof.analysis.fits import TOTAL, Fit
from attnprof.report.growth_notes import collect_growth_notes
from attnprof.report.growth_plot import (
    Plot,
    describe_plot,
    draw_key,
    draw_plot,
    draw_residuals,
    plan_plot,
)
from attnprof.report.growth_summary import GrowthSummary, LayerLaw
from attnprof.report.growth_text import SOURCE_WORDS, list_sources, show_residual, show_size
from attnprof.report.growth_verdict import (
    format_fraction,
    format_interval,
    format_law,
    format_power,
    write_growth_verdict,
)
from attnprof.report.html_parts import (
    Cell,
    fill_page,
    label_category,
    make_notes,
    make_row,
    make_section,
    make_table,
    make_tiles,
    show_layer,
)
from attnprof.report.verdict import format_share
from attnprof.units import format_bytes


def render_growth_html(summary: GrowthSummary) -> str:
    """Return the page. Whatever came from the sweep is escaped."""
    plot = plan_plot(summary)
    ended = [point for point in summary.points if not point.is_done]
    where = "a temporary directory" if summary.path is None else str(summary.path)
    return fill_page(
        name=summary.name,
        status=f"{len(summary.points)} points",
        is_good=len(ended) < len(summary.points),
        meta=" · ".join(summary.about),
        verdict=write_growth_verdict(summary),
        sections=[
            _section_tiles(summary),
            _section_plot(summary, plot),
            _section_laws(summary),
            _section_layers(summary),
            make_notes(collect_growth_notes(summary)),
        ],
        footer=f"Recorded by attnprof in {where}. 1 KiB is 1024 bytes. This page needs no network.",
        data=describe_plot(plot),
        styles=["page.css", "growth.css"],
        script="growth.js",
    )


def _section_tiles(summary: GrowthSummary) -> str:
    fit = summary.fit
    walls = [c for c in summary.capacities if c.wall is not None]
    nearest = min(walls, key=lambda c: c.wall.seq_len if c.wall else 0, default=None)
    longest = summary.longest
    tiles = []
    if fit is not None:
        what = "the peak" if summary.focus == TOTAL else summary.focus
        tiles.append((format_power(fit), f"growth of {what}: {fit.law}"))
    if nearest is not None and nearest.wall is not None:
        tiles.append((f"n = {nearest.wall.seq_len:,}", f"the wall: {nearest.name}"))
    if longest is not None:
        tiles.append((format_bytes(summary.largest_bytes), f"peak at n = {longest:,}"))
    if fit is not None:
        error = format_fraction(fit.max_relative_error)
        tiles.append((error, "largest error of the law at a known length"))
    return make_tiles([("", large, small) for large, small in tiles])


def _section_plot(summary: GrowthSummary, plot: Plot | None) -> str:
    if plot is None:
        return ""
    fit = summary.fit
    below = "" if fit is None else _residual_block(plot, fit)
    body = (
        f'<div class="beside"><div>{draw_plot(plot)}{draw_key(plot)}{_legend(plot)}{below}</div>'
        f"{_lengths_table(summary)}</div>"
    )
    why = "The most bytes live at any instant, of all categories and of the largest. "
    if any(c.wall is not None and c.wall.counts == "reserved" for c in summary.capacities):
        why += "A wall is where the allocator reserves a whole capacity for them, which is more. "
    why += "Both axes are logarithmic."
    return make_section("Peak memory against sequence length", why, body)


def _residual_block(plot: Plot, fit: Fit) -> str:
    title = '<p class="why">Residuals: what was found, less the law, as a share of the law.</p>'
    return title + draw_residuals(plot, fit)


def _legend(plot: Plot) -> str:
    """Return the lines' names, with a box that hides each and its bytes where the cursor is."""
    longest = plot.summary.longest
    sizes = next((p.sizes for p in plot.summary.points if p.seq_len == longest and p.is_done), {})
    entries = []
    for name in plot.series:
        label = '<i class="swatch total"></i>total' if name == TOTAL else label_category(name)
        size = format_bytes(sizes[name]) if name in sizes else "–"
        entries.append(
            f'<li><label><input type="checkbox" class="needs-script" checked '
            f'data-toggles="{escape(name)}">{label}</label><b>{size}</b></li>'
        )
    at = "" if longest is None else f"At n = {longest:,}"
    return (
        f'<div class="tools"><output>{at}</output></div><ul class="legend">{"".join(entries)}</ul>'
    )


def _lengths_table(summary: GrowthSummary) -> str:
    fit = summary.fit
    sources = list_sources(summary)
    rows = []
    for n in sorted({point.seq_len for point in summary.points}):
        own = {point.source: point for point in summary.points if point.seq_len == n}
        cells: list[Cell] = [("num", f"{n:,}")]
        cells += [("num", escape(show_size(own.get(source), summary.focus))) for source in sources]
        if fit is not None:
            cells.append(("num middle", format_bytes(fit.predict(n))))
            cells.append(("num", escape(show_residual(fit, own.get(fit.source)))))
        rows.append(make_row(cells))
    head: list[Cell] = [("num", "n"), *(("num", SOURCE_WORDS[source]) for source in sources)]
    if fit is not None:
        head += [("num middle", "law"), ("num", "off by")]
    return f'<div class="lengths">{make_table(head, rows)}</div>'


def _section_laws(summary: GrowthSummary) -> str:
    if not summary.fits or summary.longest is None:
        return ""
    longest = next(p for p in summary.points if p.seq_len == summary.longest and p.is_done)
    held: dict[str, int] = {TOTAL: summary.largest_bytes}
    for holder in summary.holders:
        held[holder.category] = held.get(holder.category, 0) + holder.size_bytes
    rows = [
        make_row(
            [
                ("word", name if name == TOTAL else label_category(name)),
                ("word", format_power(fit)),
                ("word middle", format_interval(fit)),
                ("middle", escape(format_law(fit.pieces[fit.phase][-1]))),
                ("word wide", escape(fit.phase)),
                ("num", format_bytes(longest.sizes.get(name, 0))),
                ("num middle", escape(_show_held(held.get(name, 0), summary.largest_bytes))),
            ]
        )
        for name, fit in summary.fits.items()
    ]
    head = [
        ("", "category"),
        ("", "exponent"),
        ("middle", "interval"),
        ("middle", "law"),
        ("wide", "in"),
        ("num", f"most at n = {summary.longest:,}"),
        ("num middle", "at the peak of all"),
    ]
    why = (
        "The most bytes of each category, at its own highest instant, and what it holds at that "
        "of all; its exponent is of what grows above the constant part, with its 95 % interval."
    )
    return make_section("Law by category", why, make_table(head, rows))


def _show_held(size_bytes: int, total_bytes: int) -> str:
    return f"{format_bytes(size_bytes)}, {format_share(size_bytes, total_bytes)}"


def _section_layers(summary: GrowthSummary) -> str:
    if not summary.layer_laws:
        return ""
    head = [
        ("", "layer"),
        ("", "category"),
        ("middle", "exponent"),
        ("wide", "law of each"),
        ("num", f"each, at n = {summary.longest:,}"),
    ]
    why = (
        "The most that one layer holds of a category. Layers that hold the same at every length "
        "are folded into one row."
    )
    rows = [_layer_row(law) for law in summary.layer_laws]
    return make_section("Law by layer", why, make_table(head, rows))


def _layer_row(law: LayerLaw) -> str:
    return make_row(
        [
            ("name", show_layer(law.layer, law.count)),
            ("word", label_category(law.fit.category)),
            ("word middle", format_power(law.fit)),
            ("wide", escape(format_law(law.fit.pieces[law.fit.phase][-1]))),
            ("num", format_bytes(law.each_bytes)),
        ]
    )
