"""How figures look, in light and dark. Colours of categories are attnprof's palette."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from attnprof.units import format_bytes
from attnprof.vocabulary import Phase

FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', "
    "'DejaVu Sans', sans-serif"
)
_INK = {"light": "#16181d", "dark": "#e7e9ed"}
_MUTED = {"light": "#5b626e", "dark": "#9aa2ae"}
_LINE = {"light": "#e2e3e7", "dark": "#2b3038"}
_CARD = {"light": "#ffffff", "dark": "#171a20"}
_SCALES = {
    "light": ["#ffffff", "#fde3cf", "#f7a35c", "#d6131b", "#6f0a12"],
    "dark": ["#171a20", "#4a2a1f", "#a04a1c", "#e5860b", "#ffe2a8"],
}
"""From nothing to most; nothing is the card's own colour."""

PHASE_COLOURS: dict[str, str] = {
    Phase.FORWARD.value: "#7f97b2",
    Phase.BACKWARD.value: "#4d5d70",
    Phase.RECOMPUTE.value: "#a7865b",
    Phase.OPTIMIZER.value: "#7b8f5c",
    Phase.PREFILL.value: "#7f97b2",
    Phase.DECODE.value: "#9d8aa8",
    Phase.OUTSIDE.value: "#bfc2c7",
}
"""Muted, so that they are not mistaken for categories; the name stands on or under each."""

FREE = "rgba(140, 143, 123, 0.22)"
FREE_EDGE = "#8c8f7b"
"""What nobody holds is pale, so that it stands back, with an edge that shows on either card."""

CONFIG: dict[str, Any] = {
    "displayModeBar": False,
    "displaylogo": False,
    "showSendToCloud": False,
    "responsive": True,
    "showTips": False,
    "doubleClick": "reset",
}
"""For every graph. Plotly's own button bar would upload figures to its cloud."""


def make_template(scheme: str) -> dict[str, Any]:
    """Return Plotly's template for ``"light"`` or ``"dark"`` as plain values.

    A figure takes all that differs between the two from here, so that a browser can change over
    without asking for the figure again.
    """
    ink, muted, line, card = (c[scheme] for c in (_INK, _MUTED, _LINE, _CARD))
    scale = _SCALES[scheme]
    steps = [[i / (len(scale) - 1), colour] for i, colour in enumerate(scale)]
    axis = {
        "gridcolor": line,
        "linecolor": line,
        "zerolinecolor": line,
        "tickcolor": line,
        "tickfont": {"color": muted, "size": 12},
        "title": {"font": {"color": muted, "size": 12}},
        "automargin": True,
        "ticklabelstandoff": 5,
        "exponentformat": "none",  # "200μ s" is no way to write a time
    }
    layout = {
        "font": {"family": FONT, "size": 13, "color": ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorscale": {"sequential": steps},
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {
            "bgcolor": card,
            "bordercolor": line,
            "font": {"color": ink, "size": 12, "family": FONT},
            "align": "left",
        },
        "legend": {"font": {"color": ink, "size": 12}},
        "annotationdefaults": {"font": {"color": ink, "size": 12}},
        "shapedefaults": {"line": {"color": ink}},
        "margin": {"l": 8, "r": 16, "t": 28, "b": 8},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": muted, "activecolor": ink},
    }
    # Lines and marks without a colour of their own are drawn in ink.
    data = {"scatter": [{"line": {"color": ink}, "marker": {"color": ink}}]}
    return {"layout": layout, "data": data}


TEMPLATES: dict[str, dict[str, Any]] = {s: make_template(s) for s in ("light", "dark")}


def new_figure(scheme: str, *, height: int) -> go.Figure:
    """Return an empty figure.

    Args:
        scheme: ``"light"`` or ``"dark"``.
        height: In pixels; the width is that of the card.
    """
    template = TEMPLATES["dark" if scheme == "dark" else "light"]
    return go.Figure(layout={"template": template, "height": height, "showlegend": False})


def choose_unit(largest_bytes: int) -> tuple[int, str]:
    """Return the binary unit in which sizes up to the largest are read: bytes in it, its name."""
    units = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next((unit for unit in units if largest_bytes >= unit[0]), (1, "B"))


def spell_sizes(sizes: np.ndarray) -> list[str]:
    """Return each size in bytes as text, for what a pointer shows; equal ones are written once."""
    distinct, places = np.unique(sizes, return_inverse=True)
    words = [format_bytes(size) for size in distinct.tolist()]
    return [words[place] for place in places.tolist()]
