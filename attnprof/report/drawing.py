"""The timeline as a picture: stacked steps in an SVG whose width is time and height is bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

import numpy as np
import polars as pl

from attnprof.palette import stack_order

WIDTH, HEIGHT = 10_000, 1_000
"""Of the SVG's view box: enough that no rounding shows on a wide screen."""

Longs = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A timeline, ready to be put on a page."""

    micros: list[int]
    """Microseconds since the first instant, per instant."""
    names: list[str]
    """Categories, bottom to top."""
    sizes: list[list[int]]
    """Bytes per category and instant."""
    paths: list[str]
    """Per category the outline of all that is stacked up to and with it."""
    top_bytes: int
    """The upper end of the vertical axis."""
    ticks: list[int]
    """Bytes at which the vertical axis is marked."""
    first_ns: int
    """The clock at the first instant."""

    @property
    def span(self) -> int:
        """The horizontal axis in microseconds, at least 1."""
        return max(1, self.micros[-1])

    def place_time(self, time_ns: int) -> float:
        """Return where a time lies on the horizontal axis, from 0 to 1."""
        return min(1.0, max(0.0, (time_ns - self.first_ns) / 1000 / self.span))


def draw_timeline(timeline: pl.DataFrame) -> Drawing | None:
    """Draw `Run.timeline`; None if nothing was ever live."""
    if timeline.is_empty() or not timeline["total_bytes"].max():
        return None
    time_ns: Longs = timeline["time_ns"].to_numpy()
    micros = ((time_ns - time_ns[0]) // 1000).astype(np.int64)
    names = [name for name in timeline.columns if name not in ("time_ns", "total_bytes")]
    names = sorted((n for n in names if timeline[n].max()), key=stack_order)
    sizes = timeline.select(names).to_numpy().T.astype(np.int64)
    ticks = find_ticks(int(timeline["total_bytes"].max()))  # type: ignore[arg-type]  # not empty
    top = ticks[-1]
    x = np.rint(micros / max(1, micros[-1]) * WIDTH).astype(np.int64)
    stacked = np.cumsum(sizes, axis=0)
    y = np.rint((1 - stacked / top) * HEIGHT).astype(np.int64)
    return Drawing(
        micros=micros.tolist(),
        names=names,
        sizes=sizes.tolist(),
        paths=[outline(x, row) for row in y],
        top_bytes=top,
        ticks=ticks,
        first_ns=int(time_ns[0]),
    )


def outline(x: Longs, y: Longs) -> str:
    """Return an SVG path: along the tops in steps, then back along the bottom.

    Memory jumps, so no line slopes. Instants that change nothing visible are left out.
    """
    changes = np.flatnonzero(np.diff(y, prepend=y[0] + 1))
    steps = "".join(f"H{x[i]}V{y[i]}" for i in changes.tolist())
    return f"M0 {HEIGHT}{steps}H{WIDTH}V{HEIGHT}Z"


def find_ticks(largest_bytes: int) -> list[int]:
    """Return round byte counts from 0 to the first one at or above ``largest_bytes``.

    Four to seven of them, round in the unit in which they are read.
    """
    unit = next(u for u in (2**40, 2**30, 2**20, 2**10, 1) if largest_bytes >= u or u == 1)
    raw = largest_bytes / unit / 4
    power = 10.0 ** floor(log10(raw)) if raw else 1.0
    step = next(s for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999) * power
    step_bytes = max(1, round(step * unit))
    count = -(-largest_bytes // step_bytes)
    return [n * step_bytes for n in range(count + 1)]


def find_times(span_micros: int) -> list[tuple[float, str]]:
    """Return where to mark a time axis, from 0 to 1, and with which labels; at most six."""
    factor, unit = next(
        (f, u) for f, u in ((1e6, "s"), (1e3, "ms"), (1, "µs")) if span_micros >= f or f == 1
    )
    span = span_micros / factor
    power = 10.0 ** floor(log10(span / 5))
    step = next(s for s in (1, 2, 5, 10) if s * power >= span / 5) * power
    return [
        (n * step / span, f"{n * step:g} {unit}") for n in range(int(span / step * 1.000001) + 1)
    ]


def place_steps(
    drawing: Drawing, spans: Sequence[tuple[int, int, int]]
) -> list[tuple[int, float, float]]:
    """Return per step its number and where it begins and ends on the axis, from 0 to 1.

    Args:
        drawing: The timeline.
        spans: Per step its number, begin and end in nanoseconds.
    """
    return [
        (number, drawing.place_time(begin), drawing.place_time(end)) for number, begin, end in spans
    ]
