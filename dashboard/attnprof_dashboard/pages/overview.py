"""Overview: whose bytes were at the peak, at a glance."""

from typing import Any

import numpy as np
from dash import html
from dash.development.base_component import Component

from attnprof.palette import colour_of, stack_order
from attnprof.report.verdict import format_share
from attnprof.report.words import OUTSIDE, explain
from attnprof.units import format_bytes
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.components.legend import show_legend
from attnprof_dashboard.data.timeline_index import Window
from attnprof_dashboard.figures.timeline import MOST_SPANS, Marks, draw_timeline, tabulate
from attnprof_dashboard.pages.page import Page, Subject
from attnprof_dashboard.table import Column, Table, Unit

_BINS = 300
_MOST_HOLDERS = 10
_PEAK_COUNTER = "allocated_bytes.all.peak"
_SAID = ("status", "unattributed", "files")


def layout(subject: Subject) -> Component:
    """Return the page; nothing where nothing was recorded, which every page says at its top."""
    if not subject.summary["peak"]["total_bytes"]:
        return html.Div()
    found = charts(subject)
    cards = {chart.key: chart_card(chart, "overview") for chart in found[2:]}
    legend = show_legend(subject.device.facts["categories"], subject.device.phases)
    cards["timeline"] = chart_card(found[1], "overview", legend)
    return html.Div(
        [
            html.P(subject.summary["verdict"], className="verdict"),
            *_warn(subject),
            _tiles(subject),
            html.Div([_stack(subject, found[0]), cards["timeline"]], className="wide"),
            html.Div([cards["holders"], cards["advice"]], className="wide"),
        ]
    )


def _warn(subject: Subject) -> list[Component]:
    """Return what reports warn of, but for what the page says elsewhere."""
    notes = [n for n in subject.summary["notes"] if n["is_warning"] and n["subject"] not in _SAID]
    return [message(n["subject"].capitalize(), f"{n['text']}.", is_bad=True) for n in notes]


def charts(subject: Subject) -> list[Chart]:
    """Return the categories, the small timeline, who holds the peak and what would lower it."""
    return [
        Chart(
            "categories",
            "Peak by category",
            "Every byte that was live at the instant of the peak, by what it is for.",
            _tabulate_categories(subject),
        ),
        _draw_timeline(subject),
        Chart(
            "holders",
            f"The {_MOST_HOLDERS} largest holders of the peak",
            "Layers that hold the same number of bytes of one category are folded into one row.",
            _tabulate_holders(subject),
        ),
        Chart(
            "advice",
            "What would lower it",
            "The run replayed with each change: the peak moves, so bytes cannot just be "
            "subtracted from it. “no” under exact marks estimates.",
            _tabulate_advice(subject),
        ),
    ]


def _tiles(subject: Subject) -> Component:
    peak = subject.summary["peak"]
    total, quadratic = peak["total_bytes"], peak["quadratic_bytes"]
    unattributed = peak["unattributed_bytes"]
    layer = peak["layer"] or OUTSIDE
    return tiles(
        tile(format_bytes(total), f"peak on {peak['device']}, step {peak['step']}: {layer}"),
        tile(
            format_share(quadratic, total),
            f"attention that grows with n²: {format_bytes(quadratic)}",
        ),
        tile(*_describe_fused(subject)),
        tile(*_describe_reserved(subject)),
        tile(
            format_share(unattributed, total),
            f"unattributed: {format_bytes(unattributed)}",
        ),
        _reconcile(subject),
    )


def _describe_fused(subject: Subject) -> tuple[str, str]:
    """Return the peak with fused attention, as a replay gives it."""
    fused = next((a for a in subject.summary["advice"] if a["kind"] == "fused_attention"), None)
    if fused is not None:
        saved = format_bytes(fused["saves_bytes"])
        return format_bytes(fused["new_peak_bytes"]), f"peak if fused: {saved} less"
    if subject.digest.info.get("snapshot"):
        return "–", "peak if fused: a snapshot has no operators to replay"
    return "–", "peak if fused: no attention here that would gain from it"


def _describe_reserved(subject: Subject) -> tuple[str, str]:
    """Return what the allocator keeps beyond live tensors, where that is known."""
    state = subject.summary["memory_state"]
    if state is not None and state["reserved_bytes"]:
        reserved = state["reserved_bytes"]
        gap, how = reserved - state["allocated_bytes"], "at the peak"
    else:
        most = find_reserved(subject)
        if most is None:
            is_cpu = subject.device.name == "cpu"
            why = "the CPU has no caching allocator" if is_cpu else "not recorded"
            return "–", f"reserved − allocated: {why}"
        reserved, gap = most, most - subject.summary["peak"]["total_bytes"]
        how = "simulated" if subject.digest.facts["is_dry"] else "recorded"
    return format_bytes(gap), f"reserved − allocated ({how}), of {format_bytes(reserved)}"


def find_reserved(subject: Subject) -> int | None:
    """Return the most bytes that the allocator ever reserved; None if it is not known."""
    allocator = subject.device.facts["allocator"]
    if allocator is not None and allocator["is_recorded"]:
        return int(allocator["reserved_peak_bytes"])
    steps = subject.device.steps
    most = steps["reserved_bytes"].max() if "reserved_bytes" in steps.columns else None
    return most if isinstance(most, int) else None


def _reconcile(subject: Subject) -> Component:
    """Return the badge: whether what has a name sums to what was live, and to torch's counter."""
    device = subject.device
    event = device.peak_event
    named = sum(int(v[0]) for v in device.index.categories_at(np.array([event])).values())
    total = subject.summary["peak"]["total_bytes"]
    counted = next((c for c in device.facts["counters"] if c["counter"] == _PEAK_COUNTER), None)
    is_equal = named == total
    if counted is None:
        word = "sums to the peak" if is_equal else "does not sum"
        text = f"categories: {named:,} B; peak: {total:,} B"
    else:
        is_equal = is_equal and counted["counted_bytes"] == total
        word = "equals torch's count" if is_equal else "differs from torch"
        text = f"categories: {named:,} B; torch counted {counted['counted_bytes']:,} B"
    kind = "badge good" if is_equal else "badge bad"
    badge = html.B(word, className=kind)
    return html.Div([html.Div(badge, className="tile-value"), html.Span(text)], className="tile")


def _stack(subject: Subject, chart: Chart) -> Component:
    """Return the peak as one bar, and the table of what each part is."""
    peak = subject.summary["peak"]
    categories, total = peak["by_category"], peak["total_bytes"] or 1
    parts = [
        html.I(
            style={
                "width": f"{100 * categories[name] / total:.4f}%",
                "background": colour_of(name),
            },
            title=f"{name}: {format_bytes(categories[name])}",
        )
        for name in sorted(categories, key=stack_order)
    ]
    return chart_card(chart, "overview", above=[html.Div(parts, className="stack")])


def _tabulate_categories(subject: Subject) -> Table:
    peak = subject.summary["peak"]
    total = peak["total_bytes"] or 1
    columns = (
        Column("category", Unit.CATEGORY),
        Column("size_bytes", Unit.BYTES, "bytes"),
        Column("share", Unit.SHARE),
        Column("meaning", Unit.PROSE),
    )
    rows = [[k, v, v / total, explain(k)] for k, v in peak["by_category"].items()]
    return Table(columns, rows)


def _draw_timeline(subject: Subject) -> Chart:
    index, peak = subject.device.index, subject.summary["peak"]
    window = index.window(index.begin_ns, index.end_ns, _BINS)
    event = subject.device.peak_event
    mark = (
        (int(index.time_ns[event]) - subject.begin_ns, peak["total_bytes"]) if event >= 0 else None
    )
    figure = draw_timeline(
        window,
        Marks(
            begin_ns=subject.begin_ns,
            peak=mark,
            spans=list_spans(subject, window),
            gaps=list_gaps(subject),
        ),
        scheme=subject.scheme,
        height=360,
    )
    figure.update_layout(dragmode=False)
    names = list(tabulate(window, subject.begin_ns))
    table = Table(
        tuple(Column(n, Unit.SECONDS if n == "seconds" else Unit.BYTES) for n in names),
        list(zip(*(c.tolist() for c in tabulate(window, subject.begin_ns).values()), strict=True)),
    )
    why, gestures = f"Live bytes on {subject.device.name}.", "Zoom and click on the Timeline page."
    return Chart("timeline", "Over time", why, table, figure, gestures)


def list_spans(subject: Subject, window: Window) -> list[tuple[str, int, int]]:
    """Return the phases in a window: name, begin and end since the run began."""
    begin = subject.begin_ns
    first, last = int(window.time_ns[0]), int(window.time_ns[-1])
    found = subject.device.spans_between(first, last, MOST_SPANS)
    return [(name, first - begin, last - begin) for name, first, last in found]


def list_gaps(subject: Subject) -> list[tuple[int, int]]:
    """Return the stretches whose steps were only counted: begin and end since the run began."""
    steps = subject.device.steps
    if "is_detailed" not in steps.columns:
        return []
    counted = steps.filter(~steps["is_detailed"]).select("step", "begin_ns", "end_ns")
    gaps: list[tuple[int, int]] = []
    before = None
    for step, begin, end in counted.iter_rows():
        first = gaps.pop()[0] if gaps and step - 1 == before else begin - subject.begin_ns
        gaps.append((first, end - subject.begin_ns))
        before = step
    return gaps


def _tabulate_holders(subject: Subject) -> Table:
    total = subject.summary["peak"]["total_bytes"] or 1
    columns = (
        Column("layer", Unit.NAME),
        Column("count", Unit.COUNT, "×"),
        Column("category", Unit.CATEGORY),
        Column("each_bytes", Unit.BYTES),
        Column("size_bytes", Unit.BYTES, "bytes"),
        Column("share", Unit.SHARE),
    )
    rows: list[list[Any]] = [
        [h["layer"] or OUTSIDE, h["count"], h["category"], h["each_bytes"], h["size_bytes"],
         h["size_bytes"] / total]
        for h in subject.summary["holders"][:_MOST_HOLDERS]
    ]  # fmt: skip
    return Table(columns, rows)


def _tabulate_advice(subject: Subject) -> Table:
    columns = (
        Column("title", Unit.NAME, "change"),
        Column("new_peak_bytes", Unit.BYTES),
        Column("saves_bytes", Unit.BYTES, "saves"),
        Column("exact", Unit.BOOL),
        Column("how", Unit.PROSE),
    )
    return Table.of(columns, subject.summary["advice"])


PAGE = Page("overview", "Overview", "Whose bytes were at the peak", layout, charts)
