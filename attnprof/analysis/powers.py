"""Power laws below a line: bytes = c0 + a·n^p with p under 1, such as √n.

No sum of a constant, n and n² is near one: its constant takes up what grows slowly, and what is
left above it looks like a line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Floats = np.ndarray

_FLATTEST, _STEEPEST = 0.02, 1.0
"""Exponents that are looked for."""
_HALVINGS = 40
_ROUNDING = 1e-9
"""Errors below this say nothing: bytes are whole numbers."""


@dataclass(frozen=True, slots=True)
class Power:
    """bytes = constant + factor·n^exponent."""

    constant: float
    factor: float
    exponent: float
    interval: tuple[float, float]
    """What the exponent may be by these points: its confidence interval."""
    max_relative_error: float
    """The largest difference from a point, as a share of it."""


def fit_power(seq_lens: Sequence[int], sizes: Sequence[int], *, confidence: float) -> Power | None:
    """Fit a power law below a line, by least squares of the relative errors.

    Args:
        seq_lens: Different lengths, ascending.
        sizes: Bytes at each.
        confidence: Of the exponent's interval: the exponents whose best law is not much worse.

    Returns:
        None where there are no more points than numbers to fit, or bytes are not positive.
    """
    n, y = np.array(seq_lens, np.float64), np.array(sizes, np.float64)
    if len(n) < 4 or y.min() <= 0:
        return None
    from scipy.optimize import minimize_scalar  # half a second, and not everyone fits
    from scipy.special import stdtrit  # Student's t; scipy.stats takes a second to import

    def find_error(p: float) -> float:
        return _solve(n, y, p)[1]

    options = {"bounds": (_FLATTEST, _STEEPEST), "method": "bounded", "options": {"xatol": 1e-7}}
    p = float(minimize_scalar(find_error, **options).x)
    (constant, factor), error = _solve(n, y, p)
    if factor <= 0:
        return None
    freedom = len(n) - 3  # the constant counts as fitted, also where it came out as none
    reach = float(stdtrit(freedom, (1 + confidence) / 2))
    limit = max(error, _ROUNDING) * math.sqrt(1 + reach**2 / freedom)
    return Power(
        constant=constant,
        factor=factor,
        exponent=p,
        interval=(
            _find_end(find_error, limit, p, _FLATTEST),
            _find_end(find_error, limit, p, _STEEPEST),
        ),
        max_relative_error=float(np.abs((constant + factor * n**p - y) / y).max()),
    )


def _solve(n: Floats, y: Floats, p: float) -> tuple[tuple[float, float], float]:
    """Return the best (constant, factor) ≥ 0 for an exponent, and the norm of their errors."""
    from scipy.optimize import nnls  # as above

    scaled = (n / n[-1]) ** p
    (constant, factor), error = nnls(
        np.stack([np.ones_like(n), scaled], axis=1) / y[:, None], np.ones_like(n)
    )
    return (float(constant), float(factor / n[-1] ** p)), float(error)


def _find_end(
    find_error: Callable[[float], float], limit: float, inside: float, to: float
) -> float:
    """Return the exponent nearest to ``to`` up to which laws keep within an error."""
    if find_error(to) <= limit:
        return to
    for _ in range(_HALVINGS):
        middle = (inside + to) / 2
        inside, to = (middle, to) if find_error(middle) <= limit else (inside, middle)
    return inside
