"""What a page is, and what every page does before its own part begins."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import dash_mantine_components as dmc
from dash import Dash, dcc, html
from dash.development.base_component import Component
from flask import request

from attnprof.vocabulary import Status
from attnprof_dashboard import ids, state
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import message, page_tools
from attnprof_dashboard.data.catalog import DELETED, Entry, Kind
from attnprof_dashboard.data.digest import DeviceDigest, Digest
from attnprof_dashboard.view import View

SCHEME_COOKIE = "attnprof-theme"
_NO_RUN = "it is a sweep: choose one of its runs, or see what they say together under Growth"


@dataclass(frozen=True, slots=True)
class Glance:
    """A run whose directory is known and nothing else."""

    entry: Entry
    view: View
    scheme: str
    """``"light"`` or ``"dark"``."""


@dataclass(frozen=True, slots=True)
class Subject(Glance):
    """A run as a page shows it."""

    digest: Digest
    device: DeviceDigest

    @property
    def summary(self) -> dict[str, Any]:
        """What reports say of the device; see `attnprof.report.json`."""
        return self.device.summary

    @property
    def begin_ns(self) -> int:
        """The clock at the first event: times on pages count from here."""
        return self.device.index.begin_ns


def _name_devices(subject: "Subject") -> tuple[str, list[str]]:
    return subject.device.name, subject.digest.device_names


def _save_nothing(subject: "Subject") -> list[Component]:
    return []


def _no_callbacks(app: Dash) -> None:
    """Register nothing."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page about a run."""

    name: str
    """In addresses; the first page's is empty there."""
    title: str
    about: str
    """What it answers, for the navigation's tooltip."""
    layout: Callable[[Subject], Component]
    charts: Callable[[Subject], list[Chart]]
    """Its charts, for files."""
    register: Callable[[Dash], None] = field(default=_no_callbacks)
    """Registers its callbacks."""
    saved: Callable[[Subject], list[Component]] = field(default=_save_nothing)
    """Returns what its callbacks add to the layout, for files."""
    needs_digest: bool = True
    """Else it takes a `Glance`, and shows runs before they were read."""
    devices: Callable[[Subject], tuple[str, list[str]]] = field(default=_name_devices)
    """Returns the device that is shown, and those that can be chosen."""
    takes_sweeps: bool = False
    """A sweep that is given in a run's place is shown."""
    draws_itself: bool = False
    """Its own callbacks bring it up to date; else all of it is drawn anew for another view."""

    @property
    def path(self) -> str:
        """Its address below the prefix."""
        return "/" if self.name == "overview" else f"/{self.name}"


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a run cannot be shown."""

    entry: Entry | None
    error: str = ""
    is_pending: bool = False


def open_subject(view: View, *, is_fresh: bool = True) -> Subject | Missing:
    """Return the run that a view speaks of."""
    known = state.current()
    entry = known.pick(view.run)
    if entry is None:
        return _miss(view)
    opened = known.store.open(entry.key, is_fresh=is_fresh)
    if opened.digest is None:
        return Missing(entry, opened.error or _NO_RUN, opened.is_pending)
    device = opened.digest.device(view.device)
    return Subject(entry, view, read_scheme(), opened.digest, device)


def glance_at(view: View) -> Glance | Missing:
    """Return the run that a view speaks of, unread."""
    entry = state.current().pick(view.run)
    return _miss(view) if entry is None else Glance(entry, view, read_scheme())


def _miss(view: View) -> Missing:
    return Missing(None, f"there is no run {view.run!r} here" if view.run else "")


def open_for(page: Page, view: View, *, is_fresh: bool = True) -> Subject | Missing:
    """Return what a page takes of the run that a view speaks of."""
    entry = state.current().catalog.find(view.run) if page.takes_sweeps and view.run else None
    if entry is not None and entry.kind is Kind.SWEEP:
        view = replace(view, run="", sweep=entry.key)
    if page.needs_digest:
        return open_subject(view, is_fresh=is_fresh)
    return cast(Subject | Missing, glance_at(view))  # it uses no more of it than a Glance has


def read_scheme() -> str:
    """Return the colour scheme that the browser asks for: ``"light"`` or ``"dark"``."""
    return "dark" if request.cookies.get(SCHEME_COOKIE) == "dark" else "light"


def render(page: Page, query: dict[str, Any]) -> Component:
    """Return what is shown at a page's address."""
    view = View.read(query)
    subject = open_for(page, view)
    if isinstance(subject, Missing):
        body: list[Any] = [_explain(subject)]
        key = subject.entry.key if subject.entry is not None else view.run
        data: dict[str, Any] = {"page": page.name, "run": key, "devices": []}
    else:
        warnings = list_warnings(page, subject)
        # Without the id nobody draws it anew: its own callbacks do.
        named = {} if page.draws_itself else {"id": ids.BODY}
        body = [*warnings, html.Div(page.layout(subject), className="body", **named)]
        device, devices = page.devices(subject)
        data = {**asdict(subject.view), "page": page.name, "run": subject.entry.key}
        data |= {"device": device, "devices": devices}
    head = html.Div([html.H1(page.title), page_tools(page.name)], className="page-head")
    stores = [
        dcc.Store(id=ids.VIEW, data=data),
        dcc.Store(id=ids.SUBJECT, data={name: data.get(name) for name in ("run", "device")}),
    ]
    return html.Div([*stores, head, *body], className="page")


def render_unknown(**query: Any) -> Component:
    """Return what is shown at an address that no page has."""
    view = asdict(View.read(query))
    return html.Div(
        [
            dcc.Store(id=ids.VIEW, data={**view, "page": "", "devices": []}),
            dcc.Store(id=ids.SUBJECT, data={"run": view["run"], "device": view["device"]}),
            html.Div(html.H1("No such page"), className="page-head"),
            message("Nothing is at this address", "Choose a page from the navigation."),
        ],
        className="page",
    )


def _explain(missing: Missing) -> Component:
    if missing.is_pending:
        return html.Div(
            [
                message(
                    "Reading the run",
                    "It is long: what its facts mean is worked out once, and kept. This page goes "
                    "on by itself.",
                ),
                dmc.Progress(value=100, animated=True, mt="sm"),
                dcc.Interval(id=ids.WAITING, interval=700),
            ]
        )
    if missing.entry is None and not missing.error:
        return message(
            "No runs yet",
            "Nothing was recorded below ", html.Code(str(state.current().catalog.root)), ". "
            "Record a script with ", html.Code("attnprof run train.py"),
            ", or see an example with ", html.Code("attnprof demo"), ".",
        )  # fmt: skip
    return message("This run cannot be shown", missing.error, is_bad=True)


def list_warnings(page: Page, subject: Subject) -> list[Component]:
    """Return what must be known before anything on the page is believed."""
    if not page.needs_digest:
        return []
    entry = subject.entry
    if entry.status == DELETED:
        return [message("Deleted", "Its directory is gone; this is what was read before.")]
    if entry.status == Status.RECORDING.value:
        return [
            message("Still recording", "The numbers cover what was written when the page was made.")
        ]
    if subject.digest.facts["has_lost_commits"]:
        return [
            message(
                "Truncated",
                "The newest part of the run is missing from its files; the page covers what came "
                "before it.",
                is_bad=True,
            )
        ]
    if not subject.device.facts["blocks"]:
        why = f" It ended with: {entry.reason}" if entry.reason else ""
        return [message("Nothing was recorded", f"No tensor was made while attnprof watched.{why}")]
    if entry.status != Status.COMPLETED.value:
        text = entry.status.replace("_", " ")
        why = f"{entry.reason.rstrip('.')}. " if entry.reason else ""
        return [message(text.capitalize(), f"{why}The numbers cover what ran until then.")]
    return []
