"""Layers: what each of them holds of which category, and when it holds most."""

from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go

from attnprof.palette import SERIES, stack_order
from attnprof.report.words import OUTSIDE
from attnprof.units import format_bytes
from attnprof_dashboard.figures.theme import choose_unit, new_figure

MOST_LAYERS = 40
"""Rows of a picture; tables have all."""
_ROW_HEIGHT = 22
_LABEL_LENGTH = 34


def shorten(layer: str) -> str:
    """Return a name for a figure: of a long path the end, which tells layers apart.

    Figures take text for markup, links among it, and names come from the program that was traced.
    """
    name = layer or OUTSIDE
    text = name if len(name) <= _LABEL_LENGTH else f"…{name[1 - _LABEL_LENGTH :]}"
    return escape(text, quote=False)  # it would show a quote's entity as it stands


def draw_heatmap(held: Mapping[tuple[str, str], int], *, scheme: str) -> go.Figure:
    """Return layers by categories, the more bytes the hotter.

    Args:
        held: Bytes per layer and category.
        scheme: ``"light"`` or ``"dark"``.
    """
    layers = find_largest(held)
    categories = sorted({name for _, name in held}, key=stack_order)
    sizes = [[held.get((layer, name), 0) for name in categories] for layer in layers]
    unit, word = choose_unit(max((max(row) for row in sizes), default=1))
    figure = new_figure(scheme, height=90 + _ROW_HEIGHT * max(4, len(layers)))
    figure.add_heatmap(
        z=[[size / unit for size in row] for row in sizes],
        x=categories,
        y=list(range(len(layers))),
        customdata=[[format_bytes(size) for size in row] for row in sizes],
        text=[[layer] * len(categories) for layer in map(shorten, layers)],
        hovertemplate="%{text}<br>%{x}<br><b>%{customdata}</b><extra></extra>",
        colorbar={"ticksuffix": f" {word}", "thickness": 12, "outlinewidth": 0},
        xgap=2,
        ygap=2,
        zmin=0,
        zmax=max((max(row) for row in sizes), default=1) / unit,
        autocolorscale=True,  # the template's, which follows light and dark
    )
    _label_layers(figure, layers)
    figure.update_xaxes(side="top", tickangle=-35, showgrid=False, fixedrange=True)
    figure.update_layout(hovermode="closest", margin={"l": 8, "r": 8, "t": 8, "b": 8})
    return figure


def find_largest(held: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the layers that hold most, at most `MOST_LAYERS`, in the order of the model."""
    sums: dict[str, int] = {}
    for (layer, _), size in held.items():
        sums[layer] = sums.get(layer, 0) + size
    chosen = set(sorted(sums, key=lambda layer: (-sums[layer], layer))[:MOST_LAYERS])
    return sorted(chosen, key=natural_key)


def natural_key(layer: str) -> tuple[tuple[int, int | str], ...]:
    """Return a key that sorts ``h.2`` before ``h.10``."""
    parts = layer.split(".")
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts)


def _label_layers(figure: go.Figure, layers: Sequence[str]) -> None:
    figure.update_yaxes(
        autorange="reversed",
        tickvals=list(range(len(layers))),
        ticktext=[shorten(layer) for layer in layers],
        showgrid=False,
        zeroline=False,
        fixedrange=True,
    )


def draw_own_peaks(own: Mapping[str, int], at_peak: Mapping[str, int], *, scheme: str) -> go.Figure:
    """Return per layer the most it ever holds beside what it holds at the peak of all.

    Args:
        own: The most bytes of each layer, at whatever instant.
        at_peak: Its bytes at the peak of the device.
        scheme: ``"light"`` or ``"dark"``.
    """
    layers = sorted(own, key=lambda layer: (-own[layer], layer))[:MOST_LAYERS]
    layers.sort(key=natural_key)
    unit, word = choose_unit(max((own[layer] for layer in layers), default=1))
    figure = new_figure(scheme, height=70 + _ROW_HEIGHT * max(4, len(layers)))
    rows = list(range(len(layers)))
    for name, sizes, colour, width in (
        ("its own peak", own, "rgba(133, 136, 143, 0.4)", 0.72),
        ("at the peak of all", at_peak, SERIES[0], 0.34),
    ):
        figure.add_bar(
            x=[sizes.get(layer, 0) / unit for layer in layers],
            y=rows,
            orientation="h",
            width=width,
            name=name,
            marker={"color": colour},
            customdata=[[shorten(layer), format_bytes(sizes.get(layer, 0))] for layer in layers],
            hovertemplate=f"%{{customdata[0]}}<br>{name}: <b>%{{customdata[1]}}</b><extra></extra>",
        )
    _label_layers(figure, layers)
    figure.update_xaxes(ticksuffix=f" {word}", rangemode="tozero", fixedrange=True)
    figure.update_layout(
        barmode="overlay",
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 16, "t": 30, "b": 8},
    )
    return figure
