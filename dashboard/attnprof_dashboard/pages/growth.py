"""Growth: measured bytes against the prediction, and where the wall is."""

from collections.abc import Mapping
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component

from attnprof.analysis.fits import TOTAL
from attnprof.report.growth_verdict import format_fraction
from attnprof.theory.devices import find_device
from attnprof.units import format_bytes
from attnprof_dashboard import ids, state
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import card, chart_card, message, tile, tiles
from attnprof_dashboard.components.controls import choose
from attnprof_dashboard.components.tables import label_category, show_table
from attnprof_dashboard.data.catalog import Kind
from attnprof_dashboard.data.growth_digest import (
    BATCH_DOUBLINGS,
    HEAD_DOUBLINGS,
    ITEM_HALVINGS,
    GrowthDigest,
    Scale,
)
from attnprof_dashboard.data.outlook import CAPACITIES
from attnprof_dashboard.figures.growth import (
    Estimate,
    Limit,
    draw_growth,
    draw_law,
    draw_residuals,
)
from attnprof_dashboard.figures.theme import CONFIG
from attnprof_dashboard.pages.page import Page, Subject
from attnprof_dashboard.table import Column, Table, Unit

_DEFAULT_CAPACITY = "H100"
_OWN_STEPS = "."
"""In place of a sweep: the steps of the run. No key of the catalogue reads so."""
_SLIDERS = (
    ("batch_doublings", "batch", BATCH_DOUBLINGS),
    ("head_doublings", "heads, at the same width", HEAD_DOUBLINGS),
    ("dtype_halvings", "bytes per element", ITEM_HALVINGS),
)


def layout(subject: Subject) -> Component:
    """Return the page."""
    growth, name, why_not = find_growth(subject)
    head = html.Div([_choose_sweep(name), _choose_capacity(subject)], className="controls")
    if growth is None:
        return html.Div([head, message("No growth to show", why_not, *_SUGGESTION)])
    found = {chart.key: chart for chart in make_charts(subject, growth)}
    return html.Div(
        [
            head,
            html.P(growth.values["verdict"], className="verdict"),
            _tiles(subject, growth),
            chart_card(found["growth"], "growth", _make_sliders(subject)),
            html.Div(
                [chart_card(found[k], "growth") for k in ("residuals", "laws") if k in found],
                className="wide",
            ),
            _make_multiples(subject, growth),
            chart_card(found["walls"], "growth"),
        ]
    )


_SUGGESTION = (
    " Sweep a workload with ",
    html.Code("attnprof sweep script.py:make_step --seq-lens 256:4096:x2 --out runs/sweep"),
    ", or choose a sweep above.",
)


def charts(subject: Subject) -> list[Chart]:
    """Return the charts, for files."""
    growth, _, _ = find_growth(subject)
    return [] if growth is None else make_charts(subject, growth)


def find_growth(subject: Subject) -> tuple[GrowthDigest | None, str, str]:
    """Return the growth to show, what of the list of sweeps it is, and why there is none.

    That is what was chosen, else the sweep that the run belongs to, else the run's own steps.
    Another workload's sweep says nothing of the run, so none is shown unasked.
    """
    wanted = subject.view.sweep or subject.entry.sweep or _OWN_STEPS
    if wanted == _OWN_STEPS:
        own = subject.digest.facts["growth"]
        if own is not None:
            return GrowthDigest(own["growth"]), wanted, ""
        alone = "" if subject.entry.sweep else ", and it belongs to no sweep"
        return None, wanted, f"The steps of this run have one length{alone}."
    opened = state.current().store.open(wanted, is_fresh=True)
    if opened.growth is None:
        if opened.is_pending:
            return None, wanted, "It is still being read; reload the page."
        return None, wanted, f"{opened.error}." if opened.error else f"{wanted} is no sweep."
    return opened.growth, wanted, ""


def _choose_sweep(name: str) -> Component:
    keys = [e.key for e in state.current().catalog.entries() if e.kind is Kind.SWEEP]
    items = [{"value": _OWN_STEPS, "label": "the steps of this run"}]
    items += [{"value": key, "label": key} for key in keys]
    return choose("sweep", items, name, "sweep", "growth of", is_clearable=False)


def _choose_capacity(subject: Subject) -> Component:
    items = [
        {"value": name, "label": f"{name}, {format_bytes(find_device(name).available_bytes)}"}
        for name in CAPACITIES
    ]
    return choose(
        "capacity", items, read_capacity(subject), "device", "has to fit", is_clearable=False
    )


def read_capacity(subject: Subject) -> str:
    """Return the device whose memory is the limit."""
    return subject.view.capacity if subject.view.capacity in CAPACITIES else _DEFAULT_CAPACITY


def read_scale(subject: Subject) -> Scale:
    """Return the scale that the sliders ask for."""
    batch, heads, halvings = (
        min(max(getattr(subject.view, field) or 0, steps[0]), steps[-1])
        for field, _, steps in _SLIDERS
    )
    return Scale(batch=2.0**batch, heads=2.0**heads, item=2.0**-halvings)


def _find_limit(subject: Subject, growth: GrowthDigest) -> Limit:
    name = read_capacity(subject)
    found = next(c for c in growth.values["capacities"] if c["name"] == name)
    wall = found["wall"]["seq_len"] if found["wall"] else None
    return Limit(name, found["size_bytes"], wall)


def _find_estimate(subject: Subject, growth: GrowthDigest) -> Estimate | None:
    scale = read_scale(subject)
    if scale.is_one:
        return None
    limit = _find_limit(subject, growth)
    parts = [("batch", scale.batch), ("heads", scale.heads), ("bytes per element", scale.item)]
    name = ", ".join(f"{word} ×{factor:g}" for word, factor in parts if factor != 1.0)
    points, wall = growth.predict(scale), growth.find_wall(limit.size_bytes, scale)
    return Estimate(f"estimate: {name}", points, wall)


def _tiles(subject: Subject, growth: GrowthDigest) -> Component:
    values, limit = growth.values, _find_limit(subject, growth)
    fit = next((f for f in values["fits"] if f["category"] == TOTAL), None)
    estimate = _find_estimate(subject, growth)
    walls = f"longest n that fits {limit.name}"
    cells = [tile(*_describe_exponent(fit)), tile(f"{limit.wall:,}" if limit.wall else "–", walls)]
    if estimate is not None:
        about = f"≈ {estimate.wall:,}" if estimate.wall else "beyond the outlook"
        cells.append(tile(about, f"{walls} ({estimate.name})"))
    longest = next((p for p in values["points"] if p["seq_len"] == values["longest"]), None)
    if longest is not None:
        cells.append(
            tile(format_bytes(longest["peak_bytes"]), f"peak at n = {values['longest']:,}")
        )
    if fit is not None:
        cells.append(tile(format_fraction(fit["max_relative_error"]), "the law is off by at most"))
    return tiles(*cells)


def _describe_exponent(fit: Mapping[str, Any] | None) -> tuple[str, str]:
    if fit is None or fit["exponent"] is None:
        return "–", "exponent: it takes three lengths or more"
    low, high = fit["exponent_interval"] or (None, None)
    interval = f", 95 %: {low:.2f} to {high:.2f}" if low is not None else ""
    return f"n^{fit['exponent']:.2f}", f"the peak, {fit['law']} in {fit['phase']}{interval}"


def make_charts(subject: Subject, growth: GrowthDigest) -> list[Chart]:
    """Return the page's charts."""
    values = growth.values
    limit, estimate = _find_limit(subject, growth), _find_estimate(subject, growth)
    figure = draw_growth(values, limit, estimate, scheme=subject.scheme)
    found = [
        Chart(
            "growth",
            "Peak memory against sequence length",
            "Both axes are logarithmic: a straight line is a power of n. Dashed: predicted by "
            "replaying every block at that length.",
            tabulate_points(values),
            figure,
        )
    ]
    if values["fits"]:
        columns = (
            Column("seq_len", Unit.COUNT, "n"),
            Column("source"),
            Column("peak_bytes", Unit.BYTES),
            Column("residual", Unit.SHARE),
        )
        found += [
            Chart(
                "residuals",
                "Residuals",
                "How far every point is from the law of the total.",
                Table.of(columns, [p for p in values["points"] if p["residual"] is not None]),
                draw_residuals(values["points"], scheme=subject.scheme),
            ),
            Chart(
                "laws",
                "Laws",
                "Fitted per phase; the last column says how well.",
                _tabulate_laws(values),
            ),
        ]
    why = "The longest sequence whose step fits; nothing is run to find it."
    return [*found, Chart("walls", "Walls", why, _tabulate_walls(values))]


def tabulate_points(values: Mapping[str, Any]) -> Table:
    """Return every length that was run, with the most bytes of every category."""
    names = sorted({name for point in values["points"] for name in point["by_category"]})
    columns = (
        Column("seq_len", Unit.COUNT, "n"),
        Column("source"),
        Column("status"),
        Column("peak_bytes", Unit.BYTES),
        *(Column(f"{name}_bytes", Unit.BYTES) for name in names),
    )
    rows = [
        [p["seq_len"], p["source"], p["status"], p["peak_bytes"]]
        + [p["by_category"].get(name) for name in names]
        for p in values["points"]
    ]
    return Table(columns, rows)


def _tabulate_laws(values: Mapping[str, Any]) -> Table:
    columns = (
        Column("category", Unit.CATEGORY),
        Column("law"),
        Column("phase"),
        Column("exponent"),
        Column("interval"),
        Column("max_error", Unit.SHARE),
    )
    rows = []
    for fit in values["fits"]:
        low, high = fit["exponent_interval"] or (None, None)
        exponent = "–" if fit["exponent"] is None else f"{fit['exponent']:.3f}"
        interval = "–" if low is None else f"{low:.3f} to {high:.3f}"
        error = fit["max_relative_error"]
        rows.append([fit["category"], fit["law"], fit["phase"], exponent, interval, error])
    return Table(columns, rows)


def _tabulate_walls(values: Mapping[str, Any]) -> Table:
    columns = (
        Column("device"),
        Column("capacity_bytes", Unit.BYTES),
        Column("longest", Unit.COUNT, "longest n"),
        Column("peak_bytes", Unit.BYTES, "peak there"),
        Column("how", Unit.PROSE),
    )
    rows = []
    for one in values["capacities"]:
        wall = one["wall"] or {"seq_len": None, "peak_bytes": None, "sentence": one["why_no_wall"]}
        rows.append(
            [one["name"], one["size_bytes"], wall["seq_len"], wall["peak_bytes"], wall["sentence"]]
        )
    return Table(columns, rows)


def _make_sliders(subject: Subject) -> Component:
    cells = []
    for field, label, steps in _SLIDERS:
        value = getattr(subject.view, field) or 0
        sign = -1 if field == "dtype_halvings" else 1
        marks = [{"value": i, "label": _name_factor(sign * i)} for i in steps]
        slider = dmc.Slider(
            id=ids.choose(field), value=value, min=steps[0], max=steps[-1], step=1, marks=marks,
            restrictToMarks=True, label=None, updatemode="mouseup",
            thumbLabel=f"factor of the {label}",
        )  # fmt: skip
        cells.append(html.Div([html.Label(label, className="slider-label"), slider]))
    why = "Estimates: every category is scaled by what it depends on, and the peak looked for anew."
    return html.Div([html.Div(cells, className="sliders"), html.P(why, className="why")])


def _name_factor(doublings: int) -> str:
    return f"×{2**doublings}" if doublings >= 0 else f"1/{2**-doublings}"


def _make_multiples(subject: Subject, growth: GrowthDigest) -> Component:
    """Return a small picture for each layer and category whose law is worth one."""
    lengths = [p["seq_len"] for p in growth.values["points"] if p["peak_bytes"]]
    graphs = [
        html.Figure(
            [
                html.Figcaption(_name_law(law)),
                dcc.Graph(
                    figure=draw_law(law, lengths, scheme=subject.scheme),
                    config=CONFIG,
                    style={"height": "130px"},
                ),
            ]
        )
        for law in growth.values["layers"]
    ]
    columns = (
        Column("layer", Unit.NAME),
        Column("count", Unit.COUNT, "×"),
        Column("category", Unit.CATEGORY),
        Column("law"),
        Column("each_bytes", Unit.BYTES, "each, at the longest"),
    )
    table = html.Details(
        [
            html.Summary("Layers as a table"),
            show_table(Table.of(columns, growth.values["layers"])),
        ],
        className="table-beside",
    )
    why = "The law of one layer of each kind; alike layers are folded."
    return card("Layer by layer", why, html.Div(graphs, className="multiples"), table)


def _name_law(law: Mapping[str, Any]) -> list[Any]:
    power = "" if law["exponent"] is None else f" n^{law['exponent']:.2f}"
    times = f" ×{law['count']}" if law["count"] > 1 else ""
    return [label_category(law["category"]), html.B(power), html.Br(), law["layer"], times]


PAGE = Page(
    "growth", "Growth", "By which law, and where is the wall", layout, charts, takes_sweeps=True
)
