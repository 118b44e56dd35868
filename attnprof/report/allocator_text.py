"""The allocator in the text report."""

from rich.console import Group, RenderableType
from rich.text import Text

from attnprof.palette import colour_of
from attnprof.report.allocator_summary import (
    AllocatorSummary,
    Holding,
    describe_state,
    explain_failure,
)
from attnprof.report.tables import Column, FittedTable, show_name
from attnprof.report.verdict import format_share
from attnprof.units import format_bytes

MOST_HOLDINGS = 8


def render_state(summary: AllocatorSummary | None) -> RenderableType | None:
    """Return what was reserved at the peak; None where it is not known."""
    if summary is None or summary.state is None or not summary.state.reserved_bytes:
        return None
    return Text(describe_state(summary.state))


def render_failure(summary: AllocatorSummary | None) -> RenderableType | None:
    """Return why a request failed and who held the memory; None if none failed."""
    if summary is None or summary.failure is None:
        return None
    lines = [Text(show_name(line)) for line in explain_failure(summary.failure)]
    rows = [_make_row(each, summary.failure.held.total_bytes) for each in summary.holdings]
    columns = [
        Column("held by", is_name=True),
        Column("category"),
        Column("bytes", right=True),
        Column("share", right=True),
    ]
    rest = summary.holdings[MOST_HOLDINGS:]
    if rest:
        others = Holding(f"{len(rest)} more", "", sum(each.size_bytes for each in rest))
        rows = [*rows[:MOST_HOLDINGS], _make_row(others, summary.failure.held.total_bytes)]
    return Group(*lines, FittedTable(columns, rows))


def _make_row(holding: Holding, total: int) -> list[RenderableType]:
    return [
        show_name(holding.layer) or "(unknown)",
        Text(holding.category, style=colour_of(holding.category) if holding.category else ""),
        format_bytes(holding.size_bytes),
        format_share(holding.size_bytes, total),
    ]
