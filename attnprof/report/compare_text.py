"""Two peaks side by side, as text."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from attnprof.palette import colour_of
from attnprof.report.compare import Change
from attnprof.report.tables import Column, FittedTable
from attnprof.units import format_bytes


def render_changes(changes: Sequence[Change], *, first: str, second: str) -> FittedTable:
    """Return a table of categories at two peaks, with their total.

    Args:
        changes: The categories.
        first: What to call the first peak.
        second: What to call the second.
    """
    rows: list[list[RenderableType]] = [
        [Text(c.name, style=colour_of(c.name)), *_show_change(c)]
        for c in changes
        if c.first_bytes or c.second_bytes
    ]
    total = Change(
        "total",
        sum(change.first_bytes for change in changes),
        sum(change.second_bytes for change in changes),
    )
    rows.append([Text("total", style="bold"), *_show_change(total)])
    columns = [
        Column("category"),
        Column(first, right=True),
        Column(second, right=True),
        Column("difference", right=True),
    ]
    return FittedTable(columns, rows, ruled_off=1)


def _show_change(change: Change) -> list[str]:
    difference = change.difference_bytes
    sign = "+" if difference > 0 else ""
    return [
        format_bytes(change.first_bytes),
        format_bytes(change.second_bytes),
        f"{sign}{format_bytes(difference)}" if difference else "–",
    ]
