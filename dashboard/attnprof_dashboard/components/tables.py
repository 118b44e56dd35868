"""Tables: sizes in units, categories beside their colour, long ones by pages."""

from collections.abc import Callable, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import html
from dash.development.base_component import Component

from attnprof.analysis.fits import TOTAL
from attnprof.palette import colour_of
from attnprof.units import format_bytes
from attnprof_dashboard import ids
from attnprof_dashboard.table import Column, Link, Table, Unit

ROWS = 50
"""Of a table on a page; the file that can be downloaded has all at once."""


def show_table(table: Table, page: int = 1) -> Component:
    """Return a page of a table that scrolls sideways by itself where there is little room."""
    shown = table.rows[(page - 1) * ROWS : page * ROWS]
    # Plain elements: a thousand of Mantine's cells take a browser seconds.
    rows = [
        html.Tr([_show_cell(c, value) for c, value in zip(table.columns, row, strict=True)])
        for row in shown
    ]
    heads = [html.Th(c.title, className="num" if c.is_number else None) for c in table.columns]
    body = html.Table([html.Thead(html.Tr(heads)), html.Tbody(rows)], className="rows")
    notes = [] if table.rows else [html.P("None.", className="why")]
    return html.Div([html.Div(body, className="scroll", tabIndex=0), *notes])


def count_pages(table: Table) -> int:
    """Return how many pages a table has; at least one."""
    return max(1, -(-len(table.rows) // ROWS))


def paged_table(table: Table, page: str, key: str, *, is_open: bool) -> list[Component]:
    """Return a table of which the server sends a page at a time.

    Args:
        table: The table.
        page: The name of the page it is on.
        key: The key of its chart.
        is_open: Whether its first page is shown at once.
    """
    total = count_pages(table)
    pages = dmc.Pagination(
        id=ids.turn(page, key),
        total=total,
        value=1,
        size="sm",
        style={} if total > 1 else {"display": "none"},
    )
    rows = show_table(table) if is_open else None
    return [html.Div(rows, id=ids.rows(page, key)), pages]


def _show_cell(column: Column, value: Any) -> Component:
    if isinstance(value, Component):
        return html.Td(value)
    text = show_value(column.unit, value)
    if isinstance(value, Link):
        return html.Td(dmc.Anchor(value.text, href=value.href, size="sm"))
    if column.unit is Unit.CATEGORY and value:
        return html.Td(label_category(str(value)))
    if column.unit is Unit.NAME:
        return html.Td(break_path(text), className="name")
    if column.unit is Unit.PROSE:
        return html.Td(text, className="prose")
    title = f"{value:,} bytes" if column.unit is Unit.BYTES and value is not None else None
    return html.Td(text, title=title, className="num" if column.is_number else "text")


def show_value(unit: Unit, value: Any) -> str:
    """Return a value as people read it; a dash for none."""
    if value is None or value == "":
        return "–"
    shown: Callable[[Any], str] | None = _SHOWN.get(unit)
    return shown(value) if shown is not None else str(value)


def _show_share(value: float) -> str:
    if abs(value) < 0.0005:
        return "0 %" if abs(value) < 1e-9 else "<0.1 %"  # nothing but rounding, or little
    return f"{100 * value:.1f} %"


_SHOWN: dict[Unit, Callable[[Any], str]] = {
    Unit.BYTES: format_bytes,
    Unit.COUNT: lambda value: f"{value:,}",
    Unit.SECONDS: lambda value: f"{value:.6f} s",
    Unit.SHARE: _show_share,
    Unit.BOOL: lambda value: "yes" if value else "no",
}


def label_category(category: str) -> Component:
    """Return a category's name beside its colour; the total has none."""
    if category == TOTAL:
        return html.Span(category)
    return html.Span(
        [html.I(className="swatch", style={"background": colour_of(category)}), category],
        className="category",
    )


def break_path(path: str) -> Sequence[Any]:
    """Return a module path that breaks at its dots first."""
    parts: list[Any] = []
    for number, part in enumerate(path.split(".")):
        parts += [".", html.Wbr()] if number else []
        parts.append(part)
    return parts
