"""Advice as text: what would lower the peak, and what does it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from attnprof.analysis.what_if.advice import Advice
from attnprof.report.tables import Column, FittedTable, show_name
from attnprof.report.verdict import format_share
from attnprof.units import format_bytes

MOST_ADVICE = 3
"""So many pieces of advice are in a report; ``attnprof what-if`` shows all."""


def render_advice(advice: Sequence[Advice]) -> RenderableType | None:
    """Return the first pieces of advice: the new peak of each and where it is, and what does it."""
    if not advice:
        return None
    rows: list[list[Any]] = []
    options: list[list[Any]] = []
    for number, one in enumerate(advice[:MOST_ADVICE], 1):
        rows.append(
            [
                str(number),
                show_name(one.title),
                show_size(one.new_peak_bytes, exact=one.exact),
                format_bytes(one.saves_bytes),
                format_share(one.saves_bytes, one.new_peak_bytes + one.saves_bytes),
                show_place(one.new_peak_phase, one.new_peak_layer),
            ]
        )
        options.append([str(number), Text(show_name(one.how), style="dim")])
    columns = [
        Column("", right=True),
        Column("change", is_name=True),
        Column("new peak", right=True),
        Column("saves", right=True),
        Column("share", right=True, drop=2),
        Column("the peak then is in", is_name=True, drop=1),
    ]
    how = FittedTable([Column("", right=True), Column("", is_name=True)], options, has_head=False)
    return Group(FittedTable(columns, rows), Text(), how)


def show_size(size_bytes: int, *, exact: bool) -> str:
    """Return a size, with ``~`` in front if it is estimated."""
    return ("" if exact else "~") + format_bytes(size_bytes)


def show_place(phase: str, layer: str) -> str:
    """Return where a peak is: ``"backward, h.3.attn"``."""
    return show_name(f"{phase}, {layer}" if layer else phase)
