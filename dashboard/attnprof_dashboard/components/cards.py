"""Cards: a chart with its table and its files, a figure in large type, a message."""

from collections.abc import Sequence
from typing import Any

from dash import dcc, html
from dash.development.base_component import Component

from attnprof_dashboard import ids
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.tables import paged_table
from attnprof_dashboard.figures.theme import CONFIG


def card(title: str, why: Any, *body: Any, tools: Sequence[Any] = ()) -> Component:
    """Return a card: its title, a line on what it shows, and its body."""
    head = html.Div(
        [
            html.Div([html.H2(title), html.P(why, className="why")], className="card-title"),
            html.Div(list(tools), className="card-tools"),
        ],
        className="card-head",
    )
    return html.Section([head, *body], className="card")


def chart_card(
    chart: Chart, page: str, *extra: Any, graph_id: Any = None, above: Sequence[Any] = ()
) -> Component:
    """Return a chart with its table beside it, and buttons for its files.

    Args:
        chart: The chart.
        page: The name of its page in addresses.
        extra: What stands below the figure.
        graph_id: The graph's id, where callbacks speak of it.
        above: What stands above the figure.
    """
    file = f"{page}/{chart.key}.csv"
    why = [chart.why, html.Span(f" {chart.gestures}", className="gestures")]
    if chart.figure is None:
        table = paged_table(chart.table, page, chart.key, is_open=True)
        return card(chart.title, why, *above, *table, *extra, tools=[_file("CSV", file)])
    name = graph_id or f"graph-{chart.key}"
    graph = dcc.Graph(
        id=name,
        figure=chart.figure,
        config=CONFIG,
        className="graph",
        style={"height": f"{chart.figure.layout.height}px"},
    )
    # Its table has the numbers for those who cannot see it.
    graph = html.Div(graph, role="img", **{"aria-label": chart.title})
    if any(trace.type == "heatmap" for trace in chart.figure.data):
        graph = html.Div(graph, className="needs-room", tabIndex=0)
    tools = [
        html.Button("PNG", className="tool", **{"data-png": chart.key}, type="button"),
        _file("CSV", file),
    ]
    summary = html.Summary(f"{chart.title} as a table", id=ids.unfold(page, chart.key))
    table = paged_table(chart.table, page, chart.key, is_open=False)
    beside = html.Details([summary, *table], className="table-beside")
    return card(chart.title, why, *above, graph, *extra, beside, tools=tools)


def _file(text: str, file: str) -> Component:
    """Return a link to a file about what is shown; its query is that of the page."""
    return html.A(text, className="tool", href=f"export/{file}", **{"data-export": file})


def page_tools(page: str) -> Component:
    """Return the link to the page as one file."""
    return _file("Save page as HTML", f"{page}.html")


def tile(large: str, small: str) -> Component:
    """Return a figure in large type with what it is."""
    return html.Div([html.B(large, className="tile-value"), html.Span(small)], className="tile")


def tiles(*found: Component) -> Component:
    """Return a row of tiles."""
    return html.Div(list(found), className=f"tiles of-{len(found)}")


def message(title: str, *text: Any, is_bad: bool = False) -> Component:
    """Return a card that says why there is nothing to see, and what to do."""
    kind = "message bad" if is_bad else "message"
    return html.Div([html.B(title), html.P(list(text))], className=kind, role="status")
