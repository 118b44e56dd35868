"""Growth: measured, dry, predicted and theory on logarithmic axes; residuals; laws of layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log10
from typing import Any

import plotly.graph_objects as go

from attnprof.analysis.fits import TOTAL
from attnprof.palette import colour_of
from attnprof.report.growth_drawing import LogAxis, make_length_axis, make_size_axis
from attnprof.report.growth_text import SOURCE_WORDS
from attnprof.units import format_bytes
from attnprof_dashboard.figures.theme import new_figure

MOST_CATEGORIES = 5
"""Lines beside the total's; the table has all."""
_SYMBOLS = {"measured": "circle", "dry_run": "diamond-open", "steps": "square"}
_ESTIMATE = "#a8649f"
_LAW_POINTS = 60
_MOST_SMALL_TICKS = 4
"""Marks beside a small picture: there is no room for more."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a step has to fit into, and the longest sequence that does."""

    name: str
    size_bytes: int
    wall: int | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The same program at another scale."""

    name: str
    points: Sequence[tuple[int, int]] = field(default_factory=tuple)
    wall: int | None = None


def draw_growth(
    values: Mapping[str, Any], limit: Limit | None, estimate: Estimate | None, *, scheme: str
) -> go.Figure:
    """Return the figure.

    Args:
        values: What `attnprof_dashboard.data.outlook` derived.
        limit: The capacity to draw.
        estimate: The line of another scale.
        scheme: ``"light"`` or ``"dark"``.
    """
    figure = new_figure(scheme, height=520)
    done = [point for point in values["points"] if point["peak_bytes"]]
    shown = find_categories(done)
    for source in _SYMBOLS:
        own = [p for p in done if p["source"] == source and p["status"] == "completed"]
        # Lines of one category share an entry: the first source's.
        _draw_points(figure, own, source, shown, has_legend=not figure.data)
    _draw_failed(figure, values["points"], values["outlook"])
    longest = values["longest"] or max((p["seq_len"] for p in done), default=1)
    beyond = [(r["seq_len"], r["peak_bytes"]) for r in values["outlook"] if r["seq_len"] >= longest]
    _draw_line(figure, beyond, "predicted", dash="dash")
    theory = [(row["seq_len"], row["size_bytes"]) for row in values["theory_saved_softmax"]]
    _draw_line(figure, theory, "theory: softmax kept", dash="dot", colour=colour_of("softmax"))
    if estimate is not None:
        _draw_line(figure, estimate.points, estimate.name, dash="dashdot", colour=_ESTIMATE)
    for change in next((f["changes"] for f in values["fits"] if f["category"] == TOTAL), []):
        figure.add_vrect(
            x0=change["below"], x1=change["above"], fillcolor="#8c8f7b", opacity=0.2, line_width=0,
        )  # fmt: skip
        figure.add_annotation(
            x=log10(change["below"]), xanchor="left", yref="paper", y=0.98, yanchor="top",
            text=f"{change['phase']}: other law", showarrow=False, font={"size": 11},
        )  # fmt: skip
    sizes = [p["peak_bytes"] for p in done] + [size for _, size in beyond] or [1]
    lengths = [p["seq_len"] for p in values["points"]] + [n for n, _ in beyond] or [1]
    if limit is not None:
        sizes.append(limit.size_bytes)
        _draw_limit(figure, limit, estimate)
    smallest = [size for p in done for size in p["by_category"].values() if size]
    _set_axes(figure, make_length_axis(lengths), make_size_axis([*sizes, *smallest]))
    figure.update_layout(
        hovermode="closest",
        showlegend=True,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 24, "t": 32, "b": 8},
    )
    return figure


def find_categories(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the categories that are most at the longest length."""
    if not points:
        return []
    longest = max(points, key=lambda p: p["seq_len"])["by_category"]
    return sorted(longest, key=lambda name: (-longest[name], name))[:MOST_CATEGORIES]


def _draw_points(
    figure: go.Figure,
    points: Sequence[Mapping[str, Any]],
    source: str,
    shown: Sequence[str],
    *,
    has_legend: bool,
) -> None:
    if not points:
        return
    word = SOURCE_WORDS[source]
    lengths = [p["seq_len"] for p in points]
    for name in (*reversed(shown), TOTAL):
        sizes = [p["peak_bytes"] if name == TOTAL else p["by_category"].get(name) for p in points]
        is_total = name == TOTAL
        colour = {} if is_total else {"color": colour_of(name)}
        figure.add_scatter(
            x=lengths,
            y=sizes,
            name=f"{name}, {word}" if is_total else name,
            mode="lines+markers",
            line={"width": 2 if is_total else 1.2, **colour},
            marker={"size": 9 if is_total else 6, "symbol": _SYMBOLS[source], **colour},
            legendgroup=name,
            showlegend=is_total or has_legend,
            customdata=[format_bytes(size) if size else "–" for size in sizes],
            hovertemplate=f"{name}, {word}<br>n = %{{x:,}}: <b>%{{customdata}}</b><extra></extra>",
        )


def _draw_failed(
    figure: go.Figure, points: Sequence[Mapping[str, Any]], outlook: Sequence[Mapping[str, Any]]
) -> None:
    """Draw the lengths that ran out of memory where they would have been."""
    predicted = {row["seq_len"]: row["peak_bytes"] for row in outlook}
    over = [p for p in points if p["status"] == "out_of_memory"]
    sizes = []
    for point in over:
        near = min(predicted, key=lambda n: abs(n - point["seq_len"]), default=None)
        sizes.append(predicted[near] if near is not None else point["peak_bytes"] or 1)
    if over:
        figure.add_scatter(
            x=[p["seq_len"] for p in over],
            y=sizes,
            name="out of memory",
            mode="markers",
            marker={"size": 11, "symbol": "x"},
            hovertemplate="n = %{x:,}: out of memory<extra></extra>",
        )


def _draw_line(
    figure: go.Figure,
    points: Sequence[tuple[int, int]],
    name: str,
    *,
    dash: str,
    colour: str | None = None,
) -> None:
    if not points:
        return
    figure.add_scatter(
        x=[n for n, _ in points],
        y=[size for _, size in points],
        name=name,
        mode="lines",
        line={"width": 1.5, "dash": dash, **({"color": colour} if colour else {})},
        customdata=[format_bytes(size) for _, size in points],
        hovertemplate=f"{name}<br>n = %{{x:,}}: <b>%{{customdata}}</b><extra></extra>",
    )


def _draw_limit(figure: go.Figure, limit: Limit, estimate: Estimate | None) -> None:
    """Draw a capacity and its walls. Annotations on a logarithmic axis stand at logarithms."""
    figure.add_hline(y=limit.size_bytes, line_width=1.2, line_dash="dash")
    figure.add_annotation(
        xref="paper", x=0, xanchor="left", y=log10(limit.size_bytes), yanchor="bottom",
        text=f"{limit.name}: {format_bytes(limit.size_bytes)}", showarrow=False,
    )  # fmt: skip
    walls = [(limit.wall, "solid", 1.0, f"wall: n = {limit.wall:,}" if limit.wall else "")]
    if estimate is not None and estimate.wall:
        walls.append((estimate.wall, "dashdot", 0.0, f"about n = {estimate.wall:,}"))
    for wall, dash, at, text in walls:
        if wall:
            figure.add_vline(x=wall, line_width=1.2, line_dash=dash)
            figure.add_annotation(
                x=log10(wall), xanchor="right", yref="paper", y=at, yanchor="bottom",
                text=text, showarrow=False,
            )  # fmt: skip


def _set_axes(figure: go.Figure, lengths: LogAxis, sizes: LogAxis) -> None:
    for axis, update in ((lengths, figure.update_xaxes), (sizes, figure.update_yaxes)):
        update(
            type="log",
            range=[log10(axis.low), log10(axis.high)],
            tickvals=[axis.at(place) for place, _ in axis.ticks],
            ticktext=[label for _, label in axis.ticks],
        )
    figure.update_xaxes(title_text="sequence length n, tokens")


def draw_residuals(points: Sequence[Mapping[str, Any]], *, scheme: str) -> go.Figure:
    """Return how far every point is from the law, in per cent."""
    figure = new_figure(scheme, height=260)
    found = [p for p in points if p["residual"] is not None]
    for source, symbol in _SYMBOLS.items():
        own = [p for p in found if p["source"] == source]
        if own:
            figure.add_scatter(
                x=[p["seq_len"] for p in own],
                y=[100 * p["residual"] for p in own],
                mode="markers",
                name=SOURCE_WORDS[source],
                marker={"size": 9, "symbol": symbol},
                hovertemplate="n = %{x:,}: <b>%{y:+.4f} %</b><extra></extra>",
            )
    axis = make_length_axis([p["seq_len"] for p in found] or [1])
    _set_axes(figure, axis, make_size_axis([1]))
    most = max((abs(100 * p["residual"]) for p in found), default=0.0)
    reach = max(0.1, 1.3 * most)
    figure.update_yaxes(
        type="linear", range=[-reach, reach], tickvals=None, ticktext=None, tickmode="auto",
        nticks=5, ticksuffix=" %", zeroline=True, zerolinewidth=1,
    )  # fmt: skip
    figure.update_layout(
        showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    return figure


def draw_law(law: Mapping[str, Any], points: Sequence[int], *, scheme: str) -> go.Figure:
    """Return one layer's law, small.

    Args:
        law: A row of the growth's ``layers``.
        points: The lengths that were run.
        scheme: ``"light"`` or ``"dark"``.
    """
    figure = new_figure(scheme, height=130)
    low, high = min(points), max(points)
    ratio = high / low or 1.0
    lengths = [low * ratio ** (i / _LAW_POINTS) for i in range(_LAW_POINTS + 1)]
    sizes = [max(evaluate(law["coefficients"], n), 1.0) for n in lengths]
    figure.add_scatter(
        x=lengths,
        y=sizes,
        mode="lines",
        line={"color": colour_of(law["category"]), "width": 2},
        customdata=[format_bytes(round(size)) for size in sizes],
        hovertemplate="n = %{x:,.0f}: <b>%{customdata}</b><extra></extra>",
    )
    figure.update_layout(margin={"l": 8, "r": 8, "t": 6, "b": 8})
    axis = make_size_axis(sizes)
    ticks = axis.ticks[:: -(-len(axis.ticks) // _MOST_SMALL_TICKS) or 1]
    _set_axes(figure, make_length_axis([low, high]), replace(axis, ticks=ticks))
    figure.update_xaxes(title_text=None, nticks=3)
    return figure


def evaluate(coefficients: Mapping[str, Sequence[float]], seq_len: float) -> float:
    """Return the bytes of laws c0 + c1·n + c2·n² per phase at a length: the most of any phase."""
    return max(c0 + c1 * seq_len + c2 * seq_len**2 for c0, c1, c2 in coefficients.values())
