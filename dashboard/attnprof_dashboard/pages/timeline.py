"""Timeline: any window of a run, and every block that was live at an instant of it."""

import json
from typing import Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, html, no_update
from dash.development.base_component import Component

from attnprof.units import format_bytes
from attnprof_dashboard import ids
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components import drawer
from attnprof_dashboard.components.cards import chart_card
from attnprof_dashboard.components.legend import show_legend
from attnprof_dashboard.components.tables import show_table
from attnprof_dashboard.data.timeline_index import DEFAULT_BINS, Window
from attnprof_dashboard.figures.timeline import Line, Marks, draw_timeline, tabulate
from attnprof_dashboard.pages.overview import find_reserved, list_gaps, list_spans
from attnprof_dashboard.pages.page import Missing, Page, Subject, open_subject
from attnprof_dashboard.table import Column, Table, Unit
from attnprof_dashboard.view import View


def layout(subject: Subject) -> Component:
    """Return the page."""
    chart = charts(subject)[0]
    keys = [
        ("p", "peak"),
        ("[ ]", "peaks of steps"),
        ("0", "whole run"),
        ("b", "blocks"),
        ("?", "all keys"),
    ]
    hints = [html.Span([dmc.Kbd(key), f" {what}"]) for key, what in keys]
    above = [
        html.Div(
            [
                html.Div(describe_window(subject), id=ids.READOUT, className="readout"),
                html.Div(hints, className="hints"),
            ],
            className="tools-row",
        )
    ]
    legend = show_legend(
        subject.device.facts["categories"],
        subject.device.phases if len(subject.device.index) else (),
        pressed=find_category(subject),
    )
    return html.Div(
        [
            html.Div(id=ids.MARKS, hidden=True, **{"data-marks": json.dumps(list_marks(subject))}),
            chart_card(chart, "timeline", legend, graph_id=ids.TIMELINE, above=above),
            drawer.make_drawer(),
        ]
    )


def charts(subject: Subject) -> list[Chart]:
    """Return the timeline of the view's window, and the blocks of its instant if it has one."""
    window = find_window(subject)
    gestures = (
        "Drag to zoom, double-click for the whole run, click for every block that was live then."
    )
    timeline = Chart(
        "timeline",
        "Live bytes",
        f"Live bytes on {subject.device.name}.",
        make_table(subject, window),
        draw(subject, window),
        gestures,
    )
    return [timeline, drawer.list_instant(subject)] if subject.view.at is not None else [timeline]


def make_table(subject: Subject, window: Window) -> Table:
    """Return the samples of a window."""
    columns = tabulate(window, subject.begin_ns)
    return Table(
        tuple(Column(n, Unit.SECONDS if n == "seconds" else Unit.BYTES) for n in columns),
        list(zip(*(column.tolist() for column in columns.values()), strict=True)),
    )


def find_window(subject: Subject) -> Window:
    """Return the samples of the view's window; of the whole run without one."""
    return subject.device.index.window(*find_range(subject), DEFAULT_BINS)


def find_category(subject: Subject) -> str:
    """Return the category that is shown alone; nothing where all are."""
    name = subject.view.category
    return name if name in subject.device.facts["categories"] else ""


def find_range(subject: Subject) -> tuple[int, int]:
    """Return begin and end of the view's window on the run's clock."""
    index, view = subject.device.index, subject.view
    begin, end = subject.begin_ns, index.end_ns
    first = begin + view.t0 if view.t0 is not None else begin
    last = begin + view.t1 if view.t1 is not None else end
    first, last = max(begin, min(first, last)), min(end, max(first, last))
    return (first, last) if first < last else (begin, end)


def draw(subject: Subject, window: Window) -> Any:
    """Return the figure."""
    index, view = subject.device.index, subject.view
    first, last = find_range(subject)
    event = subject.device.peak_event
    peak = None
    if event >= 0 and first <= int(index.time_ns[event]) <= last:
        peak = int(index.time_ns[event]) - subject.begin_ns, int(index.total_bytes[event])
    marks = Marks(
        begin_ns=subject.begin_ns,
        spans=list_spans(subject, window),
        peak=peak,
        instant_ns=_time_of(subject, view.at),
        since_ns=_time_of(subject, view.since),
        life=_find_life(subject),
        gaps=list_gaps(subject),
        lines=find_levels(subject),
    )
    return draw_timeline(window, marks, scheme=subject.scheme, only=find_category(subject))


def _time_of(subject: Subject, event: int | None) -> int | None:
    index = subject.device.index
    if event is None or not 0 <= event < len(index):
        return None
    return int(index.time_ns[event]) - subject.begin_ns


def _find_life(subject: Subject) -> tuple[int, int] | None:
    if subject.view.block is None:
        return None
    block = subject.device.block(subject.view.block)
    if block is None:
        return None
    end = block["end_ns"] if block["end_ns"] is not None else subject.device.index.end_ns
    return max(0, block["start_ns"] - subject.begin_ns), end - subject.begin_ns


def find_levels(subject: Subject) -> list[Line]:
    """Return the levels across the picture: what was reserved, what the device has."""
    lines = []
    reserved = find_reserved(subject)
    if reserved is not None:
        lines.append(Line("reserved at most", reserved))
    samples = subject.digest.samples
    place = "host" if subject.device.name == "cpu" else subject.device.name
    own = samples.filter(samples["device"] == place)
    if len(own):
        lines.append(Line("capacity", int(own["total_bytes"].max())))  # type: ignore[arg-type]  # integers
    return lines


def describe_window(subject: Subject) -> str:
    """Return what the window shows, in a sentence."""
    index = subject.device.index
    first, last = find_range(subject)
    begin = index.event_at(first)
    event = index.peak(max(begin, 0), index.event_at(last) + 1)
    if event < 0:
        return "Nothing was ever live."
    size = format_bytes(int(index.total_bytes[event]))
    at = (int(index.time_ns[event]) - subject.begin_ns) / 1e9
    events = index.event_at(last) - begin + 1
    is_whole = (first, last) == (subject.begin_ns, index.end_ns)
    where = "The whole run" if is_whole else f"{(last - first) / 1e9:.6f} s of the run"
    alone = _describe_category(subject)
    return f"{where}: {events:,} events, at most {size} at {at:.6f} s.{alone}"


def _describe_category(subject: Subject) -> str:
    """Return what is drawn of a category that was asked for."""
    name = find_category(subject)
    if not name:
        asked = subject.view.category
        return f" There is no category {asked!r} in this run: all are shown." if asked else ""
    most = int(find_window(subject).by_category[name].max(initial=0))
    return f" Of {name}, drawn alone, at most {format_bytes(most)}."


def list_marks(subject: Subject) -> dict[str, Any]:
    """Return the times that keys jump to, in nanoseconds since the run began."""
    index, begin = subject.device.index, subject.begin_ns
    peak = subject.device.peak_event
    return {
        "end": index.end_ns - begin,
        "peak": int(index.time_ns[peak]) - begin if peak >= 0 else None,
        "peaks": [int(index.time_ns[event]) - begin for event in subject.device.step_peaks],
    }


def register(app: Dash) -> None:
    """Register the callbacks: gestures change the view, and the view changes all else."""
    app.clientside_callback(
        ClientsideFunction("attnprof", "zoom"),
        Output(ids.VIEW, "data", allow_duplicate=True),
        Input(ids.TIMELINE, "relayoutData"),
        State(ids.VIEW, "data"),
        prevent_initial_call=True,
    )

    app.callback(
        Output(ids.TIMELINE, "figure"),
        Output(ids.READOUT, "children"),
        Output(ids.rows("timeline", "timeline"), "children"),
        Input(ids.VIEW, "data"),
        State(ids.unfold("timeline", "timeline"), "n_clicks"),
        prevent_initial_call=True,
    )(_show_window)
    drawer.register(app)


def _show_window(data: dict[str, Any], unfolded: int | None) -> tuple[Any, Any, Any]:
    """Return figure, sentence and, where it was unfolded, the table of the view's window."""
    subject = open_subject(View.read(data), is_fresh=False)
    if isinstance(subject, Missing):
        return no_update, subject.error, no_update
    window = find_window(subject)
    table = show_table(make_table(subject, window)) if unfolded else None
    return draw(subject, window), describe_window(subject), table


def save(subject: Subject) -> list[Component]:
    """Return what the drawer shows, for a file."""
    return drawer.save_instant(subject, "timeline")


PAGE = Page(
    "timeline",
    "Timeline",
    "What was live when",
    layout,
    charts,
    register,
    saved=save,
    draws_itself=True,
)
