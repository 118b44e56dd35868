"""Laws of growth: c0 + c1·n + c2·n² bytes, and their exponent.

None of the three is negative, so that a law fitted to noise or to a mixture of laws stays sensible
at other lengths; except where a law with a negative term goes through every point.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attnprof.analysis.powers import Power, fit_power

Floats = np.ndarray

CONFIDENCE = 0.95
"""Of the exponent's interval."""
_NEGLIGIBLE_GROWTH = 1e-3
"""What grows by less than this share of its bytes is called constant."""
_DUST = 1e-9
"""A term with less than this share of the bytes at the longest length is a rounding error, and a
law that is off by no more goes through the points."""
_SMALL_SHARE = 0.01
"""A term with less than this share of the growth is not named in words."""
_BREAK_ABOVE = 0.01
"""Relative error from which on one law is not believed to hold everywhere."""
_BREAK_BELOW = 0.003
"""Relative error that two laws in its place have to keep to."""
_CLOSE = 1e-4
"""Relative error up to which a law is the law, and no other is looked for."""
_ROUNDING = 1e-12
"""Squared relative errors per point that are no more than this apart are the same."""
_TIMES_CLOSER, _TIMES_CLOSER_IF_BAD = 10, 3
"""How much closer to the points another law must be, to be believed in its place."""


@dataclass(frozen=True, slots=True)
class Law:
    """Bytes as a function of the sequence length n: ``constant + linear·n + quadratic·n²``."""

    constant: float
    """c0, in bytes."""
    linear: float
    """c1, in bytes per token."""
    quadratic: float
    """c2, in bytes per token squared."""
    first: int
    """The shortest length it was fitted to."""
    last: int
    """The longest length it was fitted to."""
    max_relative_error: float
    """The largest difference from a point it was fitted to, as a share of that point."""

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """(c0, c1, c2)."""
        return self.constant, self.linear, self.quadratic

    @property
    def words(self) -> str:
        """``"constant"``, ``"linear"``, ``"quadratic"`` or ``"linear + quadratic"``.

        Terms that matter to the growth at the longest length are named; a constant below them is
        not. The law of a single length is ``"unknown"``.
        """
        if self.first == self.last:
            return "unknown"
        linear, quadratic = self.linear * self.last, self.quadratic * self.last**2
        growth = linear + quadratic
        if growth <= _NEGLIGIBLE_GROWTH * (self.constant + growth):
            return "constant"
        terms = (("linear", linear), ("quadratic", quadratic))
        return " + ".join(word for word, size in terms if size >= _SMALL_SHARE * growth)

    def at(self, seq_len: float) -> float:
        """Return the bytes at a length."""
        return max(self.constant + (self.linear + self.quadratic * seq_len) * seq_len, 0.0)


def fit_law(seq_lens: Sequence[int], sizes: Sequence[int]) -> Law:
    """Fit one law to bytes at lengths, by non-negative least squares of the relative errors.

    Lengths span decades, so that absolute errors would only ever hear the longest. Two lengths
    cannot tell three terms apart: the law is then a line, or if bytes grow faster than n, linear
    and quadratic without a constant. One is taken for a constant.

    A term is negative only in a law that goes through more points than it has terms: the tokens
    of a cache but the newest are a line that begins below zero, and no mixture with n².

    Args:
        seq_lens: Different lengths, ascending.
        sizes: Bytes at each.
    """
    n, y = np.array(seq_lens, np.float64), np.array(sizes, np.float64)
    terms = [0, 1, 2][: len(n)]
    if len(n) == 2:
        terms = [1, 2] if y[1] * n[0] > y[0] * n[1] else [0, 1]
    found = _solve(n, y, terms)
    error = _find_error(n, y, found)
    if error > _DUST:
        exact = _solve_exactly(n, y)
        if exact is not None:
            found, error = exact, _find_error(n, y, exact)
    c0, c1, c2 = found.tolist()
    return Law(c0, c1, c2, int(seq_lens[0]), int(seq_lens[-1]), error)


def _find_error(n: Floats, y: Floats, coefficients: Floats) -> float:
    """Return the largest relative error of a law."""
    c0, c1, c2 = coefficients
    return float(np.max(np.abs(c0 + (c1 + c2 * n) * n - y) / _scale_of(y)))


def _solve_exactly(n: Floats, y: Floats) -> Floats | None:
    """Return (c0, c1, c2) of the line or parabola through all points, if they say there is one.

    Its highest term is positive, and it has fewer terms than there are points: any two lie on a
    line, and any three on a parabola.
    """
    scale = n[-1]
    for degree in (1, 2):
        if len(n) < degree + 2:
            return None
        powers = np.stack([(n / scale) ** term for term in range(degree + 1)], axis=1)
        solution = np.linalg.lstsq(powers, y, rcond=None)[0]
        found = np.zeros(3)
        found[: degree + 1] = solution / scale ** np.arange(degree + 1)
        if found[degree] > 0 and _find_error(n, y, found) <= _DUST:
            return found
    return None


def _solve(n: Floats, y: Floats, terms: Sequence[int] = (0, 1, 2)) -> Floats:
    """Return (c0, c1, c2) ≥ 0 that fit best, using some of the terms."""
    scale = n[-1]
    weight = 1 / _scale_of(y)
    powers = np.stack([(n / scale) ** term for term in terms], axis=1)  # (points, terms)
    from scipy.optimize import nnls  # half a second, and not everyone who imports this fits

    solution, _ = nnls(powers * weight[:, None], y * weight)
    solution[solution < _DUST * solution.sum()] = 0
    result = np.zeros(3)
    for term, value in zip(terms, solution, strict=True):
        result[term] = value / scale**term
    return result


def _scale_of(y: Floats) -> Floats:
    """Return what an error is compared with: the bytes themselves, where they are not zero."""
    positive = y[y > 0]
    return np.where(y > 0, y, positive.min() if len(positive) else 1.0)


def fit_pieces(
    seq_lens: Sequence[int], sizes: Sequence[int], *, programs: Mapping[int, int] | None = None
) -> tuple[Law, ...]:
    """Fit one law, or several one after the other where one would be wrong.

    The law is taken to change between two lengths if one law is off by more than 1 % somewhere,
    and either other ops are known to run from there on, or one law on either side keeps within
    0.3 %, with more points on each than it has terms: any two points lie on some line.

    Args:
        seq_lens: At least two different lengths, ascending.
        sizes: Bytes at each.
        programs: Per length, the number of the program of ops that ran, where that is known.

    Returns:
        Laws by rising lengths; they cover all points.
    """
    whole = fit_law(seq_lens, sizes)
    count = len(seq_lens)
    if count < 4 or whole.max_relative_error <= _BREAK_ABOVE:
        return (whole,)
    changes = _find_changes([(programs or {}).get(n) for n in seq_lens])
    places = changes or _list_best_splits(seq_lens, sizes)
    at = min(places, key=lambda place: _find_split_error(seq_lens, sizes, place))
    pieces = tuple(
        piece
        for part in (slice(None, at), slice(at, None))
        for piece in fit_pieces(seq_lens[part], sizes[part], programs=programs)
    )
    is_believable = bool(changes) or all(_explains_more(piece, seq_lens) for piece in pieces)
    return pieces if is_believable else (whole,)


def _find_changes(programs: Sequence[int | None]) -> list[int]:
    """Return from which points on other ops are known to run.

    A program that loops over tokens runs other ops at every length, which says nothing: a change
    counts only if what it leads to ran at two lengths or more.
    """
    seen = Counter(programs)
    ends = range(1, len(programs) - 1)
    return [i for i in ends if programs[i - 1] != programs[i] and seen[programs[i]] > 1]


def _list_best_splits(seq_lens: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Return the places with two points or more on either side where two laws fit best.

    Those that rounding cannot tell apart: mostly one.
    """
    n, y = np.array(seq_lens, np.float64), np.array(sizes, np.float64)
    before, behind = _list_errors(n, y), _list_errors(n[::-1], y[::-1])[::-1]
    errors = before[1:-2] + behind[2:-1]
    return (np.flatnonzero(errors <= errors.min() + _ROUNDING * len(n)) + 2).tolist()


def _list_errors(n: Floats, y: Floats) -> Floats:
    """Return the sums of squared relative errors of laws fitted to the first 1, 2, … points.

    A fit to each beginning would look at all of its points. Orthogonal transformations leave all
    errors as they are, and keep four rows in place of the points so far; of those without bytes,
    whose errors are compared with the fewest bytes so far, four more.
    """
    from scipy.optimize import nnls

    longest = np.maximum.accumulate(n) / n.max()
    least = np.minimum.accumulate(np.where(y > 0, y, np.inf))
    least[np.isinf(least)] = 1
    points = np.stack([np.ones_like(n), n / n.max(), (n / n.max()) ** 2, y], axis=1)
    points[y > 0] /= y[y > 0, None]
    held, empty = np.zeros((4, 4)), np.zeros((4, 4))
    errors = np.zeros(len(n))
    for i, point in enumerate(points):
        if y[i] > 0:
            _, held = np.linalg.qr(np.vstack([held, point]))
        else:
            _, empty = np.linalg.qr(np.vstack([empty, point]))
        rows = np.vstack([held, empty / least[i]]) if empty.any() else held.copy()
        rows[:, :3] /= longest[i] ** np.arange(3)
        solution, _ = nnls(rows[:, :3], rows[:, 3])
        solution[solution < _DUST * solution.sum()] = 0
        off = rows[:, :3] @ solution - rows[:, 3]
        errors[i] = off @ off
    return errors


def _find_split_error(seq_lens: Sequence[int], sizes: Sequence[int], at: int) -> float:
    """Return the sum of squared relative errors of two laws that meet before point ``at``."""
    total = 0.0
    for part in (slice(None, at), slice(at, None)):
        n, y = np.array(seq_lens[part], np.float64), np.array(sizes[part], np.float64)
        found = _solve(n, y)
        relative = (found[0] + (found[1] + found[2] * n) * n - y) / _scale_of(y)
        total += float(relative @ relative)
    return total


def _explains_more(piece: Law, seq_lens: Sequence[int]) -> bool:
    """Return whether a law explains more points than it has terms."""
    points = sum(piece.first <= n <= piece.last for n in seq_lens)
    terms = sum(c != 0 for c in piece.coefficients)
    return points > terms and piece.max_relative_error <= _BREAK_BELOW


@dataclass(frozen=True, slots=True)
class Exponent:
    """The exponent p of bytes = c0 + a·n^p."""

    value: float
    interval: tuple[float, float] | None
    """Its 95 % confidence interval; None if there are too few points to give one."""


def fit_exponent(seq_lens: Sequence[int], sizes: Sequence[int], law: Law) -> Exponent | None:
    """Return how fast bytes grow above their constant part: 1 for linear, 2 for quadratic.

    The slope of log(bytes − c0) against log n, with c0 from the law: a plain log-log slope of a
    total is far under 2 as long as parameters outweigh everything, however quadratic the rest.
    Points count by their share of growth, since the others say more about c0 than about p. The
    interval is the regression's, from Student's t; the constant counts as estimated. Where bytes
    grow more slowly than n, constant and exponent are found together instead.

    Args:
        seq_lens: The lengths the law was fitted to.
        sizes: Bytes at each.
        law: Their law.

    Returns:
        None if there are no two points with growth.
    """
    n, y = np.array(seq_lens, np.float64), np.array(sizes, np.float64)
    if law.words == "constant":
        return Exponent(0.0, (0.0, 0.0) if len(n) > 2 else None)
    power = _fit_power_below(law, seq_lens, sizes)
    if power is not None:
        return Exponent(power.exponent, power.interval)
    constant = law.constant if len(n) > 2 else 0.0  # two points cannot tell a constant
    kept = y - constant > _NEGLIGIBLE_GROWTH * y
    if kept.sum() < 2:
        return None
    growth, x = (y - constant)[kept], np.log(n[kept])
    weight = (growth / y[kept]) ** 2
    z = np.log(growth)
    x_mean, z_mean = np.average(x, weights=weight), np.average(z, weights=weight)
    spread = float(weight @ (x - x_mean) ** 2)
    slope = float(weight @ ((x - x_mean) * (z - z_mean))) / spread
    freedom = len(x) - 2 - (constant != 0)
    if freedom < 1:
        return Exponent(slope, None)
    residual = z - z_mean - slope * (x - x_mean)
    error = float(np.sqrt(weight @ residual**2 / freedom / spread))
    from scipy.special import stdtrit  # Student's t; scipy.stats takes a second to import

    reach = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return Exponent(slope, (slope - reach, slope + reach))


def _fit_power_below(law: Law, seq_lens: Sequence[int], sizes: Sequence[int]) -> Power | None:
    """Return the power law under 1 by which bytes grow, if it explains them far better."""
    if law.quadratic or law.max_relative_error <= _CLOSE:
        return None
    power = fit_power(seq_lens, sizes, confidence=CONFIDENCE)
    times = _TIMES_CLOSER if law.max_relative_error <= _BREAK_ABOVE else _TIMES_CLOSER_IF_BAD
    if power is None or times * power.max_relative_error > law.max_relative_error:
        return None
    return power
