"""Layers: which layer holds what, at any instant, and when each of them holds most."""

from itertools import islice
from typing import Any

import numpy as np
import polars as pl
from dash import html
from dash.development.base_component import Component

from attnprof.analysis.fits import TOTAL
from attnprof.analysis.timeline import sample_timeline
from attnprof.palette import stack_order
from attnprof.report.words import OUTSIDE
from attnprof.units import format_bytes
from attnprof_dashboard import ids
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message
from attnprof_dashboard.components.controls import choose
from attnprof_dashboard.components.legend import show_legend
from attnprof_dashboard.data.timeline_index import Window
from attnprof_dashboard.figures.layers import MOST_LAYERS, draw_heatmap, draw_own_peaks, natural_key
from attnprof_dashboard.figures.timeline import Marks, draw_timeline, tabulate
from attnprof_dashboard.pages.overview import list_spans
from attnprof_dashboard.pages.page import Page, Subject
from attnprof_dashboard.table import Column, Table, Unit

_BINS = 200
_MOST_STEPS = 300
"""Steps that can be chosen from the list; any instant can be clicked."""
_LAYER_COLUMNS = (
    Column("layer", Unit.NAME),
    Column("kind"),
    Column("calls", Unit.COUNT),
    Column("batch", Unit.COUNT, "B"),
    Column("heads", Unit.COUNT, "H"),
    Column("kv_heads", Unit.COUNT, "Hkv"),
    Column("q_len", Unit.COUNT, "Tq"),
    Column("k_len", Unit.COUNT, "Tk"),
    Column("head_dim", Unit.COUNT, "D"),
    Column("dtype"),
    Column("softmax_bytes", Unit.BYTES),
    Column("saved_softmax_bytes", Unit.BYTES),
    Column("predicted_saved_bytes", Unit.BYTES, "predicted saved"),
    Column("scores_peak_bytes", Unit.BYTES, "scores at most"),
    Column("mask_bytes", Unit.BYTES),
    Column("kv_cache_bytes", Unit.BYTES, "KV cache"),
    Column("backend_reason", Unit.PROSE, "why"),
)


def layout(subject: Subject) -> Component:
    """Return the page."""
    if subject.device.peak_event < 0:
        return message("No layers", "Nothing was live, so no layer held anything.")
    found = {chart.key: chart for chart in charts(subject)}
    legend = show_legend(subject.device.facts["categories"], subject.device.phases)
    parts: list[Any] = [
        html.Div([_choose_step(subject), _choose_layer(subject)], className="controls"),
        chart_card(found["instant"], "layers", legend, graph_id=ids.pick("instant")),
    ]
    if "layer" in found:
        own = show_legend(_name_categories(found["layer"].table), ())
        parts.append(chart_card(found["layer"], "layers", own, graph_id=ids.pick("layer")))
    parts.append(
        html.Div(
            [chart_card(found["heatmap"], "layers"), chart_card(found["own-peaks"], "layers")],
            className="wide",
        )
    )
    parts.append(chart_card(found["attention"], "layers"))
    return html.Div(parts)


def charts(subject: Subject) -> list[Chart]:
    """Return the chosen instant, the layers then, the chosen layer over time, and all attention."""
    if subject.device.peak_event < 0:
        return []
    held = find_held(subject, find_event(subject))
    layer = _draw_layer(subject) if subject.view.layer else None
    return [
        _draw_instant(subject),
        *([layer] if layer is not None else []),
        _draw_heatmap(subject, held),
        _draw_own_peaks(subject),
        Chart(
            "attention",
            "Attention layers",
            "Found by data flow, never by name. Softmax: the results of one call. Saved: what "
            "autograd keeps between QKᵀ and PV. Predicted: what theory says it keeps.",
            Table.of(_LAYER_COLUMNS, subject.summary["layers"]),
        ),
    ]


def find_event(subject: Subject) -> int:
    """Return the event that the view asks for: one of its own, a step's peak, or the peak."""
    view, device = subject.view, subject.device
    if view.at is not None and _is_instant_chosen(subject):
        return view.at
    return device.peak_of_step.get(-1 if view.step is None else view.step, device.peak_event)


def _is_instant_chosen(subject: Subject) -> bool:
    """Return whether the view names an event of the run, which goes before a step."""
    at = subject.view.at
    return at is not None and 0 <= at < len(subject.device.index)


def find_held(subject: Subject, event: int) -> dict[tuple[str, str], int]:
    """Return the bytes per layer and category after an event."""
    frame = subject.device.live_at(event)
    sums = frame.group_by("layer", "category").agg(pl.col("size_bytes").sum())
    return {(layer or "", category): size for layer, category, size in sums.iter_rows()}


def _choose_step(subject: Subject) -> Component:
    peaks = dict(islice(subject.device.peak_of_step.items(), _MOST_STEPS))
    sizes = subject.device.index.totals_at(np.array(list(peaks.values()), np.int64)).tolist()
    items = [
        {"value": str(number), "label": f"peak of step {number}: {format_bytes(size)}"}
        for number, size in zip(peaks, sizes, strict=True)
    ]
    value: object = subject.view.step
    if _is_instant_chosen(subject):
        # It stands in the list as long as it is shown, so that the list can say and clear it.
        value = ids.CLICKED
        items.insert(0, {"value": value, "label": _describe_instant(subject)})
    return choose("step", items, value, "the peak of the run", "instant")


def _describe_instant(subject: Subject) -> str:
    index, event = subject.device.index, find_event(subject)
    seconds = (int(index.time_ns[event]) - subject.begin_ns) / 1e9
    return f"{seconds:.6f} s: {format_bytes(int(index.total_bytes[event]))}"


def _choose_layer(subject: Subject) -> Component:
    names = [name for name in subject.device.peaks["layer"].unique().to_list() if name]
    items = [{"value": name, "label": name} for name in sorted(names, key=natural_key)]
    return choose("layer", items, subject.view.layer, "a layer over time", "layer")


def _draw_instant(subject: Subject) -> Chart:
    index, event = subject.device.index, find_event(subject)
    window = index.window(index.begin_ns, index.end_ns, _BINS)
    at = int(index.time_ns[event]) - subject.begin_ns
    marks = Marks(subject.begin_ns, spans=list_spans(subject, window), instant_ns=at)
    figure = draw_timeline(window, marks, scheme=subject.scheme, height=230)
    figure.update_layout(dragmode=False)
    size = format_bytes(int(index.total_bytes[event]))
    why = f"{size} were live at {at / 1e9:.6f} s, the line."
    table, gestures = _tabulate(window, subject), "Click for another instant."
    return Chart("instant", "The instant", why, table, figure, gestures)


def _tabulate(window: Window, subject: Subject) -> Table:
    columns = tabulate(window, subject.begin_ns)
    return Table(
        tuple(Column(n, Unit.SECONDS if n == "seconds" else Unit.BYTES) for n in columns),
        list(zip(*(column.tolist() for column in columns.values()), strict=True)),
    )


def _name_categories(table: Table) -> list[str]:
    names = [column.name.removesuffix("_bytes") for column in table.columns]
    return [name for name in names if name not in ("seconds", "total")]


def _draw_layer(subject: Subject) -> Chart | None:
    """Return one layer's bytes over time, modules inside it included; None if it holds none."""
    blocks = subject.device.blocks_of(subject.view.layer)
    if blocks.is_empty():
        return None
    frame = sample_timeline(blocks, device=subject.device.name, max_points=2 * _BINS)
    names = [name for name in frame.columns if name not in ("time_ns", "total_bytes")]
    window = Window(
        event=np.array([subject.device.index.event_at(t) for t in frame["time_ns"].to_list()]),
        time_ns=frame["time_ns"].to_numpy(),
        total_bytes=frame["total_bytes"].to_numpy(),
        by_category={name: frame[name].to_numpy() for name in names},
    )
    figure = draw_timeline(window, Marks(subject.begin_ns), scheme=subject.scheme, height=260)
    figure.update_layout(dragmode=False)
    end = (subject.device.index.end_ns - subject.begin_ns) / 1e9
    figure.update_xaxes(range=[0, end])
    title = f"{subject.view.layer} over time"
    why = "What this layer and the modules inside it hold."
    return Chart("layer", title, why, _tabulate(window, subject), figure)


def _draw_heatmap(subject: Subject, held: dict[tuple[str, str], int]) -> Chart:
    rows = sorted(held.items(), key=lambda item: (natural_key(item[0][0]), stack_order(item[0][1])))
    columns = (
        Column("layer", Unit.NAME),
        Column("category", Unit.CATEGORY),
        Column("size_bytes", Unit.BYTES, "bytes"),
    )
    table = Table(columns, [[layer or OUTSIDE, name, size] for (layer, name), size in rows])
    shown = _say_how_many(len({layer for layer, _ in held}))
    why = f"What every layer held at the instant, by what it is for.{shown}"
    figure = draw_heatmap(held, scheme=subject.scheme)
    return Chart("heatmap", "Layers and categories", why, table, figure)


def _say_how_many(layers: int) -> str:
    """Return which layers a picture shows, where it has no room for all."""
    if layers <= MOST_LAYERS:
        return ""
    return f" The {MOST_LAYERS} of {layers:,} layers that hold most; the table has all."


def _draw_own_peaks(subject: Subject) -> Chart:
    peaks = subject.device.peaks.filter((pl.col("category") == TOTAL) & (pl.col("layer") != ""))
    most = peaks.group_by("layer").agg(pl.col("peak_bytes").max())
    own = dict(most.iter_rows())
    at_peak: dict[str, int] = {}
    for (layer, _), size in find_held(subject, subject.device.peak_event).items():
        at_peak[layer] = at_peak.get(layer, 0) + size
    total = subject.summary["peak"]["total_bytes"] or 1
    columns = (
        Column("layer", Unit.NAME),
        Column("own_peak_bytes", Unit.BYTES, "its own peak"),
        Column("at_peak_bytes", Unit.BYTES, "at the peak of all"),
        Column("share", Unit.SHARE, "share of the peak"),
    )
    names = sorted(own, key=natural_key)
    table = Table(
        columns, [[n, own[n], at_peak.get(n, 0), at_peak.get(n, 0) / total] for n in names]
    )
    why = (
        "The most a layer ever holds, and what it holds at the peak of the device: a layer may "
        f"peak elsewhere.{_say_how_many(len(own))}"
    )
    figure = draw_own_peaks(own, at_peak, scheme=subject.scheme)
    return Chart("own-peaks", "Own peak and part in the peak", why, table, figure)


PAGE = Page("layers", "Layers", "Which layer holds what", layout, charts)
