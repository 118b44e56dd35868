"""Growth as a picture: logarithmic axes, and lines in an SVG that is stretched to the page."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import floor, log2

from attnprof.report.drawing import HEIGHT, WIDTH
from attnprof.units import format_bytes, format_length

_CURVE_POINTS = 160
"""Straight pieces of a curve: too short to be told from it on a wide screen."""
_DECADES_SHOWN = 2.0**22
"""Sizes under the largest one by more than this factor are left below the picture."""
_ROUND_FACTORS = (1, 2, 4, 5, 10, 20)
"""Powers of two between two marks of an axis."""


@dataclass(frozen=True, slots=True)
class LogAxis:
    """A logarithmic axis."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    """Where to mark the axis, from 0 to 1, and with which labels."""

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end, outside beyond them."""
        return log2(value / self.low) / log2(self.high / self.low)

    def at(self, place: float) -> float:
        """Return the value at a place."""
        return self.low * 2 ** (place * log2(self.high / self.low))


def make_length_axis(seq_lens: Iterable[float]) -> LogAxis:
    """Return a horizontal axis that shows all lengths, with some room on either side."""
    lengths = list(seq_lens)
    return _make_axis(min(lengths) / 1.25, max(lengths) * 1.25, 8, format_length)


def make_size_axis(sizes: Iterable[float]) -> LogAxis:
    """Return a vertical axis for bytes that shows the largest, and the others if they are near."""
    positive = [size for size in sizes if size > 0] or [1.0]
    high = max(positive) * 1.6
    low = max(min(positive) / 1.6, high / _DECADES_SHOWN, 0.5)
    return _make_axis(low, high, 7, format_bytes)


def _make_axis(low: float, high: float, most: int, label: Callable[[int], str]) -> LogAxis:
    """Return an axis with at most ``most`` marks, at powers of two."""
    first, last = floor(log2(low)) + 1, floor(log2(high))
    step = next((s for s in _ROUND_FACTORS if (last - first) // s < most), _ROUND_FACTORS[-1])
    powers = [p for p in range(max(first, 0), last + 1) if p % step == 0]
    span = log2(high / low)
    return LogAxis(low, high, [((p - log2(low)) / span, label(2**p)) for p in powers])


@dataclass(frozen=True, slots=True)
class Picture:
    """Two axes, and what is drawn between them."""

    lengths: LogAxis
    sizes: LogAxis

    def place(self, seq_len: float, size_bytes: float) -> tuple[float, float] | None:
        """Return a point's place from the left and from the top, or None if it is not shown."""
        if size_bytes < self.sizes.low or size_bytes > self.sizes.high:
            return None
        return self.lengths.place(seq_len), 1 - self.sizes.place(size_bytes)

    def trace(self, size_at: Callable[[int], float], first: float, last: float) -> str:
        """Return an SVG path along a law between two lengths.

        What lies above or below the picture is left out.
        """
        begin, end = self.lengths.place(first), self.lengths.place(last)
        count = max(2, round(_CURVE_POINTS * (end - begin)))
        lengths = [self.lengths.at(begin + (end - begin) * i / count) for i in range(count + 1)]
        return self.connect([(n, size_at(round(n))) for n in lengths])

    def connect(self, points: Sequence[tuple[float, float]]) -> str:
        """Return an SVG path through points; it is broken where one is not shown."""
        path, is_drawing = "", False
        for n, size in points:
            place = self.place(n, size)
            if place is not None:
                x, y = round(place[0] * WIDTH), round(place[1] * HEIGHT, 1)
                path += f"{'L' if is_drawing else 'M'}{x} {y:g}"
            is_drawing = place is not None
        return path


def find_residual_ticks(residuals: Sequence[float]) -> list[float]:
    """Return three marks, symmetric around 0, that enclose residuals in per cent."""
    largest = max((abs(r) for r in residuals), default=0.0)
    reach = 0.1
    factors = (2.0, 2.5, 2.0)  # 0.1, 0.2, 0.5, 1, 2, 5, …
    step = 0
    while reach < largest:
        reach *= factors[step % 3]
        step += 1
    return [-reach, 0.0, reach]
