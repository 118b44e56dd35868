"""What-ifs as text: one in detail, or all that apply to a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attnprof.analysis.peak import Peak
from attnprof.analysis.what_if.advice import WhatIf
from attnprof.report.advice_text import show_place, show_size
from attnprof.report.compare import compare_peaks
from attnprof.report.compare_text import render_changes
from attnprof.report.tables import Column, FittedTable, show_name
from attnprof.report.text import heading
from attnprof.report.verdict import format_share
from attnprof.units import format_bytes


def render_what_if(what_if: WhatIf) -> RenderableType:
    """Return what a change, or several together, would come to."""
    parts: list[RenderableType] = [Text(_write_sentence(what_if), style="bold")]
    for change in what_if.changes:
        rows: list[list[RenderableType]] = [
            ["in this run", Text(show_name(change.evidence))],
            ["option", Text(show_name(change.how))],
        ]
        rows += [["assumes", Text(show_name(text))] for text in change.assumes]
        if not change.exact:
            rows.append(["estimate", Text("not all sizes can be read off the run")])
        columns = [Column(""), Column("", is_name=True)]
        table = FittedTable(columns, rows, has_head=False)
        parts += [Text(), heading(show_name(change.title)), Padding(table, (0, 0, 0, 2))]
    changes = compare_peaks(what_if.before, what_if.after)
    table = render_changes(changes, first="recorded", second="then")
    parts += [Text(), heading("Category by category, each at its own peak")]
    return Group(*parts, Padding(table, (0, 0, 0, 2)))


def _write_sentence(what_if: WhatIf) -> str:
    before, after = what_if.before, what_if.after
    about = "" if what_if.exact else "about "
    saved = what_if.saves_bytes
    if saved:
        less = f"{format_bytes(abs(saved))} {'less' if saved > 0 else 'more'}"
        how_much = f"{less} ({format_share(abs(saved), before.total_bytes)})"
    else:
        how_much = "no less"
    names = " and ".join(what_if.scenarios)
    return (
        f"With {names} the peak would be {about}{format_bytes(after.total_bytes)} instead of "
        f"{format_bytes(before.total_bytes)}, {how_much}: in step {after.step}, "
        f"{show_place(after.phase, after.layer)}."
    )


def render_scenarios(
    before: Peak, applied: Sequence[WhatIf], refused: Mapping[str, str]
) -> RenderableType:
    """Return every scenario: those that apply with their new peak, the others with the reason.

    Args:
        before: The peak that was recorded.
        applied: Scenarios replayed one by one.
        refused: Why the others do not apply, by name.
    """
    where = show_place(before.phase, before.layer)
    sentence = (
        f"The peak was {format_bytes(before.total_bytes)} in step {before.step}, {where}. "
        "Each change by itself, replayed:"
    )
    parts: list[RenderableType] = [Text(sentence, style="bold")]
    if applied:
        parts += [Text(), Padding(_list_applied(applied), (0, 0, 0, 2))]
    if refused:
        rows: list[list[RenderableType]] = [
            [name, Text(show_name(reason), style="dim")] for name, reason in refused.items()
        ]
        table = FittedTable([Column(""), Column("", is_name=True)], rows, has_head=False)
        parts += [Text(), heading("Nothing to change"), Padding(table, (0, 0, 0, 2))]
    return Group(*parts)


def _list_applied(applied: Sequence[WhatIf]) -> FittedTable:
    rows: list[list[Any]] = []
    for one in applied:
        share = format_share(abs(one.saves_bytes), one.before.total_bytes)
        rows.append(
            [
                ", ".join(one.scenarios),
                show_size(one.after.total_bytes, exact=one.exact),
                format_bytes(one.saves_bytes),
                f"-{share}" if one.saves_bytes < 0 else share,
                show_place(one.after.phase, one.after.layer),
            ]
        )
    columns = [
        Column("scenario"),
        Column("new peak", right=True),
        Column("saves", right=True),
        Column("share", right=True, drop=2),
        Column("the peak then is in", is_name=True, drop=1),
    ]
    return FittedTable(columns, rows)
