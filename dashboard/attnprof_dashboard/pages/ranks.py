"""Ranks: the processes of one job side by side."""

from dataclasses import dataclass

from dash import html
from dash.development.base_component import Component

from attnprof.report.verdict import format_share
from attnprof.units import format_bytes
from attnprof_dashboard import ids, state
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.data.catalog import Entry
from attnprof_dashboard.data.digest import DeviceDigest
from attnprof_dashboard.figures.ranks import draw_ranks
from attnprof_dashboard.pages.page import Page, Subject
from attnprof_dashboard.table import Column, Link, Table, Unit
from attnprof_dashboard.view import View

_MOST_RANKS = 64
_MOST_STEPS = 400


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a job."""

    entry: Entry
    device: DeviceDigest | None
    """None if its run cannot be read, or not yet."""
    why_not: str = ""

    @property
    def peak_bytes(self) -> int | None:
        """Its peak."""
        return self.device.summary["peak"]["total_bytes"] if self.device else None

    def link(self, step: int | None = None) -> str:
        """Return where its timeline is: the whole of it, or the peak of a step."""
        known = self.device.peak_of_step if self.device else {}
        event = None if step is None else known.get(step)
        return f"timeline{View(run=self.entry.key, at=event).query()}"

    def steps(self) -> dict[int, int | None]:
        """Return the peak of each step; None where it is not known."""
        if self.device is None or self.device.steps.is_empty():
            return {}
        return dict(self.device.steps.select("step", "peak_bytes").iter_rows())


def layout(subject: Subject) -> Component:
    """Return the page."""
    ranks = find_ranks(subject)
    if len(ranks) < 2:
        return message(
            "One process",
            "This run was recorded by one process. To see the ranks of a job side by side, record "
            "each into a directory of its own below the same one: ",
            html.Code('attnprof.trace(f"runs/job/rank-{rank}")'),
            ".",
        )
    steps, table = make_charts(subject, ranks)
    cards = [chart_card(steps, "ranks", graph_id=ids.lead("heatmap")), chart_card(table, "ranks")]
    return html.Div([_tiles(ranks), *cards])


def charts(subject: Subject) -> list[Chart]:
    """Return the charts, for files."""
    ranks = find_ranks(subject)
    return [] if len(ranks) < 2 else make_charts(subject, ranks)


def find_ranks(subject: Subject) -> list[Rank]:
    """Return the runs of the job that this one is a rank of; none if it is none."""
    if subject.entry.rank is None:
        return []
    known = state.current()
    job = subject.entry.key.rpartition("/")[0]
    entries = [
        entry
        for entry in known.catalog.entries()
        if entry.rank is not None and entry.key.rpartition("/")[0] == job
    ]
    found = []
    for entry in sorted(entries, key=lambda e: e.rank or 0)[:_MOST_RANKS]:
        opened = known.store.open(entry.key, is_fresh=False)
        device = opened.digest.device() if opened.digest else None
        found.append(Rank(entry, device, "being read" if opened.is_pending else opened.error))
    return found


def _tiles(ranks: list[Rank]) -> Component:
    peaks = [rank.peak_bytes for rank in ranks if rank.peak_bytes]
    mean = sum(peaks) / len(peaks) if peaks else 0
    most = max(peaks, default=0)
    highest = next((r for r in ranks if r.peak_bytes == most), None)
    excess = round(most - mean)
    return tiles(
        tile(f"{len(ranks)}", "ranks"),
        tile(
            format_bytes(most), f"the highest peak: rank {highest.entry.rank if highest else '–'}"
        ),
        tile(format_share(excess, round(mean) or 1), "imbalance: the highest above the mean"),
        tile(format_bytes(most - min(peaks, default=0)), "between the highest and the lowest"),
    )


def make_charts(subject: Subject, ranks: list[Rank]) -> list[Chart]:
    """Return ranks over steps, and a table that leads to each."""
    steps = sorted({step for rank in ranks for step in rank.steps()})[:_MOST_STEPS]
    sizes = [[rank.steps().get(step) for step in steps] for rank in ranks]
    names = [f"rank {rank.entry.rank}" for rank in ranks]
    columns = (Column("rank"), *(Column(f"step_{step}_bytes", Unit.BYTES) for step in steps))
    rows = [[name, *values] for name, values in zip(names, sizes, strict=True)]
    links = [[rank.link(step) for step in steps] for rank in ranks]
    figure = draw_ranks(names, steps, sizes, links, scheme=subject.scheme)
    return [
        Chart(
            "heatmap",
            "Peak by rank and step",
            "The highest instant of every step on every rank; an even column is a balanced step.",
            Table(columns, rows),
            figure,
            gestures="Click a step for what was live then.",
        ),
        Chart("ranks", "Ranks", "Each leads to its own timeline.", _tabulate(ranks)),
    ]


def _tabulate(ranks: list[Rank]) -> Table:
    columns = (
        Column("rank"),
        Column("status"),
        Column("peak_bytes", Unit.BYTES),
        Column("peak_step", Unit.COUNT),
        Column("layer", Unit.NAME),
        Column("run", Unit.NAME),
    )
    rows = []
    for rank in ranks:
        peak = rank.device.summary["peak"] if rank.device else {}
        link = Link(rank.entry.key, rank.link())
        status = rank.why_not or rank.entry.status
        rows.append(
            [rank.entry.rank, status, rank.peak_bytes, peak.get("step"), peak.get("layer"), link]
        )
    return Table(columns, rows)


PAGE = Page("ranks", "Ranks", "The processes of one job", layout, charts)
