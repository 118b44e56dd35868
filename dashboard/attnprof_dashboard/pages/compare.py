"""Compare: two runs, each at its own peak, and what makes the difference."""

from dash import html
from dash.development.base_component import Component

from attnprof.report.verdict import format_share
from attnprof.report.words import OUTSIDE
from attnprof.units import format_bytes
from attnprof_dashboard import state
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.comparison import Comparison, compare
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.components.controls import choose, list_runs
from attnprof_dashboard.data.digest import DeviceDigest
from attnprof_dashboard.figures.bars import draw_bars, draw_lines, draw_waterfall
from attnprof_dashboard.pages.page import Page, Subject
from attnprof_dashboard.table import Column, Table, Unit

_MOST_LAYERS = 24
"""Bars of a waterfall; the rest is one bar, the table has all."""


def layout(subject: Subject) -> Component:
    """Return the page."""
    key = find_other(subject)
    items = list_runs(e for e in state.current().catalog.entries() if e.key != subject.entry.key)
    chooser = choose("other", items, key, "a run", "compare with", is_clearable=False, width=460)
    json_file = html.A(
        "The numbers as JSON", className="tool", href="export/compare.json",
        **{"data-export": "compare.json"},
    )  # fmt: skip
    head = html.Div([chooser, json_file], className="controls")
    other, why_not = open_other(subject, key)
    if other is None:
        return html.Div([head, message("Nothing to compare with", why_not)])
    comparison = compare(subject.device, other)
    names = name_both(subject, key, other)
    found = [chart_card(c, "compare") for c in make_charts(names, comparison, subject.scheme)]
    return html.Div(
        [
            head,
            html.P(write_verdict(*names, comparison), className="verdict"),
            tiles(
                tile(format_bytes(comparison.first_bytes), f"peak of {names[0]}"),
                tile(format_bytes(comparison.second_bytes), f"peak of {names[1]}"),
                tile(_signed(comparison.difference_bytes), "difference"),
            ),
            html.Div(found[:2], className="wide"),
            html.Div(found[2:], className="wide"),
        ]
    )


def charts(subject: Subject) -> list[Chart]:
    """Return the charts, for files."""
    key = find_other(subject)
    other, _ = open_other(subject, key)
    if other is None:
        return []
    names = name_both(subject, key, other)
    return make_charts(names, compare(subject.device, other), subject.scheme)


def find_other(subject: Subject) -> str:
    """Return the run to compare with: the chosen one, else a neighbour, else the newest other."""
    if subject.view.other and subject.view.other != subject.entry.key:
        return subject.view.other
    keys = [
        e.key
        for e in state.current().catalog.entries()
        if e.is_readable and e.key != subject.entry.key
    ]
    folder = subject.entry.key.rpartition("/")[0]
    near = [key for key in keys if key.rpartition("/")[0] == folder]
    return next(iter(near or keys), "")


def open_other(subject: Subject, key: str) -> tuple[DeviceDigest | None, str]:
    """Return the other run's device, or why there is none."""
    if not key:
        return None, "There is no other run here."
    opened = state.current().store.open(key)
    if opened.digest is None:
        wait = "It is still being read; reload the page."
        return (
            None,
            wait if opened.is_pending else opened.error or f"{key} is a sweep; choose a run.",
        )
    # Of a run that is shown on its main device the other's main one, whatever it is called.
    is_main = subject.device.name == subject.digest.device_names[0]
    return opened.digest.device("" if is_main else subject.device.name), ""


def name_both(subject: Subject, key: str, other: DeviceDigest) -> tuple[str, str]:
    """Return what the two are called: by their devices too, where these differ."""
    if subject.device.name == other.name:
        return subject.entry.key, key
    return f"{subject.entry.key} on {subject.device.name}", f"{key} on {other.name}"


def write_verdict(first: str, second: str, comparison: Comparison) -> str:
    """Return the difference in a sentence, with what pulled most either way."""
    size = comparison.difference_bytes
    if not size:
        return f"{second} has the same peak as {first}, to the byte."
    how = "higher" if size > 0 else "lower"
    share = format_share(abs(size), comparison.first_bytes)
    said = f"The peak of {second} is {format_bytes(abs(size))} ({share}) {how} than that of {first}"
    changes = [c for c in comparison.categories if c.difference_bytes]  # the largest come first
    most = next(c for c in changes if (c.difference_bytes > 0) == (size > 0))
    part = f"{most.name}, {_signed(most.difference_bytes)}"
    if abs(most.difference_bytes) <= abs(size):
        return f"{said}; the largest part of it is {part}."
    back = next(c for c in changes if (c.difference_bytes > 0) != (size > 0))
    return f"{said}: {part}, against {back.name}, {_signed(back.difference_bytes)}."


def _signed(size_bytes: int) -> str:
    return f"+{format_bytes(size_bytes)}" if size_bytes > 0 else format_bytes(size_bytes)


def make_charts(names: tuple[str, str], comparison: Comparison, scheme: str) -> list[Chart]:
    """Return the differences by category and by layer, and peaks by step and phase."""
    return [
        _draw_changes("categories", names, comparison, scheme),
        _draw_changes("layers", names, comparison, scheme),
        _draw_steps(names, comparison, scheme),
        _draw_phases(names, comparison, scheme),
    ]


def _draw_changes(key: str, names: tuple[str, str], comparison: Comparison, scheme: str) -> Chart:
    is_layers = key == "layers"
    changes = comparison.layers if is_layers else comparison.categories
    word, unit = ("layer", Unit.NAME) if is_layers else ("category", Unit.CATEGORY)
    why = "From the first run's peak to the second's; the parts sum to the difference, to the byte."
    columns = (
        Column(word, unit),
        Column("first_bytes", Unit.BYTES, names[0]),
        Column("second_bytes", Unit.BYTES, names[1]),
        Column("difference_bytes", Unit.BYTES, "difference"),
    )
    rows = [[c.name or OUTSIDE, c.first_bytes, c.second_bytes, c.difference_bytes] for c in changes]
    parts = [(c.name or OUTSIDE, c.difference_bytes) for c in changes if c.difference_bytes]
    shown, rest = parts[:_MOST_LAYERS], sum(size for _, size in parts[_MOST_LAYERS:])
    if len(parts) > _MOST_LAYERS:
        shown.append((f"{len(parts) - _MOST_LAYERS} more", rest))
    figure = draw_waterfall(
        (names[0], comparison.first_bytes),
        shown,
        (names[1], comparison.second_bytes),
        scheme=scheme,
    )
    return Chart(key, f"By {word}", why, Table(columns, rows), figure)


def _draw_steps(names: tuple[str, str], comparison: Comparison, scheme: str) -> Chart:
    columns = (
        Column("step", Unit.COUNT),
        Column("first_bytes", Unit.BYTES, names[0]),
        Column("second_bytes", Unit.BYTES, names[1]),
    )
    figure = draw_lines(
        [n for n, _, _ in comparison.steps],
        {
            names[0]: [a for _, a, _ in comparison.steps],
            names[1]: [b for _, _, b in comparison.steps],
        },
        scheme=scheme,
        title="step",
    )
    why = "The highest instant of each step, aligned by its number."
    return Chart("steps", "Step by step", why, Table(columns, comparison.steps), figure)


def _draw_phases(names: tuple[str, str], comparison: Comparison, scheme: str) -> Chart:
    columns = (
        Column("phase"),
        Column("first_bytes", Unit.BYTES, names[0]),
        Column("second_bytes", Unit.BYTES, names[1]),
    )
    rows = [row for row in comparison.phases if row[0]]
    figure = draw_bars(
        [n for n, _, _ in rows],
        {names[0]: [a for _, a, _ in rows], names[1]: [b for _, _, b in rows]},
        scheme=scheme,
    )
    why = "The most bytes live in each phase of all steps."
    return Chart("phases", "Phase by phase", why, Table(columns, rows), figure)


PAGE = Page("compare", "Compare", "What differs between two runs", layout, charts)
