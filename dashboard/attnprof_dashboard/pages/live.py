"""Live: a run that is still being written, at most two seconds behind."""

from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from attnprof.palette import stack_order
from attnprof.report.words import format_seconds
from attnprof.units import format_bytes
from attnprof.vocabulary import Status
from attnprof_dashboard import ids, state
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.components.controls import list_runs
from attnprof_dashboard.data.live import LiveRun
from attnprof_dashboard.data.live_device import WINDOW_SECONDS, Device, Instant
from attnprof_dashboard.figures.live import draw_live
from attnprof_dashboard.pages.page import Glance, Missing, Page, glance_at
from attnprof_dashboard.table import Column, Table, Unit
from attnprof_dashboard.view import View

_TICK_MS = 1000
_REST_MS = 5000
"""Of a run that has ended: another one may have begun."""
_LEVELS = ("total_bytes", "used_bytes")


def layout(glance: Glance) -> Component:
    """Return the page."""
    found = follow(glance)
    if isinstance(found, str):
        return message("This run cannot be followed", found, is_bad=True)
    run, device = found
    return html.Div(
        [
            html.Div(say(glance, run, device), id=ids.LIVE_SAID, **{"aria-live": "off"}),
            chart_card(draw(glance, run, device), "live", graph_id=ids.LIVE),
            dcc.Interval(id=ids.TICK, interval=choose_pace(glance, run)),
        ]
    )


def choose_pace(glance: Glance, run: LiveRun) -> int:
    """Return after how many milliseconds to look again."""
    is_over = glance.entry.status != Status.RECORDING.value
    return _REST_MS if is_over and not run.is_behind else _TICK_MS


def _list_others(glance: Glance) -> list[Component]:
    """Return links to the runs that are being recorded, if this one is not."""
    if glance.entry.status == Status.RECORDING.value:
        return []
    keys = [
        entry.key
        for entry in state.current().catalog.entries()
        if entry.status == Status.RECORDING.value
    ]
    links = [dmc.Anchor(key, href=f"live{View(run=key).query()}", mr="md") for key in keys]
    text = "Being recorded now: " if links else "No run here is being recorded now."
    return [message("This run has ended", text, *links)]


def charts(glance: Glance) -> list[Chart]:
    """Return the window that is shown."""
    found = follow(glance)
    return [] if isinstance(found, str) else [draw(glance, *found)]


def follow(glance: Glance) -> tuple[LiveRun, Device] | str:
    """Return the run, read up to now, and its device; or why it cannot be followed."""
    known = state.current()
    if not known.catalog.is_inside(glance.entry):
        return "it leads out of the directory that is shown"
    try:
        run = known.live.follow(glance.entry.path)
    except (OSError, ValueError, KeyError) as error:
        return f"{glance.entry.reason or 'its files cannot be read'} ({error})"
    return run, run.devices.get(glance.view.device) or _choose_device(run)


def name_devices(glance: Glance) -> tuple[str, list[str]]:
    """Return the name of the device that is shown, and of all."""
    found = follow(glance)
    if isinstance(found, str):
        return "", []
    run, shown = found
    names = list(run.devices)
    return next((name for name in names if run.devices[name] is shown), ""), names


def _choose_device(run: LiveRun) -> Device:
    """Return the GPU that held most, or else the CPU."""
    gpus = [device for name, device in run.devices.items() if name not in ("cpu", "meta")]
    most = max(gpus, key=lambda d: d.peak.total_bytes if d.peak else 0, default=None)
    return most or run.devices.get("cpu") or Device()


def say(glance: Glance, run: LiveRun, device: Device) -> list[Component]:
    """Return how the run stands, and the figures above the picture."""
    status = glance.entry.status.replace("_", " ")
    is_over = glance.entry.status != Status.RECORDING.value
    peak = device.peak
    begin = run.begin_ns or 0
    highest = "the peak" if is_over else "highest so far"
    where = f"{highest}, at {format_seconds((peak.time_ns - begin) / 1e9)}" if peak else highest
    size, headroom = _describe_headroom(run, device)
    behind = " Catching up with what was written before." if run.is_behind else ""
    seconds = (run.last_ns - begin) / 1e9
    return [
        *_list_others(glance),
        html.P(
            f"{status.capitalize()}: {run.steps:,} steps, {run.events:,} events, "
            f"{format_seconds(seconds)} of the run.{behind}",
            className="readout live-said",
        ),
        tiles(
            tile(format_bytes(device.total_bytes), "live at the end" if is_over else "live now"),
            tile(format_bytes(peak.total_bytes if peak else 0), where),
            tile(size, headroom),
            tile(f"{run.steps:,}", "steps ended"),
        ),
    ]


def _describe_headroom(run: LiveRun, device: Device) -> tuple[str, str]:
    """Return what is left of the device's memory, as it was last sampled."""
    name = next((n for n, d in run.devices.items() if d is device), "cpu")
    sample = run.samples.get("host" if name == "cpu" else name)
    if sample is None:
        return "–", "headroom: no samples were recorded"
    total, used = (sample[level] for level in _LEVELS)
    return format_bytes(total - used), f"headroom: free of {format_bytes(total)}, all processes"


def draw(glance: Glance, run: LiveRun, device: Device) -> Chart:
    """Return the picture of the window."""
    begin = run.begin_ns or 0
    since = max(begin, run.last_ns - int(WINDOW_SECONDS * 1e9))
    instants = device.instants(since, run.last_ns)
    figure = draw_live(instants, device.peak, begin, scheme=glance.scheme)
    why = (
        f"The last {WINDOW_SECONDS:.0f} seconds, by what the program says of its tensors; extremes "
        "of every tenth of a second, or less, are kept. Categories come when the run is read as a "
        "whole: see the other pages."
    )
    return Chart("live", "Live bytes", why, _tabulate(instants, begin), figure)


def _tabulate(instants: Sequence[Instant], begin_ns: int) -> Table:
    names = sorted({name for instant in instants for name, _ in instant.by_role}, key=stack_order)
    columns = (
        Column("seconds", Unit.SECONDS),
        Column("total_bytes", Unit.BYTES),
        *(Column(f"{name.replace(' ', '_')}_bytes", Unit.BYTES) for name in names),
    )
    rows = []
    for instant in instants:
        sizes = dict(instant.by_role)
        seconds = (instant.time_ns - begin_ns) / 1e9
        rows.append([seconds, instant.total_bytes, *(sizes.get(name, 0) for name in names)])
    return Table(columns, rows)


def register(app: Dash) -> None:
    """Register the clock."""
    app.callback(
        Output(ids.LIVE, "figure"),
        Output(ids.LIVE_SAID, "children"),
        Output(ids.TICK, "interval"),
        Output(ids.RUN, "data"),
        Input(ids.TICK, "n_intervals"),
        State(ids.TICK, "interval"),
        State(ids.VIEW, "data"),
        prevent_initial_call=True,
    )(tick)


def tick(number: int, pace: int, data: dict[str, Any]) -> tuple[Any, Any, int, Any]:
    """Return the picture, what is said, when to look again, and the runs to choose from.

    Args:
        number: How often the clock has ticked.
        pace: After how many milliseconds it does.
        data: The view.
    """
    is_resting = pace == _REST_MS
    # The list may be long: it is sent as often as the clock ticks for a run that has ended.
    runs = no_update
    if is_resting or not number % (_REST_MS // _TICK_MS):
        runs = list_runs(state.current().catalog.entries())
    glance = glance_at(View.read(data))
    if isinstance(glance, Missing):
        return no_update, no_update, _REST_MS, runs
    found = follow(glance)
    if isinstance(found, str):
        why = message("This run cannot be followed any more", found, is_bad=True)
        return no_update, why, _REST_MS, runs
    figure = no_update if is_resting else draw(glance, *found).figure
    return figure, say(glance, *found), choose_pace(glance, found[0]), runs


PAGE = Page(
    "live",
    "Live",
    "A run while it is recorded",
    layout,
    charts,
    register,
    needs_digest=False,
    devices=name_devices,
    draws_itself=True,
)
