"""The report as a page: one file, no network, readable without its script."""

from collections.abc import Sequence
from html import escape
from typing import Any

from attnprof.analysis.what_if.advice import Advice
from attnprof.palette import colour_of, stack_order
from attnprof.report.advice_text import MOST_ADVICE, show_place, show_size
from attnprof.report.html_allocator import make_allocator
from attnprof.report.html_cache import make_cache
from attnprof.report.html_parts import (
    Cell,
    fill_page,
    label_category,
    make_notes,
    make_row,
    make_section,
    make_table,
    make_tiles,
    percent,
    show_layer,
)
from attnprof.report.html_timeline import describe_drawing, draw_summary, make_timeline
from attnprof.report.notes import head_status
from attnprof.report.summary import Holder, LayerGroup, Summary
from attnprof.report.text import (
    describe_run,
    find_environment,
    format_shape,
    has_layers,
    pick_steps,
)
from attnprof.report.verdict import format_share
from attnprof.report.words import explain, format_seconds
from attnprof.units import format_bytes

_MAX_ROWS = 15
"""Of the table of who holds the peak; the JSON report has all."""


def render_html(summary: Summary) -> str:
    """Return the page. Whatever came from the run is escaped."""
    drawing = draw_summary(summary)
    status, is_good = head_status(summary.run)
    sections = [
        _section_tiles(summary) if summary.peak.total_bytes else "",
        _section_categories(summary),
        make_timeline(summary, drawing),
        _section_holders(summary),
        make_allocator(summary.allocator),
        _section_advice(summary.advice),
        _section_layers(summary.layers) if has_layers(summary) else "",
        make_cache(summary.cache),
        _section_steps(summary),
        make_notes(summary.notes),
    ]
    name = summary.run.path.resolve().name or str(summary.run.path)
    version = find_environment(summary).get("attnprof") or ""
    return fill_page(
        name=name,
        status=status,
        is_good=is_good,
        meta=" · ".join(describe_run(summary)),
        verdict=summary.verdict,
        sections=sections,
        footer=(
            f"Recorded by attnprof {version} in {summary.run.path}. "
            "1 KiB is 1024 bytes. This page needs no network."
        ),
        data=describe_drawing(summary, drawing),
        styles=["page.css", "cache.css"],
        script="page.js",
    )


def _section_tiles(summary: Summary) -> str:
    peak = summary.peak
    quadratic = sum(summary.quadratic.values())
    unattributed = summary.categories.get("unattributed", 0)
    tiles = [
        ("", format_bytes(peak.total_bytes), f"peak on {peak.device}"),
        (
            "",
            format_share(quadratic, peak.total_bytes),
            f"grows with n²: {format_bytes(quadratic)}",
        ),
        ("small", peak.layer, f"step {peak.step}, {peak.phase}"),
        (
            "",
            format_share(unattributed, peak.total_bytes),
            f"unattributed: {format_bytes(unattributed)}",
        ),
    ]
    return make_tiles(tiles)


def _section_categories(summary: Summary) -> str:
    total = summary.peak.total_bytes
    if not total:
        return ""
    largest = max(summary.categories.values())
    rows = [
        make_row(
            [
                ("word", label_category(name)),
                ("num", format_bytes(size)),
                ("num", escape(format_share(size, total))),
                ("bar middle", _bar(size / largest, name)),
                ("quiet wide", escape(explain(name))),
            ]
        )
        for name, size in summary.categories.items()
    ]
    end: list[Cell] = [("", "total"), ("num", format_bytes(total)), ("num", "100 %")]
    rows.append(make_row([*end, ("middle", ""), ("wide", "")], "total"))
    head = [("", "category"), ("num", "bytes"), ("num", "share"), ("middle", ""), ("wide", "")]
    why = "Every byte that was live at the instant of the peak, by what it is for."
    return make_section("Peak by category", why, _stack(summary) + make_table(head, rows))


def _bar(fraction: float, category: str) -> str:
    return f'<i style="width:{percent(fraction)};background:{colour_of(category)}"></i>'


def _stack(summary: Summary) -> str:
    """Return the peak as one bar, what grows with n² bracketed."""
    total = summary.peak.total_bytes
    bars, left, braces = [], 0.0, []
    for name in sorted(summary.categories, key=stack_order):
        size = summary.categories[name]
        label = escape(f"{name}: {format_bytes(size)}, {format_share(size, total)}", quote=True)
        bars.append(
            f'<i style="left:{percent(left)};width:{percent(size / total)};'
            f'background:{colour_of(name)}" title="{label}"></i>'
        )
        if summary.quadratic.get(name):
            braces.append((left, left + summary.quadratic[name] / total))
        left += size / total
    stack = f'<div class="stack">{"".join(bars)}</div>'
    if not braces:
        return stack + '<div class="brace"></div>'
    begin, end = braces[0][0], braces[-1][1]
    middle = (begin + end) / 2
    size = sum(summary.quadratic.values())
    text = escape(f"grows with n²: {format_bytes(size)}, {format_share(size, total)}")
    return stack + (
        f'<div class="brace"><i style="left:{percent(begin)};width:{percent(end - begin)}"></i>'
        f'<b style="left:{percent(middle)};transform:translateX({percent(-middle)})">{text}</b>'
        "</div>"
    )


def _section_holders(summary: Summary) -> str:
    if not summary.holders:
        return ""
    total = summary.peak.total_bytes
    rows = [_holder_row(holder, total) for holder in summary.holders[:_MAX_ROWS]]
    rest = summary.holders[_MAX_ROWS:]
    if rest:
        size = sum(holder.size_bytes for holder in rest)
        cells: list[Cell] = [("quiet", f"{len(rest)} more"), ("", ""), ("num middle", "")]
        share = escape(format_share(size, total))
        rows.append(make_row([*cells, ("num", format_bytes(size)), ("num middle", share)]))
    head = [
        ("", "layer"),
        ("", "category"),
        ("num middle", "each"),
        ("num", "bytes"),
        ("num middle", "share"),
    ]
    why = "Layers that hold the same number of bytes are folded into one row."
    return make_section("Who holds the peak", why, make_table(head, rows))


def _holder_row(holder: Holder, total: int) -> str:
    return make_row(
        [
            ("name", show_layer(holder.layer, holder.count)),
            ("word", label_category(holder.category)),
            ("num middle quiet", format_bytes(holder.each_bytes) if holder.count > 1 else ""),
            ("num", format_bytes(holder.size_bytes)),
            ("num middle", escape(format_share(holder.size_bytes, total))),
        ]
    )


def _section_advice(advice: Sequence[Advice]) -> str:
    if not advice:
        return ""
    head = [
        ("", "change"),
        ("num", "new peak"),
        ("num", "saves"),
        ("num middle", "share"),
        ("wide", "the peak then is in"),
        ("", "what does it"),
    ]
    rows = [
        make_row(
            [
                ("name", escape(one.title)),
                ("num", escape(show_size(one.new_peak_bytes, exact=one.exact))),
                ("num", format_bytes(one.saves_bytes)),
                ("num middle", escape(_share_of(one))),
                ("quiet wide", escape(show_place(one.new_peak_phase, one.new_peak_layer))),
                ("name quiet", escape(one.how)),
            ]
        )
        for one in advice[:MOST_ADVICE]
    ]
    why = (
        "The run replayed with each change: the peak moves, so bytes cannot just be subtracted "
        "from it. ~ marks estimates."
    )
    return make_section("What would lower it", why, make_table(head, rows))


def _share_of(advice: Advice) -> str:
    return format_share(advice.saves_bytes, advice.new_peak_bytes + advice.saves_bytes)


def _section_layers(groups: Sequence[LayerGroup]) -> str:
    why = (
        "Softmax: the results of one call. Saved: what autograd keeps between QKᵀ and PV. "
        "Predicted: what theory says it keeps."
    )
    if not groups:
        none = "<p>None: no product of activations was followed by a second one.</p>"
        return make_section("Attention layers", "Found by data flow, never by name.", none)
    has_cache = any(group.row["kv_cache_bytes"] for group in groups)
    head = [
        ("", "layer"),
        ("", "kind"),
        ("middle", "B×H×Tq×Tk"),
        ("wide", "dtype"),
        ("num middle", "softmax"),
        ("num", "saved"),
        ("num middle", "predicted"),
        *([("num", "KV cache")] if has_cache else []),
        ("wide", "why"),
    ]
    rows = [_layer_row(group, has_cache=has_cache) for group in groups]
    return make_section("Attention layers", why, make_table(head, rows))


def _layer_row(group: LayerGroup, *, has_cache: bool) -> str:
    row = group.row
    cells: list[Cell] = [
        ("name", show_layer(group.layer, group.count)),
        ("word", escape(row["kind"])),
        ("word middle", escape(format_shape(row))),
        ("word wide", escape(row["dtype"] or "–")),
        ("num middle", format_bytes(row["softmax_bytes"])),
        ("num", format_bytes(row["saved_softmax_bytes"])),
        ("num middle", format_bytes(row["predicted_saved_bytes"])),
    ]
    if has_cache:
        cells.append(("num", format_bytes(row["kv_cache_bytes"])))
    return make_row([*cells, ("quiet wide", escape(row["backend_reason"]))])


def _section_steps(summary: Summary) -> str:
    steps = summary.steps
    if steps.is_empty():
        return ""
    head = [
        ("num", "step"),
        ("num", "n"),
        ("num middle", "batch"),
        ("num", "peak"),
        ("", "in"),
        ("num", "time"),
        ("num middle", "ops"),
    ]
    rows = [_step_row(row, summary.peak.step) for row in pick_steps(steps, summary.peak.step)]
    why = "The highest instant of each step; the row with the peak is shaded."
    return make_section("Steps", why, make_table(head, rows))


def _step_row(step: dict[str, Any] | int, peak_step: int) -> str:
    if isinstance(step, int):  # so many are left out
        blank = [("num", ""), ("num middle", ""), ("num", "")]
        return make_row(
            [("num", "…"), *blank, ("quiet", f"{step:,} more"), ("num", ""), ("num middle", "")]
        )
    cells: list[Cell] = [
        ("num", str(step["step"])),
        ("num", _or_dash(step["seq_len"])),
        ("num middle", _or_dash(step["batch"])),
        ("num", "–" if step["peak_bytes"] is None else format_bytes(step["peak_bytes"])),
        ("word", escape(step["peak_phase"] or "–") if step["is_detailed"] else "only counted"),
        ("num", format_seconds(step["wall_seconds"])),
        ("num middle", f"{step['ops']:,}" if step["ops"] else "–"),
    ]
    return make_row(cells, "peak" if step["step"] == peak_step else "")


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)
