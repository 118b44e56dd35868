"""The rolling window of a run that is being recorded."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from attnprof.palette import COLOURS, colour_of, stack_order
from attnprof.report.drawing import find_ticks
from attnprof.units import format_bytes
from attnprof_dashboard.data.live_device import Instant
from attnprof_dashboard.figures.theme import choose_unit, new_figure, spell_sizes

_OTHER_COLOUR = "#8f9be3"
"""Of what the program says nothing about: mostly activations."""


def draw_live(
    instants: Sequence[Instant], peak: Instant | None, begin_ns: int, *, scheme: str
) -> go.Figure:
    """Return the figure.

    Args:
        instants: What to draw, in order of time.
        peak: The highest instant since the run began, whether it is shown or not.
        begin_ns: The clock when the run began.
        scheme: ``"light"`` or ``"dark"``.
    """
    figure = new_figure(scheme, height=440)
    seconds = [(instant.time_ns - begin_ns) / 1e9 for instant in instants]
    top = max((instant.total_bytes for instant in instants), default=1)
    if peak is not None:
        top = max(top, peak.total_bytes)
    unit, _ = choose_unit(max(top, 1))
    names = sorted({name for i in instants for name, size in i.by_role if size}, key=stack_order)
    for name in names:
        sizes = np.array([dict(instant.by_role).get(name, 0) for instant in instants], np.int64)
        figure.add_scatter(
            x=seconds,
            y=sizes / unit,
            name=name.replace("_", " "),
            mode="lines",
            stackgroup="live",
            line={"shape": "hv", "width": 0},
            fillcolor=colour_of(name) if name in COLOURS else _OTHER_COLOUR,
            text=spell_sizes(sizes),
            hovertemplate="%{text}",
        )
    totals = np.array([instant.total_bytes for instant in instants], np.int64)
    figure.add_scatter(
        x=seconds,
        y=totals / unit,
        name="total",
        mode="lines",
        line={"shape": "hv", "width": 1.3},
        text=spell_sizes(totals),
        hovertemplate="<b>%{text}</b>",
    )
    if peak is not None:
        figure.add_hline(
            y=peak.total_bytes / unit,
            line_width=1,
            line_dash="dash",
            annotation_text=f"peak {format_bytes(peak.total_bytes)}",
            annotation_position="top left",
        )
    ticks = find_ticks(max(top, 1))
    figure.update_yaxes(
        range=[0, max(ticks[-1], 1.08 * top) / unit],
        tickvals=[tick / unit for tick in ticks],
        ticktext=[format_bytes(tick) for tick in ticks],
        fixedrange=True,
    )
    figure.update_xaxes(ticksuffix=" s", showgrid=False, fixedrange=True)
    figure.update_layout(
        hovermode="x unified",
        dragmode=False,
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
        uirevision="live",
    )
    return figure
