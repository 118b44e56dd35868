"""The drawer: every block that was live at an instant, and each of them in full."""

from typing import Any

import dash_mantine_components as dmc
import polars as pl
from dash import ClientsideFunction, Dash, Input, Output, State, html
from dash.development.base_component import Component

from attnprof.report.words import OUTSIDE
from attnprof.units import format_bytes
from attnprof_dashboard import ids
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import card
from attnprof_dashboard.components.controls import CLEAR
from attnprof_dashboard.components.tables import break_path, label_category, show_table
from attnprof_dashboard.pages.page import Missing, Subject, open_subject
from attnprof_dashboard.table import Column, Table, Unit
from attnprof_dashboard.view import View

_ROWS = 25
"""Blocks on one page of the table."""
_TITLE = "Live at this instant"
_COLUMNS = (
    Column("size_bytes", Unit.BYTES, "size"),
    Column("category", Unit.CATEGORY),
    Column("shape", Unit.TEXT),
    Column("dtype", Unit.TEXT),
    Column("op", Unit.NAME),
    Column("layer", Unit.NAME),
    Column("life", Unit.TEXT),
)


def make_drawer() -> Component:
    """Return the drawer, closed."""
    return dmc.Drawer(
        html.Div(id=ids.DRAWER_BODY),
        id=ids.DRAWER,
        position="bottom",  # the timeline stays in sight, and can be clicked again
        size="46%",
        title=_TITLE,
        opened=False,
        withOverlay=False,
        lockScroll=False,
        trapFocus=True,
        returnFocus=True,
        transitionProps={"duration": 80},
        closeButtonProps={"aria-label": "close"},
    )


def show_instant(subject: Subject) -> Component:
    """Return the drawer's content for the view's instant."""
    blocks = find_blocks(subject)
    if subject.view.since is None:
        pin = "Set A here: then click for B, to see what came between and is still live"
    else:
        pin = "Show all that is live at B again"
    names = blocks["category"].unique().sort().to_list()
    count = len(_choose_blocks(subject, blocks))
    category = subject.view.category if subject.view.category in names else ""
    return html.Div(
        [
            html.P(_describe_instant(subject, blocks), className="readout"),
            html.Button(pin, className="tool pin", type="button", **{"data-pin": "1"}),
            _show_block(subject),
            dmc.Select(
                id=ids.BLOCKS_FILTER,
                data=names,
                value=category or None,
                placeholder="all categories",
                clearable=True,
                clearButtonProps=CLEAR,
                size="xs",
                w=220,
                mb=8,
                **{"aria-label": "show one category"},
            ),
            html.Div(_show_page(subject, blocks, 1, category), id=ids.BLOCKS),
            dmc.Pagination(
                id=ids.BLOCKS_PAGE, total=max(1, -(-count // _ROWS)), value=1, size="sm", mt=8
            ),
        ]
    )


def list_instant(subject: Subject) -> Chart:
    """Return the blocks of the view's instant, for files."""
    blocks = find_blocks(subject)
    rows = [
        [row["size_bytes"], *_describe(subject, row)]
        for row in _choose_blocks(subject, blocks).iter_rows(named=True)
    ]
    return Chart("instant", _TITLE, _describe_instant(subject, blocks), Table(_COLUMNS, rows))


def save_instant(subject: Subject, page: str) -> list[Component]:
    """Return what the drawer shows, for a file; nothing without an instant."""
    if subject.view.at is None:
        return []
    why = _describe_instant(subject, find_blocks(subject))
    return [card(_TITLE, why, _show_block(subject), html.Div(id=ids.rows(page, "instant")))]


def _describe_instant(subject: Subject, blocks: pl.DataFrame) -> str:
    """Return how much is live at the view's instant, or what of it came since another."""
    view, index = subject.view, subject.device.index
    size = format_bytes(int(blocks["size_bytes"].sum()))
    if view.since is not None:
        return f"Allocated between A and B and live at B: {size} in {len(blocks):,} blocks."
    event = min(max(view.at or 0, 0), len(index) - 1)
    seconds = (int(index.time_ns[event]) - subject.begin_ns) / 1e9 if event >= 0 else 0.0
    return f"{size} live in {len(blocks):,} blocks at {seconds:.6f} s."


def _choose_blocks(subject: Subject, blocks: pl.DataFrame) -> pl.DataFrame:
    """Return the blocks of the view's category; all if there are none of it."""
    own = blocks.filter(pl.col("category") == subject.view.category)
    return blocks if own.is_empty() else own


def find_blocks(subject: Subject) -> pl.DataFrame:
    """Return the blocks that the view asks for."""
    view = subject.view
    if view.since is not None and view.at is not None:
        return subject.device.allocated_between(view.since, view.at)
    return subject.device.live_at(view.at if view.at is not None else -1)


def _show_page(subject: Subject, blocks: pl.DataFrame, page: int, category: str) -> Component:
    """Return one page of the table of blocks."""
    if category:
        blocks = blocks.filter(pl.col("category") == category)
    shown = blocks.slice((page - 1) * _ROWS, _ROWS).iter_rows(named=True)
    rows = [[_make_button(row), *_describe(subject, row)] for row in shown]
    return show_table(Table((Column("size"), *_COLUMNS[1:]), rows))


def _make_button(row: dict[str, Any]) -> Component:
    return html.Button(
        format_bytes(row["size_bytes"]),
        className="block",
        type="button",
        title=f"{row['size_bytes']:,} bytes: show block {row['allocation_id']}",
        **{"data-block": row["allocation_id"]},
    )


def _describe(subject: Subject, row: dict[str, Any]) -> list[Any]:
    """Return a block's row but for its size."""
    shape = " × ".join(map(str, row["shape"])) if row["shape"] is not None else ""
    return [
        row["category"],
        shape,
        row["dtype"],
        row["op"],
        row["layer"],
        _show_life(subject, row),
    ]


def _show_life(subject: Subject, row: dict[str, Any]) -> str:
    begin = max(0, row["start_ns"] - subject.begin_ns) / 1e9
    if row["end_ns"] is None:
        return f"{begin:.4f} s to the end"
    return f"{begin:.4f}–{(row['end_ns'] - subject.begin_ns) / 1e9:.4f} s"


def _show_block(subject: Subject) -> Component | None:
    """Return all that is known of the block that the view names."""
    number = subject.view.block
    row = subject.device.block(number) if number is not None else None
    if row is None:
        return None
    facts: list[tuple[str, Any]] = [
        ("size", f"{format_bytes(row['size_bytes'])} ({row['size_bytes']:,} bytes)"),
        ("requested", f"{row['requested_bytes']:,} bytes"),
        ("category", label_category(row["category"])),
        ("layer", break_path(row["layer"] or OUTSIDE)),
        ("op", row["op"] or "not seen being made"),
        ("shape", " × ".join(map(str, row["shape"])) if row["shape"] is not None else "–"),
        ("dtype", row["dtype"] or "–"),
        ("made in", f"step {row['step']}, {row['phase']}"),
        ("life", _show_life(subject, row)),
        ("saved for backward", "yes" if row["saved"] else "no"),
        ("category was", "observed" if row["exact"] else "inferred from how it was used"),
        ("address", f"0x{row['address']:x}" if row["address"] > 0 else "–"),
    ]
    entries = [part for name, text in facts for part in (html.Dt(name), html.Dd(text))]
    return html.Div(
        [html.H3(f"Block {number}"), html.Dl(entries)], className="block-card", id="block-card"
    )


def register(app: Dash) -> None:
    """Register the drawer's callbacks."""
    app.clientside_callback(
        ClientsideFunction("attnprof", "click"),
        Output(ids.VIEW, "data", allow_duplicate=True),
        Input(ids.TIMELINE, "clickData"),
        Input(ids.DRAWER, "opened"),
        State(ids.VIEW, "data"),
        prevent_initial_call=True,
    )

    app.callback(
        Output(ids.DRAWER_BODY, "children"),
        Output(ids.DRAWER, "opened"),
        Input(ids.VIEW, "data"),
    )(_show)
    app.callback(
        Output(ids.BLOCKS, "children"),
        Output(ids.BLOCKS_PAGE, "total"),
        Output(ids.BLOCKS_PAGE, "value"),
        Input(ids.BLOCKS_PAGE, "value"),
        Input(ids.BLOCKS_FILTER, "value"),
        State(ids.VIEW, "data"),
        prevent_initial_call=True,
    )(_turn)


def _show(data: dict[str, Any]) -> tuple[Any, bool]:
    subject = open_subject(View.read(data), is_fresh=False)
    if isinstance(subject, Missing) or subject.view.at is None:
        return None, False
    return show_instant(subject), True


def _turn(page: int, category: str | None, data: dict[str, Any]) -> tuple[Any, int, int]:
    """Return a page of the table, how many there are, and which one it is."""
    subject = open_subject(View.read(data), is_fresh=False)
    if isinstance(subject, Missing):
        return None, 1, 1
    blocks = find_blocks(subject)
    count = len(blocks.filter(pl.col("category") == category)) if category else len(blocks)
    total = max(1, -(-count // _ROWS))
    page = min(page or 1, total)
    return _show_page(subject, blocks, page, category or ""), total, page
