"""The timeline: live bytes by category, stacked, with what happened when."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go

from attnprof.palette import colour_of, stack_order
from attnprof.report.drawing import find_ticks
from attnprof.units import format_bytes
from attnprof_dashboard.data.timeline_index import Window
from attnprof_dashboard.figures.theme import PHASE_COLOURS, choose_unit, new_figure, spell_sizes

MOST_SPANS = 160
"""More stretches of phases than this are not told apart in one picture."""
_LEAST_SPAN = 0.06
"""Of the width: what is said of a gap stands on gaps at least so wide."""
_LETTER_PX = 6.6
_NAME_SIZES = {380: 11.0, 800: 10.9}
"""By how wide the picture is at least, the font size of phases' names that have room then. It tells
the style sheet which to leave out of a narrower one: how wide it is only the browser knows."""

_NEAR_END = 0.2
"""Of the width: on a narrow screen half of the peak's text is as wide."""


@dataclass(frozen=True, slots=True)
class Line:
    """A level across the picture, such as what the device has."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Marks:
    """What is pointed out on a timeline. Times are nanoseconds since the run began."""

    begin_ns: int
    """The clock when the run began."""
    spans: Sequence[tuple[str, int, int]] = ()
    """Stretches of phases: name, begin, end."""
    peak: tuple[int, int] | None = None
    """Time and bytes of the highest instant, if it lies in the window."""
    instant_ns: int | None = None
    since_ns: int | None = None
    life: tuple[int, int] | None = None
    """Begin and end of the block that is looked at."""
    lines: Sequence[Line] = field(default_factory=tuple)
    gaps: Sequence[tuple[int, int]] = ()
    """Begin and end of stretches of which only counters are known."""


def draw_timeline(
    window: Window, marks: Marks, *, scheme: str, height: int = 460, only: str = ""
) -> go.Figure:
    """Return the figure; the horizontal axis is seconds since the run began.

    Args:
        window: The samples.
        marks: What to point out.
        scheme: ``"light"`` or ``"dark"``.
        height: In pixels.
        only: Show this category alone.
    """
    figure = new_figure(scheme, height=height)
    seconds = (window.time_ns - marks.begin_ns) / 1e9
    shown = {k: v for k, v in window.by_category.items() if (not only or k == only) and v.any()}
    outline = window.by_category.get(only, window.total_bytes) if only else window.total_bytes
    lines = [line for line in marks.lines if line.size_bytes <= 2 * int(outline.max(initial=0))]
    top = max([int(outline.max(initial=0)), *(line.size_bytes for line in lines), 1])
    unit, _ = choose_unit(top)
    for name in sorted(shown, key=stack_order):
        figure.add_scatter(
            x=seconds,
            y=shown[name] / unit,
            name=name,
            mode="lines",
            stackgroup="live",
            line={"shape": "hv", "width": 0},
            fillcolor=colour_of(name),
            text=spell_sizes(shown[name]),
            hovertemplate="%{text}",
        )
    figure.add_scatter(
        x=seconds,
        y=outline / unit,
        name=only or "total",
        mode="lines",
        customdata=window.event.tolist(),  # clicks do not get at what is in an encoded array
        line={"shape": "hv", "width": 1.3},
        text=spell_sizes(outline),
        hovertemplate="<b>%{text}</b>",
    )
    begin, end = (float(seconds[0]), float(seconds[-1])) if len(seconds) else (0.0, 0.0)
    _mark(figure, marks, unit)
    if marks.peak is not None and not only:
        _mark_peak(figure, marks.peak, unit, (begin, end))
    _draw_levels(figure, lines, unit)
    _draw_axes(figure, (begin, end), top, unit)
    figure.update_layout(
        hovermode="x unified",
        hoverdistance=-1,  # or a click where for long nothing happened would do nothing
        dragmode="zoom",
        margin={"l": 8, "r": 16, "t": 44, "b": 8},
        uirevision="timeline",
    )
    _draw_spans(figure, marks.spans, begin, end)
    _draw_gaps(figure, marks.gaps, begin, end)
    return figure


def _draw_axes(figure: go.Figure, window: tuple[float, float], top: int, unit: int) -> None:
    """Draw seconds across, and bytes in a unit up to the highest that is shown."""
    begin, end = window
    ticks = find_ticks(top)
    figure.update_yaxes(
        range=[0, max(1.02 * ticks[-1], 1.09 * top) / unit],
        tickvals=[tick / unit for tick in ticks],
        ticktext=[format_bytes(tick) for tick in ticks],
        fixedrange=True,
    )
    figure.update_xaxes(
        range=[begin, end if end > begin else begin + 1],  # of an instant Plotly draws two seconds
        ticksuffix=" s",
        exponentformat="none",  # or there are ticks of "200μ s"
        showgrid=False,
        hoverformat=".6f",
    )


def _mark(figure: go.Figure, marks: Marks, unit: int) -> None:
    if marks.life is not None:
        first, last = marks.life
        figure.add_vrect(
            x0=first / 1e9, x1=last / 1e9, fillcolor="#8c8f7b", opacity=0.28, line_width=0,
            annotation_text="life of the block", annotation_position="bottom left",
        )  # fmt: skip
    for at, dash, name in ((marks.since_ns, "dot", "A"), (marks.instant_ns, "solid", "B")):
        if at is not None:
            text = name if marks.since_ns is not None else ""
            figure.add_vline(x=at / 1e9, line_width=1.5, line_dash=dash, annotation_text=text)


def _mark_peak(
    figure: go.Figure, peak: tuple[int, int], unit: int, window: tuple[float, float]
) -> None:
    seconds, size = peak[0] / 1e9, peak[1]
    figure.add_scatter(
        x=[seconds],
        y=[size / unit],
        mode="markers",
        marker={"size": 9, "symbol": "diamond", "line": {"width": 0}},
        name="peak",
        hoverinfo="skip",
    )
    place = (seconds - window[0]) / ((window[1] - window[0]) or 1.0)
    # Near an end of the picture the text lies to the inner side, or it would be cut off.
    anchor = "left" if place < _NEAR_END else "right" if place > 1 - _NEAR_END else "center"
    figure.add_annotation(
        x=seconds, y=size / unit, text=f"peak {format_bytes(size)}", showarrow=False,
        xanchor=anchor, yanchor="bottom", yshift=7, font={"size": 12},
    )  # fmt: skip


def _draw_levels(figure: go.Figure, lines: Sequence[Line], unit: int) -> None:
    for line in lines:
        figure.add_hline(
            y=line.size_bytes / unit,
            line_width=1,
            line_dash="dash",
            annotation_text=f"{line.name} {format_bytes(line.size_bytes)}",
            annotation_position="top left",
        )


def _draw_spans(
    figure: go.Figure, spans: Sequence[tuple[str, int, int]], begin: float, end: float
) -> None:
    """Draw the ribbon of phases over the picture."""
    inside = [
        (name, max(first / 1e9, begin), min(last / 1e9, end))
        for name, first, last in spans
        if last / 1e9 > begin and first / 1e9 < end
    ]
    width = end - begin
    if width <= 0:
        return
    shapes = [
        {
            "type": "rect", "xref": "x", "yref": "paper", "x0": first, "x1": last, "y0": 1.015,
            "y1": 1.06, "fillcolor": PHASE_COLOURS.get(name, "#bfc2c7"), "line": {"width": 0},
        }
        for name, first, last in inside
    ]  # fmt: skip
    names = [
        {
            "x": begin + middle * width, "y": 1.062, "xref": "x", "yref": "paper",
            "yanchor": "bottom", "text": name, "showarrow": False, "font": {"size": size},
        }
        for name, middle, size in _place_names(
            [(name, (x0 - begin) / width, (x1 - begin) / width) for name, x0, x1 in inside]
        )
    ]  # fmt: skip
    # All at once: adding them one by one takes Plotly a fifth of a second.
    figure.update_layout(
        shapes=[*figure.layout.shapes, *shapes],
        annotations=[*figure.layout.annotations, *names],
    )


def _place_names(spans: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Return the names that have room, each with its middle and font size; see `_NAME_SIZES`.

    Args:
        spans: Name, begin and end in parts of the width. The longest are named first.
    """
    placed: dict[tuple[str, float], float] = {}
    for width_px, size in _NAME_SIZES.items():
        for name, first, last in sorted(spans, key=lambda span: span[1] - span[2]):
            middle, room = (first + last) / 2, _LETTER_PX * len(name) / width_px
            is_free = all(
                abs(middle - other) > (room + _LETTER_PX * (len(word) + 1) / width_px) / 2
                for word, other in placed
            )
            if is_free and last - first >= room / 2:
                placed[name, middle] = size
    return [(name, middle, size) for (name, middle), size in placed.items()]


def _draw_gaps(
    figure: go.Figure, gaps: Sequence[tuple[int, int]], begin: float, end: float
) -> None:
    """Cover the stretches of which nothing but counters is known."""
    for first, last in gaps:
        x0, x1 = max(first / 1e9, begin), min(last / 1e9, end)
        if x0 < x1:
            figure.add_vrect(
                x0=x0, x1=x1, fillcolor="#bfc2c7", opacity=0.55, line_width=0,
                annotation_text="only<br>counted" if x1 - x0 >= _LEAST_SPAN * (end - begin) else "",
                annotation_position="top", annotation_font_size=11,
            )  # fmt: skip


def tabulate(window: Window, begin_ns: int) -> dict[str, np.ndarray]:
    """Return the samples as columns: seconds, total_bytes, and the bytes of each category."""
    order = sorted((k for k, v in window.by_category.items() if v.any()), key=stack_order)
    columns = {"seconds": (window.time_ns - begin_ns) / 1e9, "total_bytes": window.total_bytes}
    return columns | {f"{name}_bytes": window.by_category[name] for name in order}
