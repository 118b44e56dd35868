"""Data quality: how far what is shown can be trusted."""

from typing import Any

from dash import html
from dash.development.base_component import Component

from attnprof.report.verdict import format_share
from attnprof.units import format_bytes
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import card, chart_card, tile, tiles
from attnprof_dashboard.figures.bars import draw_categories
from attnprof_dashboard.pages.page import Page, Subject
from attnprof_dashboard.table import Column, Table, Unit


def layout(subject: Subject) -> Component:
    """Return the page."""
    cards = [chart_card(chart, "quality") for chart in charts(subject)]
    return html.Div(
        [_tiles(subject), _notes(subject), html.Div(cards[:2], className="wide"), *cards[2:]]
    )


def charts(subject: Subject) -> list[Chart]:
    """Return what was inferred, what is unattributed, and what the files say of themselves."""
    return [
        _draw_inferred(subject),
        Chart(
            "unattributed",
            "Unattributed, by operator",
            "Seen and counted, and not explained. Over the whole run, not only at the peak.",
            _tabulate(subject.device.facts["unattributed"], "op"),
        ),
        Chart("facts", "What the run says of itself", "From its files.", _tabulate_facts(subject)),
    ]


def _tiles(subject: Subject) -> Component:
    peak, facts = subject.summary["peak"], subject.device.facts
    unattributed = peak["unattributed_bytes"]
    inferred = sum(row["blocks"] for row in facts["inferred"])
    files = "incomplete" if subject.digest.facts["has_lost_commits"] else "whole"
    return tiles(
        tile(
            format_share(unattributed, peak["total_bytes"]),
            f"of the peak is unattributed: {format_bytes(unattributed)}",
        ),
        tile(
            format_share(inferred, facts["blocks"]),
            f"of all blocks have an inferred category: {inferred:,} of {facts['blocks']:,}",
        ),
        tile(files, "are the files, up to the last commit in the journal"),
        tile(subject.digest.facts["status"].replace("_", " "), "is how the run ended"),
    )


def _notes(subject: Subject) -> Component:
    parts: list[Any] = []
    for note in subject.summary["notes"]:
        kind = "warn" if note["is_warning"] else None
        parts += [html.Dt(note["subject"], className=kind), html.Dd(note["text"])]
    return card("How far to trust this", "What the reports say too.", html.Dl(parts))


def _draw_inferred(subject: Subject) -> Chart:
    rows = subject.device.facts["inferred"]
    sizes = {row["category"]: row["size_bytes"] for row in rows}
    figure = draw_categories(sizes, scheme=subject.scheme) if sizes else None
    why = (
        "Blocks whose category was concluded from how they were used rather than observed; bytes "
        "are summed over all blocks of the run."
    )
    return Chart("inferred", "Inferred, by category", why, _tabulate(rows, "category"), figure)


def _tabulate(rows: list[dict[str, Any]], word: str) -> Table:
    columns = (
        Column(word, Unit.CATEGORY if word == "category" else Unit.NAME),
        Column("blocks", Unit.COUNT),
        Column("size_bytes", Unit.BYTES, "bytes"),
    )
    return Table.of(columns, rows)


def _tabulate_facts(subject: Subject) -> Table:
    facts, info = subject.digest.facts, subject.digest.info
    environment = info.get("environment")
    known = environment if isinstance(environment, dict) else {}
    rows: list[list[str]] = [
        ["directory", str(subject.entry.path)],
        ["schema version", str(info.get("schema_version"))],
        ["begun", str(info.get("created", "–"))],
        ["ended", str(info.get("ended", "–"))],
        ["operators", f"{facts['ops']:,}"],
        ["events on this device", f"{len(subject.device.index):,}"],
        ["blocks on this device", f"{subject.device.facts['blocks']:,}"],
        ["steps", f"{len(subject.device.steps):,}"],
        ["samples of process memory", f"{len(subject.digest.samples):,}"],
        ["a dry run", "yes: the program ran on fake tensors" if facts["is_dry"] else "no"],
        *[[name.replace("_", " "), _show(name, value)] for name, value in sorted(known.items())],
    ]
    return Table((Column("what", Unit.TEXT), Column("value", Unit.NAME)), rows)


def _show(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "–" if value is None else str(value)


PAGE = Page("quality", "Data quality", "How far to trust this", layout, charts)
