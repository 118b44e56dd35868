"""Ranks of a job over its steps."""

from collections.abc import Sequence

import plotly.graph_objects as go

from attnprof.units import format_bytes
from attnprof_dashboard.figures.theme import choose_unit, new_figure

_MOST_WRITTEN = 10
"""Steps up to which there is room to write the bytes into the picture."""


def draw_ranks(
    names: Sequence[str],
    steps: Sequence[int],
    sizes: Sequence[Sequence[int | None]],
    links: Sequence[Sequence[str]],
    *,
    scheme: str,
) -> go.Figure:
    """Return the peak of every step on every rank, the more bytes the hotter.

    Args:
        names: Of the ranks.
        steps: Numbers of the steps.
        sizes: Per rank and step the bytes; None where there is no such step.
        links: Per rank and step where a click leads.
        scheme: ``"light"`` or ``"dark"``.
    """
    figure = new_figure(scheme, height=110 + 24 * max(3, len(names)))
    largest = max((s for row in sizes for s in row if s), default=1)
    unit, word = choose_unit(largest)
    figure.add_heatmap(
        x=list(steps),
        y=list(range(len(names))),
        z=[[None if size is None else size / unit for size in row] for row in sizes],
        text=[["–" if size is None else format_bytes(size) for size in row] for row in sizes],
        customdata=[[[name, link] for link in row] for name, row in zip(names, links, strict=True)],
        hovertemplate="%{customdata[0]}, step %{x}: <b>%{text}</b><extra></extra>",
        colorbar={"ticksuffix": f" {word}", "thickness": 12, "outlinewidth": 0},
        autocolorscale=True,
        xgap=1,
        ygap=2,
        zmin=0,
        zmax=largest / unit,
        texttemplate="%{text}" if len(steps) <= _MOST_WRITTEN else "",
    )
    figure.update_yaxes(
        autorange="reversed",
        tickvals=list(range(len(names))),
        ticktext=list(names),
        showgrid=False,
        zeroline=False,
        fixedrange=True,
    )
    ticks = {"dtick": 1} if len(steps) <= 12 else {}
    figure.update_xaxes(title_text="step", showgrid=False, tickformat=",d", **ticks)
    return figure
