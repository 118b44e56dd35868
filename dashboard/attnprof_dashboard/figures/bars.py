"""Bars and lines that several pages draw."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from attnprof.palette import LESS, MORE, SERIES, colour_of
from attnprof.units import format_bytes
from attnprof_dashboard.figures.layers import shorten
from attnprof_dashboard.figures.theme import FREE_EDGE, choose_unit, new_figure

_LEGEND = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}


def draw_lines(
    x: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    *,
    scheme: str,
    title: str,
    is_stacked: bool = False,
    height: int = 320,
    unit: str = "bytes",
    colours: Mapping[str, str] | None = None,
    edged: str = "",
) -> go.Figure:
    """Return series over whole numbers, such as steps.

    Args:
        x: The numbers.
        series: Values by name; None where there is none.
        scheme: ``"light"`` or ``"dark"``.
        title: What the numbers are.
        is_stacked: Draw areas on top of each other.
        height: In pixels.
        unit: ``"bytes"``, or what is counted.
        colours: By series; without, one each.
        edged: The area that has an edge, being too pale to be seen without.
    """
    figure = new_figure(scheme, height=height)
    places, series = _close(x, series) if is_stacked else (list(x), series)
    is_size = unit == "bytes"
    largest = max((v for values in series.values() for v in values if v), default=1)
    factor, word = choose_unit(round(largest)) if is_size else (1, unit)
    for number, (name, values) in enumerate(series.items()):
        colour = (colours or {}).get(name, SERIES[number % len(SERIES)])
        shown = [
            format_bytes(round(v)) if is_size else f"{v:,.4g}" for v in (v or 0 for v in values)
        ]
        area = {"stackgroup": "all", "fillcolor": colour} if is_stacked else {}
        figure.add_scatter(
            x=places,
            y=[None if v is None else v / factor for v in values],
            name=shorten(name),
            mode="lines" if len(x) > 60 or is_stacked else "lines+markers",
            line={"color": FREE_EDGE if name == edged else colour,
                  "shape": "hvh" if is_stacked else "linear",
                  "width": 2 if not is_stacked else 1 if name == edged else 0},
            marker={"color": colour},
            customdata=shown,
            hovertemplate="<b>%{customdata}</b>",
            **area,
        )  # fmt: skip
    ticks = {"dtick": 1, "tick0": 0} if x and x[-1] - x[0] <= 12 else {}
    figure.update_xaxes(title_text=title, showgrid=False, tickformat=",d", **ticks)
    figure.update_yaxes(rangemode="tozero", ticksuffix=f" {word}")
    figure.update_layout(
        showlegend=True, legend=_LEGEND, hovermode="x unified",
        margin={"l": 8, "r": 16, "t": 30, "b": 8},
    )  # fmt: skip
    return figure


def _close(
    x: Sequence[int], series: Mapping[str, Sequence[float | None]]
) -> tuple[list[float], dict[str, list[float | None]]]:
    """Put an edge before the first number and after the last: each is then a column around itself.

    Without, a stack over one number has no width, and the last of several is not drawn.
    """
    if not x:
        return [], {name: list(values) for name, values in series.items()}
    # A hair less than half: what a pointer says of an edge is rounded to its own number.
    edges = [x[0] - 0.499, *x, x[-1] + 0.499]
    return edges, {n: [values[0], *values, values[-1]] for n, values in series.items()}


def draw_bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[int]],
    *,
    scheme: str,
    colours: Mapping[str, str] | None = None,
    unit: str = "",
) -> go.Figure:
    """Return horizontal bars side by side.

    Args:
        names: What every group of bars is about.
        series: Bytes by name.
        scheme: ``"light"`` or ``"dark"``.
        colours: By series; without, one each.
        unit: Appended to the unit, such as ``" per token"``.
    """
    height = 70 + max(4, len(names)) * (18 * len(series) + 8)
    figure = new_figure(scheme, height=height)
    factor, word = choose_unit(max((v for values in series.values() for v in values), default=1))
    rows = list(range(len(names)))
    for number, (name, values) in enumerate(series.items()):
        hover = f"%{{customdata[0]}}<br>{shorten(name)}: <b>%{{customdata[1]}}</b><extra></extra>"
        figure.add_bar(
            x=[value / factor for value in values],
            y=rows,
            orientation="h",
            name=shorten(name),
            marker={"color": (colours or {}).get(name, SERIES[number % len(SERIES)])},
            customdata=[
                [shorten(row), format_bytes(round(value))]
                for row, value in zip(names, values, strict=True)
            ],
            hovertemplate=hover,
        )
    figure.update_yaxes(
        autorange="reversed", tickvals=rows, ticktext=[shorten(name) for name in names],
        showgrid=False, fixedrange=True,
    )  # fmt: skip
    figure.update_xaxes(ticksuffix=f" {word}{unit}", rangemode="tozero", fixedrange=True, nticks=6)
    figure.update_layout(
        barmode="group", showlegend=len(series) > 1, legend=_LEGEND,
        margin={"l": 8, "r": 16, "t": 30, "b": 8},
    )  # fmt: skip
    return figure


def draw_categories(sizes: Mapping[str, int], *, scheme: str) -> go.Figure:
    """Return a bar per category in its colour."""
    figure = draw_bars(list(sizes), {"bytes": list(sizes.values())}, scheme=scheme)
    figure.update_traces(marker={"color": [colour_of(name) for name in sizes]})
    return figure


def draw_waterfall(
    first: tuple[str, int],
    changes: Sequence[tuple[str, int]],
    second: tuple[str, int],
    *,
    scheme: str,
) -> go.Figure:
    """Return how one total becomes another.

    Args:
        first: Name and bytes of the first total.
        changes: Name and difference of every part; they sum to the difference of the totals.
        second: Name and bytes of the second total.
        scheme: ``"light"`` or ``"dark"``.
    """
    names = [first[0], *(name for name, _ in changes), second[0]]
    sizes = [first[1], *(size for _, size in changes), second[1]]
    figure = new_figure(scheme, height=90 + 26 * len(names))
    factor, word = choose_unit(max(first[1], second[1]))
    rows = list(range(len(names)))
    differences = [_signed(size) for _, size in changes]
    texts = [format_bytes(first[1]), *differences, format_bytes(second[1])]
    figure.add_waterfall(
        y=rows,
        x=[size / factor for size in sizes],
        orientation="h",
        measure=["absolute", *["relative"] * len(changes), "total"],
        textposition="none",
        customdata=[[shorten(n), text] for n, text in zip(names, texts, strict=True)],
        hovertemplate="%{customdata[0]}: <b>%{customdata[1]}</b><extra></extra>",
        increasing={"marker": {"color": MORE}},
        decreasing={"marker": {"color": LESS}},
        totals={"marker": {"color": "#8a8f98"}},
        connector={"line": {"color": "#8a8f98", "width": 1}},
    )  # fmt: skip
    figure.update_yaxes(
        autorange="reversed", tickvals=rows, ticktext=[shorten(name) for name in names],
        showgrid=False, fixedrange=True,
    )  # fmt: skip
    reach = max(first[1], second[1], *_running(first[1], changes)) / factor
    figure.update_xaxes(ticksuffix=f" {word}", range=[0, 1.02 * reach], fixedrange=True, nticks=6)
    # In a column of their own: beside the bars they would run into names and out of the picture.
    figure.update_layout(
        margin={"l": 8, "r": 92, "t": 8, "b": 8},
        annotations=[
            {"x": 1, "xref": "paper", "xanchor": "left", "xshift": 8, "y": row, "yref": "y",
             "text": text, "showarrow": False}
            for row, text in zip(rows, texts, strict=True)
        ],
    )  # fmt: skip
    return figure


def _running(begin: int, changes: Sequence[tuple[str, int]]) -> list[int]:
    found = [begin]
    for _, size in changes:
        found.append(found[-1] + size)
    return found


def _signed(size_bytes: int) -> str:
    return f"+{format_bytes(size_bytes)}" if size_bytes > 0 else format_bytes(size_bytes)
