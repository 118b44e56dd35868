"""Power laws below a line: bytes = c0 + a·n^p with p under 1, such as √n.

No sum of a constant, n and n² is near one: its constant takes up what grows slowly, and what is
left above it looks like a line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Floats = np.ndarray

_FLATTEST, _STEEPEST = 0.02, 1.0
"""Exponents that are looked for."""


@dataclass(frozen=True, slots=True)
class Power:
    """bytes = constant + factor·n^exponent."""

    constant: float
    factor: float
    exponent: float
    deviation: float
    """The standard error of the exponent."""
    freedom: int
    """How many points there are more than numbers that were fitted."""
    max_relative_error: float
    """The largest difference from a point, as a share of it."""


def fit_power(seq_lens: Sequence[int], sizes: Sequence[int]) -> Power | None:
    """Fit a power law below a line, by least squares of the relative errors.

    Args:
        seq_lens: Different lengths, ascending.
        sizes: Bytes at each.

    Returns:
        None where there are no more points than numbers to fit, or bytes are not positive.
    """
    n, y = np.array(seq_lens, np.float64), np.array(sizes, np.float64)
    if len(n) < 4 or y.min() <= 0:
        return None
    from scipy.optimize import minimize_scalar, nnls  # half a second, and not everyone fits

    scaled = n / n[-1]

    def solve(p: float) -> tuple[Floats, float]:
        terms = np.stack([np.ones_like(n), scaled**p], axis=1) / y[:, None]
        solution, error = nnls(terms, np.ones_like(n))
        return solution, float(error)

    found = minimize_scalar(
        lambda p: solve(p)[1], bounds=(_FLATTEST, _STEEPEST), method="bounded",
        options={"xatol": 1e-7},
    )  # fmt: skip
    p = float(found.x)
    (constant, factor), _ = solve(p)
    if factor <= 0:
        return None
    grown = factor * scaled**p
    residual = (constant + grown - y) / y
    # The constant counts as fitted, also where it came out as none: it might have been some.
    slopes = np.stack([grown / y, grown * np.log(scaled) / y, 1 / y], axis=1)
    freedom = len(n) - slopes.shape[1]
    spread = np.linalg.pinv(slopes.T @ slopes)[1, 1]
    return Power(
        constant=float(constant),
        factor=float(factor / n[-1] ** p),
        exponent=p,
        deviation=float(np.sqrt(residual @ residual / freedom * spread)),
        freedom=freedom,
        max_relative_error=float(np.abs(residual).max()),
    )
