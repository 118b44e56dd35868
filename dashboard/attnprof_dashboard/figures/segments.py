"""The allocator's memory: segments with what is in them, and what is reserved over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from attnprof.palette import SERIES, colour_of, stack_order
from attnprof.units import format_bytes
from attnprof_dashboard.figures.theme import FREE, FREE_EDGE, choose_unit, new_figure

MOST_SEGMENTS = 40
"""Rows of the map, the largest first; the table has all."""


def draw_segments(segments: Sequence[Mapping[str, Any]], *, scheme: str) -> go.Figure:
    """Return a row per segment, with its blocks where they lie; pale is free."""
    shown = list(segments[:MOST_SEGMENTS])
    unit, word = choose_unit(max((s["size_bytes"] for s in shown), default=1))
    figure = new_figure(scheme, height=90 + 20 * max(4, len(shown)))
    parts: dict[str, list[tuple[int, int, int]]] = {}
    for row, segment in enumerate(shown):
        at = 0
        for size, name in segment["blocks"]:
            parts.setdefault(name, []).append((row, at, size))
            at += size
    for name in sorted(parts, key=lambda name: (name == "", stack_order(name))):
        rows, offsets, sizes = zip(*parts[name], strict=True)
        figure.add_bar(
            y=rows,
            x=[size / unit for size in sizes],
            base=[offset / unit for offset in offsets],
            orientation="h",
            width=0.78,
            name=name or "free",
            marker=(
                {"color": colour_of(name), "line": {"width": 0}}
                if name
                else {"color": FREE, "line": {"width": 1, "color": FREE_EDGE}}
            ),
            customdata=[format_bytes(size) for size in sizes],
            hovertemplate=f"{name or 'free'}: <b>%{{customdata}}</b><extra></extra>",
        )
    figure.update_yaxes(
        autorange="reversed",
        tickvals=list(range(len(shown))),
        ticktext=[_label(segment) for segment in shown],
        showgrid=False,
        fixedrange=True,
    )
    figure.update_xaxes(ticksuffix=f" {word}", fixedrange=True, nticks=8)
    figure.update_layout(
        barmode="overlay",
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    return figure


def _label(segment: Mapping[str, Any]) -> str:
    words = [format_bytes(segment["size_bytes"])]
    if segment["is_small"]:
        words.append("small")
    if segment["private_pool"]:
        words.append(f"private {segment['private_pool']}")
    return " ".join(words)


def draw_reserved(
    seconds: Sequence[float], levels: Mapping[str, Sequence[int]], *, scheme: str
) -> go.Figure:
    """Return levels over time: what is reserved, allocated and asked for.

    Args:
        seconds: When, since the run began.
        levels: Bytes by name, the highest first.
        scheme: ``"light"`` or ``"dark"``.
    """
    figure = new_figure(scheme, height=320)
    unit, word = choose_unit(max((v for values in levels.values() for v in values), default=1))
    styles: tuple[dict[str, Any], ...] = (
        {"width": 2},
        {"width": 2, "color": SERIES[0]},
        {"width": 1.5, "color": SERIES[1], "dash": "dot"},
    )
    for (name, values), style in zip(levels.items(), styles, strict=False):
        figure.add_scatter(
            x=list(seconds),
            y=[value / unit for value in values],
            name=name,
            mode="lines",
            line={"shape": "hv", **style},
            customdata=[format_bytes(value) for value in values],
            hovertemplate="<b>%{customdata}</b>",
        )
    figure.update_xaxes(ticksuffix=" s", showgrid=False)
    figure.update_yaxes(ticksuffix=f" {word}", rangemode="tozero", fixedrange=True)
    figure.update_layout(
        showlegend=True, hovermode="x unified",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 16, "t": 30, "b": 8},
    )  # fmt: skip
    return figure
