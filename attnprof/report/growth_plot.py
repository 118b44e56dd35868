"""The plot of a growth page, complete without the page's script."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from attnprof.analysis.fits import TOTAL, Fit
from attnprof.palette import colour_of
from attnprof.report.drawing import HEIGHT, WIDTH
from attnprof.report.growth_drawing import (
    LogAxis,
    Picture,
    find_residual_ticks,
    make_length_axis,
    make_size_axis,
)
from attnprof.report.growth_summary import Capacity, GrowthSummary, Point, find_residual
from attnprof.report.growth_text import SOURCE_WORDS, list_sources
from attnprof.report.html_parts import percent
from attnprof.units import format_bytes
from attnprof.vocabulary import Status

_MAX_SERIES = 6
"""Lines in the plot, the total's among them; the tables have all categories."""
_LEAST_SHARE = 0.005
"""Of the peak; what is less at the longest length gets no line."""
_FAR = 64
"""A capacity so many times above all sizes would leave no room for them: it gets no line."""
_LABEL_HEIGHT = 0.06
"""Of the picture: labels of capacities that are nearer stand side by side."""
_RESIDUAL_ROOM = 1.3
"""Height of the residuals' plot, for marks at its outermost ticks not to be cut."""
_THEORY_COLOUR = colour_of("softmax")


@dataclass(frozen=True, slots=True)
class Plot:
    """What is drawn, and between which axes."""

    summary: GrowthSummary
    picture: Picture
    series: tuple[str, ...]
    """``"total"`` and categories."""

    @property
    def first(self) -> int:
        """The shortest length."""
        return min(point.seq_len for point in self.summary.points)


def plan_plot(summary: GrowthSummary) -> Plot | None:
    """Choose lines and axes; None if no length has bytes to show."""
    shown = [point for point in summary.points if point.sizes]
    if not shown:
        return None
    longest = max((p for p in shown if p.is_done), key=lambda p: p.seq_len, default=shown[-1])
    least = _LEAST_SHARE * longest.sizes.get(TOTAL, 0)
    names = summary.fits or longest.sizes
    large = [name for name in names if longest.sizes.get(name, 0) >= least]
    series = tuple(dict.fromkeys((TOTAL, summary.focus, *large)))[:_MAX_SERIES]
    lengths = [point.seq_len for point in summary.points] + [n for n, _ in summary.predicted]
    sizes = [point.sizes.get(name, 0) for point in shown for name in series]
    sizes += [size for _, size in summary.predicted]
    near = _FAR * max(sizes)
    sizes += [c.size_bytes for c in summary.capacities if c.size_bytes and c.size_bytes < near]
    return Plot(summary, Picture(make_length_axis(lengths), make_size_axis(sizes)), series)


def draw_plot(plot: Plot) -> str:
    """Return the chart: lines, marks, capacities and walls between logarithmic axes."""
    picture, summary = plot.picture, plot.summary
    flags = "".join(_flag(capacity, picture) for capacity in summary.capacities)
    label = escape(f"peak memory against sequence length, {len(summary.points)} points", quote=True)
    return (
        f'<div class="chart growth">{flags}{_size_axis(picture.sizes)}'
        f'<div class="plot" tabindex="0" role="img" aria-label="{label}">'
        f"{_grid(picture.lengths, picture.sizes)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(_lines(plot))}</svg>"
        f"{''.join(_capacity_lines(summary.capacities, picture))}{''.join(_marks(plot))}"
        f'<div class="cursor" hidden></div></div>{_length_axis(picture.lengths)}</div>'
    )


def _flag(capacity: Capacity, picture: Picture) -> str:
    """Return the label over a wall, on a line of its own, so that no two overlap."""
    if capacity.wall is None or not capacity.wall.seq_len:
        return ""
    at = picture.lengths.place(capacity.wall.seq_len)
    text = f"wall, {capacity.name}: n = {capacity.wall.seq_len:,}"
    return (
        f'<div class="flag"><span style="left:{percent(at)};'
        f'transform:translateX({percent(-at)})">{escape(text)}</span></div>'
    )


def _size_axis(axis: LogAxis) -> str:
    ticks = "".join(
        f'<span style="top:{percent(1 - at)}">{escape(text)}</span>' for at, text in axis.ticks
    )
    return f'<div class="yaxis">{ticks}</div>'


def _length_axis(axis: LogAxis) -> str:
    ticks = "".join(
        f'<span style="left:{percent(at)}">{escape(text)}</span>' for at, text in axis.ticks
    )
    return f'<div class="axislabel">n</div><div class="xaxis">{ticks}</div>'


def _grid(lengths: LogAxis, sizes: LogAxis | None = None) -> str:
    across = [] if sizes is None else sizes.ticks
    return "".join(
        f'<div class="grid" style="top:{percent(1 - at)}"></div>' for at, _ in across
    ) + "".join(
        f'<div class="upright" style="left:{percent(at)}"></div>' for at, _ in lengths.ticks
    )


def _lines(plot: Plot) -> Iterable[str]:
    """Yield the paths: every law along its points, and beyond them what is predicted."""
    summary, picture = plot.summary, plot.picture
    longest = summary.longest or plot.first
    end = summary.predicted[-1][0] if summary.predicted else longest
    for name in plot.series:
        fit = summary.fits.get(name)
        if fit is None:
            continue
        yield _path(name, "law", picture.trace(fit.predict, plot.first, longest))
        if name != TOTAL:
            yield _path(name, "beyond", picture.trace(fit.predict, longest, end))
    yield _path(TOTAL, "beyond", picture.connect(summary.predicted))
    theory = picture.connect(summary.theory)
    yield f'<path class="theory" style="stroke:{_THEORY_COLOUR}" d="{theory}"/>'


def _path(name: str, kind: str, path: str) -> str:
    stroke = "" if name == TOTAL else f' style="stroke:{colour_of(name)}"'
    return f'<path data-series="{escape(name)}" class="{kind}"{stroke} d="{path}"/>' if path else ""


def _capacity_lines(capacities: Sequence[Capacity], picture: Picture) -> Iterable[str]:
    """Yield a line across for every capacity, and one upright for every wall."""
    labelled: list[float] = []
    for capacity in capacities:
        if capacity.size_bytes is not None and capacity.size_bytes < picture.sizes.high:
            top = 1 - picture.sizes.place(capacity.size_bytes)
            text = escape(f"{capacity.name}: {format_bytes(capacity.size_bytes)}")
            aside = 1 + 45 * sum(abs(top - other) < _LABEL_HEIGHT for other in labelled)
            labelled.append(top)
            yield (
                f'<div class="capacity" style="top:{percent(top)}">'
                f'<span style="left:{aside}%">{text}</span></div>'
            )
        if capacity.wall is not None and capacity.wall.seq_len:
            left = percent(picture.lengths.place(capacity.wall.seq_len))
            yield f'<div class="wall" style="left:{left}"></div>'


def _marks(plot: Plot) -> Iterable[str]:
    for name in reversed(plot.series):
        colour = "" if name == TOTAL else f"--c:{colour_of(name)};"
        for point in plot.summary.points:
            place = _place_point(plot, point, name)
            if place is None:
                continue
            kind = point.source if point.is_done else "failed"
            size = point.sizes.get(name)
            held = "unknown" if size is None else format_bytes(size)
            ended = "" if point.is_done else f", {point.status.replace('_', ' ')}"
            word = SOURCE_WORDS[point.source]
            title = escape(f"{name}, n = {point.seq_len:,}, {word}{ended}: {held}", quote=True)
            yield (
                f'<i data-series="{escape(name)}" class="mark {kind}" title="{title}" '
                f'style="{colour}left:{percent(place[0])};top:{percent(place[1])}"></i>'
            )


def _place_point(plot: Plot, point: Point, name: str) -> tuple[float, float] | None:
    """Return where a point is drawn; a length without memory where it would have been."""
    if point.is_done:
        return plot.picture.place(point.seq_len, point.sizes.get(name, 0))
    fit = plot.summary.fits.get(TOTAL)
    if name != TOTAL or point.status != Status.OUT_OF_MEMORY:
        return None
    reached = point.held_bytes() or 0
    size = max(reached, fit.predict(point.seq_len)) if fit is not None else reached
    axis = plot.picture.sizes
    return plot.picture.place(point.seq_len, min(max(size, axis.low), axis.high))


def draw_residuals(plot: Plot, fit: Fit) -> str:
    """Return the chart of how far points are from the law of the total, in per cent."""
    found = [
        (point, 100 * residual)
        for point in plot.summary.points
        if (residual := find_residual(fit, point)) is not None
    ]
    ticks = find_residual_ticks([value for _, value in found])
    reach = _RESIDUAL_ROOM * ticks[-1]
    marks = "".join(
        f'<i class="mark {point.source}" title="n = {point.seq_len:,}: {value:+.3f} %" '
        f'style="left:{percent(plot.picture.lengths.place(point.seq_len))};'
        f'top:{percent((1 - value / reach) / 2)}"></i>'
        for point, value in found
    )
    labels = "".join(
        f'<span style="top:{percent((1 - tick / reach) / 2)}">{tick:+g} %</span>'
        if tick
        else '<span style="top:50%">0</span>'
        for tick in ticks
    )
    return (
        f'<div class="chart residuals"><div class="yaxis">{labels}</div>'
        f'<div class="plot">{_grid(plot.picture.lengths)}'
        f'<div class="grid" style="top:50%"></div>{marks}</div>'
        f"{_length_axis(plot.picture.lengths)}</div>"
    )


def draw_key(plot: Plot) -> str:
    """Return what marks and lines mean."""
    summary = plot.summary
    entries = [(f"mark {source}", SOURCE_WORDS[source]) for source in list_sources(summary)]
    if any(point.status == Status.OUT_OF_MEMORY for point in summary.points):
        entries.append(("mark failed", "out of memory"))
    if summary.fits:
        entries += [("line law", "law"), ("line beyond", "predicted")]
    if summary.theory:
        entries.append(("line theory", "theory: softmax results kept for backward"))
    items = "".join(f'<li><i class="{kind}"></i>{escape(text)}</li>' for kind, text in entries)
    return f'<ul class="key">{items}</ul>'


def describe_plot(plot: Plot | None) -> object:
    """Return what the script needs to read values off the plot."""
    if plot is None:
        return None
    summary = plot.summary
    return {
        "low": plot.picture.lengths.low,
        "high": plot.picture.lengths.high,
        "series": plot.series,
        "points": [
            {
                "n": point.seq_len,
                "source": SOURCE_WORDS[point.source],
                "done": point.is_done,
                "status": point.status.replace("_", " "),
                "sizes": [point.sizes.get(name) for name in plot.series],
            }
            for point in summary.points
        ],
        "laws": [_describe_laws(summary.fits.get(name)) for name in plot.series],
        "predicted": summary.predicted,
    }


def _describe_laws(fit: Fit | None) -> list[list[tuple[float, ...]]]:
    """Return per phase its laws: the longest length of each, and its coefficients."""
    if fit is None:
        return []
    return [[(law.last, *law.coefficients) for law in laws] for laws in fit.pieces.values()]
