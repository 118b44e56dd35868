"""What stays while pages change: header, navigation, search, help."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import ALL, MATCH, ClientsideFunction, Dash, Input, Output, State, dcc, html
from dash.development.base_component import Component

from attnprof_dashboard import ids, state
from attnprof_dashboard.components.controls import CLEAR, list_runs
from attnprof_dashboard.components.tables import count_pages, show_table
from attnprof_dashboard.figures.theme import FONT
from attnprof_dashboard.pages.page import Missing, Page, open_for, open_subject, read_scheme
from attnprof_dashboard.view import View

_THEME = {
    "fontFamily": FONT,
    "primaryColor": "red",
    "defaultRadius": "md",
    "respectReducedMotion": True,
}
_SHORTCUTS = (
    ("p", "zoom to the peak"),
    ("[  ]", "the peak of the step before, or after"),
    ("0", "the whole run"),
    ("b", "every block at the highest instant that is shown"),
    (",  .", "the instant before, or after"),
    ("/", "search pages, layers and categories"),
    ("d", "dark or light"),
    ("?", "this list"),
    ("Esc", "close what is open"),
)
_LIST_WIDTH = "min(420px, 94vw)"
_MOST_FOUND = 3000
"""Layers that the search offers."""


def make_shell(pages: Sequence[Page]) -> Component:
    """Return the whole page, for the browser that asks."""
    prefix = state.current().prefix
    return dmc.MantineProvider(
        dmc.AppShell(
            [
                dmc.AppShellHeader(_header(prefix), className="shell-header"),
                dmc.AppShellNavbar(_links(pages, prefix), className="shell-navbar"),
                dmc.AppShellMain(dash.page_container),
                _help(),
                dcc.Store(id=ids.GO),
            ],
            header={"height": 56},
            navbar={"width": 200, "breakpoint": "sm", "collapsed": {"mobile": True}},
            padding="md",
            id=ids.SHELL,
        ),
        id="scheme",
        forceColorScheme=read_scheme(),
        theme=_THEME,
    )


def _header(prefix: str) -> list[Component]:
    return [
        dmc.Burger(
            id=ids.NAVBAR_BUTTON, opened=False, hiddenFrom="sm", size="sm",
            **{"aria-label": "pages"},
        ),
        html.A("attnprof", href=prefix, className="brand"),
        dmc.Select(
            id=ids.RUN,
            data=list_runs(state.current().catalog.entries()),
            searchable=True,
            allowDeselect=False,
            nothingFoundMessage="no such run",
            placeholder="run",
            size="sm",
            className="pick-run",
            comboboxProps={"width": _LIST_WIDTH, "position": "bottom-start"},
            maxDropdownHeight=420,
            **{"aria-label": "run"},
        ),
        dmc.Select(
            id=ids.DEVICE,
            data=[],
            allowDeselect=False,
            placeholder="device",
            size="sm",
            w=110,
            className="pick-device",
            **{"aria-label": "device"},
        ),
        html.Span(className="grow"),
        dmc.Select(
            id=ids.SEARCH,
            data=[],
            searchable=True,
            clearable=True,
            placeholder="Search  /",
            clearButtonProps=CLEAR,
            nothingFoundMessage="nothing found",
            size="sm",
            w=220,
            className="pick-search",
            limit=60,
            comboboxProps={"width": _LIST_WIDTH, "position": "bottom-end"},
            **{"aria-label": "search pages, layers and categories"},
        ),
        html.Button("◐", id=ids.THEME, className="tool", title="dark or light (d)", type="button",
                    **{"aria-label": "dark or light"}),
        html.Button("?", id=ids.HELP_BUTTON, className="tool", title="keys (?)", type="button",
                    **{"aria-label": "keys"}),
    ]  # fmt: skip


def _links(pages: Sequence[Page], prefix: str) -> Component:
    return html.Nav(
        [
            dmc.NavLink(
                label=page.title,
                href=prefix + page.path.lstrip("/"),
                id=ids.nav(prefix + page.path.lstrip("/")),
                active="exact",
                description=page.about,
            )
            for page in pages
        ],
        **{"aria-label": "pages"},
    )


def _help() -> Component:
    rows = [html.Tr([html.Td(dmc.Kbd(key)), html.Td(what)]) for key, what in _SHORTCUTS]
    return dmc.Modal(
        html.Table(html.Tbody(rows), className="keys"),
        id=ids.HELP,
        title="Keys",
        closeButtonProps={"aria-label": "close"},
    )


def list_findings(data: dict[str, Any], pages: Sequence[Page]) -> list[dict[str, Any]]:
    """Return what the search offers: addresses by what they show."""
    prefix = state.current().prefix
    names = {page.name for page in pages}
    view = View.read(data)
    lasting = View(run=view.run, device=view.device)
    found = [
        {
            "group": "pages",
            "items": [
                {"value": prefix + page.path.lstrip("/") + lasting.query(), "label": page.title}
                for page in pages
            ],
        }
    ]
    subject = open_subject(view, is_fresh=False)
    if isinstance(subject, Missing):
        return found
    if "timeline" in names:
        items = [
            {
                "value": prefix + "timeline"
                + View(run=view.run, device=view.device, category=name).query(),
                "label": name,
            }
            for name in subject.device.facts["categories"]
        ]  # fmt: skip
        found.append({"group": "categories over time", "items": items})
    if "layers" in names:
        layers = subject.device.peaks["layer"].unique().sort().to_list()
        items = [
            {
                "value": prefix + "layers"
                + View(run=view.run, device=view.device, layer=name).query(),
                "label": name,
            }
            for name in layers[:_MOST_FOUND] if name
        ]  # fmt: skip
        found.append({"group": "layers", "items": items})
    return found


def register(app: Dash, pages: Sequence[Page]) -> None:
    """Register what the header does."""
    app.clientside_callback(
        ClientsideFunction("attnprof", "follow"),
        Output(ids.RUN, "value"),
        Output(ids.DEVICE, "data"),
        Output(ids.DEVICE, "value"),
        Output({"type": "nav", "path": ALL}, "href"),
        Input(ids.VIEW, "data"),
    )
    app.clientside_callback(ClientsideFunction("attnprof", "go"), Input(ids.GO, "data"))
    app.clientside_callback(
        ClientsideFunction("attnprof", "choose"),
        Output(ids.GO, "data"),
        Input(ids.RUN, "value"),
        Input(ids.DEVICE, "value"),
        Input(ids.SEARCH, "value"),
        prevent_initial_call=True,
    )
    app.clientside_callback(ClientsideFunction("attnprof", "theme"), Input(ids.THEME, "n_clicks"))
    app.clientside_callback(
        ClientsideFunction("attnprof", "help"),
        Output(ids.HELP, "opened"),
        Input(ids.HELP_BUTTON, "n_clicks"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("attnprof", "menu"),
        Output(ids.SHELL, "navbar"),
        Input(ids.NAVBAR_BUTTON, "opened"),
        State(ids.SHELL, "navbar"),
        prevent_initial_call=True,
    )

    app.clientside_callback(
        ClientsideFunction("attnprof", "control"),
        Output(ids.VIEW, "data", allow_duplicate=True),
        Input(ids.choose(ALL), "value"),
        State(ids.VIEW, "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("attnprof", "pick"),
        Output(ids.VIEW, "data", allow_duplicate=True),
        Input(ids.pick(ALL), "clickData"),
        State(ids.VIEW, "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("attnprof", "lead"),
        Output(ids.GO, "data", allow_duplicate=True),
        Input(ids.lead(ALL), "clickData"),
        prevent_initial_call=True,
    )
    rows = Output(ids.rows(MATCH, MATCH), "children", allow_duplicate=True)
    app.callback(
        rows,
        Input(ids.unfold(MATCH, MATCH), "n_clicks"),
        State(ids.turn(MATCH, MATCH), "value"),
        State(ids.VIEW, "data"),
        prevent_initial_call=True,
    )(partial(_unfold, pages))
    app.callback(
        rows,
        Input(ids.turn(MATCH, MATCH), "value"),
        State(ids.VIEW, "data"),
        prevent_initial_call=True,
    )(partial(_turn, pages))
    app.callback(Output(ids.BODY, "children"), Input(ids.VIEW, "data"), prevent_initial_call=True)(
        partial(_redraw, pages)
    )
    app.callback(
        Output(ids.SEARCH, "data"), Output(ids.SEARCH, "value"), Input(ids.SUBJECT, "data")
    )(partial(_find, pages))
    app.callback(
        Output(ids.GO, "data", allow_duplicate=True),
        Input(ids.WAITING, "n_intervals"),
        State(ids.VIEW, "data"),
        State("_pages_location", "pathname"),
        prevent_initial_call=True,
    )(_wait)


def _find(pages: Sequence[Page], data: dict[str, Any]) -> tuple[list[dict[str, Any]], None]:
    return list_findings(data, pages), None


def _redraw(pages: Sequence[Page], data: dict[str, Any]) -> Any:
    page = next((p for p in pages if p.name == data.get("page")), None)
    if page is None:
        return dash.no_update
    subject = open_for(page, View.read(data), is_fresh=False)
    return dash.no_update if isinstance(subject, Missing) else page.layout(subject)


def _unfold(pages: Sequence[Page], clicks: int | None, page: int, data: dict[str, Any]) -> Any:
    return _turn(pages, page, data) if clicks else dash.no_update


def _turn(pages: Sequence[Page], page: int, data: dict[str, Any]) -> Any:
    """Return a page of the table of the chart that the callback is about."""
    which = dash.ctx.triggered_id
    found = next((p for p in pages if which and p.name == which["page"]), None)
    subject = None if found is None else open_for(found, View.read(data), is_fresh=False)
    if found is None or subject is None or isinstance(subject, Missing):
        return dash.no_update
    chart = next((c for c in found.charts(subject) if c.key == which["chart"]), None)
    if chart is None:
        return dash.no_update
    return show_table(chart.table, max(1, min(page or 1, count_pages(chart.table))))


def _wait(_: int, data: dict[str, Any], path: str) -> Any:
    """Go on, once the run that is waited for can be shown."""
    view = View.read(data)
    opened = open_subject(view)
    is_pending = isinstance(opened, Missing) and opened.is_pending
    return dash.no_update if is_pending else path + view.query()
