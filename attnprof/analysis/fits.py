"""`Fit`: the laws by which one category's bytes grow, per phase, and what they say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import polars as pl

from attnprof.analysis.laws import Law, fit_exponent, fit_pieces
from attnprof.units import format_bytes

TOTAL = "total"
"""In the column ``category``: all live bytes."""
_ROUNDING = 1e-6
_BAD_FIT = 0.05
"""Relative error from which on a fit says that it does not explain the points."""
_SMALL_SHARE = 0.01
"""A constant with less than this share of the bytes at the shortest length is not mentioned."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of law on the way: between two lengths, a phase began to grow differently."""

    phase: str
    below: int
    """The longest length under the old law."""
    above: int
    """The shortest length under the new one."""
    before: Law
    after: Law
    cause: str
    """``"other ops run"``, ``"the peak moved to another instant"``, or empty if not known."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How the bytes of a category grow with the sequence length n.

    Known limitations:
        A phase's peak is a maximum over its instants. Where the maximum moves from one instant to
        another, a law fitted before the move is too low after it; `Growth.predict` therefore
        replays allocations where it can.
    """

    category: str
    """A `Category`, or ``"total"`` for all live bytes."""
    layer: str | None
    """The module path it is restricted to."""
    source: str
    """Where the points come from: ``"measured"``, ``"dry_run"`` or ``"steps"``."""
    pieces: dict[str, tuple[Law, ...]]
    """Per phase its laws, by rising lengths: one, unless the law changes on the way."""
    phase: str
    """The phase that holds most at the longest length."""
    exponent: float | None
    """p of bytes = c0 + a·n^p, of `phase` under its last law; None if it cannot be told."""
    exponent_interval: tuple[float, float] | None
    """Its 95 % confidence interval; None if there are too few lengths to give one."""
    r2: float
    """Share of the variation of the peaks over phases that the laws explain; 1.0 is all."""
    points: pl.DataFrame = field(repr=False)
    """What was fitted: columns seq_len, phase, peak_bytes, fitted_bytes."""
    programs: Mapping[int, int] = field(repr=False)
    """Per length, the number of the program of ops that ran; empty if not known."""

    @property
    def coefficients(self) -> dict[str, tuple[float, float, float]]:
        """Per phase (c0, c1, c2) of c0 + c1·n + c2·n² bytes, at the longest lengths."""
        return {phase: pieces[-1].coefficients for phase, pieces in self.pieces.items()}

    @property
    def law(self) -> str:
        """The last law of `phase` in words, such as ``"quadratic"``; see `Law.words`."""
        return self.pieces[self.phase][-1].words

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every change of law, by phase and rising lengths."""
        return tuple(
            Change(phase, before.last, after.first, before, after, self._explain(before, after))
            for phase, pieces in self.pieces.items()
            for before, after in pairwise(pieces)
        )

    @property
    def change(self) -> Change | None:
        """The last change of law of `phase`, or None."""
        return next((c for c in reversed(self.changes) if c.phase == self.phase), None)

    def _explain(self, before: Law, after: Law) -> str:
        programs = [self.programs.get(n) for n in (before.last, after.first)]
        if None in programs:
            return ""
        return "the peak moved to another instant" if len(set(programs)) == 1 else "other ops run"

    @property
    def max_relative_error(self) -> float:
        """The largest error of a law of `phase` at one of its points, as a share of the point."""
        return max(law.max_relative_error for law in self.pieces[self.phase])

    @property
    def sentence(self) -> str:
        """What the law is, in one sentence."""
        return _write_sentence(self)

    def predict(self, seq_len: int) -> int:
        """Return the most bytes at a length: the maximum over phases."""
        return max(self.predict_phases(seq_len).values())

    def predict_phases(self, seq_len: int) -> dict[str, int]:
        """Return the most bytes in each phase at a length."""
        return {p: round(_law_at(laws, seq_len).at(seq_len)) for p, laws in self.pieces.items()}


def fit_points(
    points: pl.DataFrame,
    seq_lens: Mapping[str, Sequence[int]],
    *,
    category: str,
    layer: str | None = None,
    source: str,
    programs: Mapping[int, int] | None = None,
) -> Fit:
    """Fit laws to the points of one category.

    Args:
        points: Columns seq_len, phase, peak_bytes. Where a row is missing, nothing is held.
        seq_lens: Per phase, the lengths at which it occurs, ascending. Phases that occur at one
            only are left out.
        category: Said in the result.
        layer: Said in the result.
        source: Said in the result.
        programs: Per length, the number of the program of ops that ran, where that is known.

    Raises:
        ValueError: No phase occurs at two lengths.
    """
    longest = max((lengths[-1] for lengths in seq_lens.values()), default=0)
    series = _read_series(points, seq_lens)
    if not series:
        raise ValueError(
            f"cannot fit how {_name(category, layer)} grows: it is known at one length "
            f"({longest}); a law needs at least two lengths, and three to tell n from n²"
        )
    pieces = {
        phase: fit_pieces(list(sizes), list(sizes.values()), programs=programs)
        for phase, sizes in series.items()
    }
    phase = max(series, key=lambda name: series[name].get(longest, -1))
    last = pieces[phase][-1]
    under_last = {n: size for n, size in series[phase].items() if n >= last.first}
    exponent = fit_exponent(list(under_last), list(under_last.values()), last)
    return Fit(
        category=category,
        layer=layer,
        source=source,
        pieces=pieces,
        phase=phase,
        exponent=exponent.value if exponent else None,
        exponent_interval=exponent.interval if exponent else None,
        r2=_find_explained_share(series, pieces),
        points=_list_points(series, pieces),
        programs=programs or {},
    )


def require_law(fit: Fit) -> Fit:
    """Return the fit, if it explains the points it was made of.

    Raises:
        ValueError: It does not, so that it says nothing of other lengths.
    """
    if fit.max_relative_error > _BAD_FIT:
        raise ValueError(
            f"no law explains how {_name(fit.category, fit.layer)} grows (off by up to "
            f"{fit.max_relative_error:.0%}), so where memory runs out cannot be told; sweep more "
            "lengths, closer to it"
        )
    return fit


def _name(category: str, layer: str | None) -> str:
    return category + (f" in {layer}" if layer else "")


def _read_series(
    points: pl.DataFrame, seq_lens: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, int]]:
    """Return per phase its bytes by length; phases without any are left out if others have some."""
    found: dict[str, dict[int, int]] = {}
    for n, phase, size in points.select("seq_len", "phase", "peak_bytes").iter_rows():
        found.setdefault(phase, {})[n] = size
    return {
        phase: {n: found.get(phase, {}).get(n, 0) for n in lengths}
        for phase, lengths in sorted(seq_lens.items())
        if len(lengths) > 1 and (phase in found or not found)
    }


def _law_at(laws: tuple[Law, ...], seq_len: int) -> Law:
    return next((law for law in laws if seq_len <= law.last), laws[-1])


def _find_explained_share(
    series: Mapping[str, Mapping[int, int]], pieces: Mapping[str, tuple[Law, ...]]
) -> float:
    """Return r² of the maximum over phases."""
    found: dict[int, float] = {}
    fitted: dict[int, float] = {}
    for phase, sizes in series.items():
        for n, size in sizes.items():
            found[n] = max(size, found.get(n, 0))
            fitted[n] = max(_law_at(pieces[phase], n).at(n), fitted.get(n, 0.0))
    y, law = np.array(list(found.values())), np.array(list(fitted.values()))
    left, varied = float(((y - law) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    if not varied:  # constant: explained if the law says so too
        return 1.0 if np.allclose(y, law, rtol=_ROUNDING, atol=0.5) else 0.0
    return 1 - left / varied


def _list_points(
    series: Mapping[str, Mapping[int, int]], pieces: Mapping[str, tuple[Law, ...]]
) -> pl.DataFrame:
    rows = [
        (n, phase, size, round(_law_at(pieces[phase], n).at(n)))
        for phase, sizes in series.items()
        for n, size in sizes.items()
    ]
    columns = ("seq_len", "phase", "peak_bytes", "fitted_bytes")
    schema = dict.fromkeys(columns, pl.Int64) | {"phase": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _write_sentence(fit: Fit) -> str:
    law = fit.pieces[fit.phase][-1]
    what = _name(fit.category, fit.layer)
    is_plural = fit.category.endswith("s")
    if law.words == "constant":
        verb = "do" if is_plural else "does"
        text = f"{what} {verb} not grow with n: {format_bytes(round(law.at(law.last)))}"
    else:
        power = "?" if fit.exponent is None else f"{fit.exponent:.2f}"
        if fit.exponent_interval is not None:
            low, high = fit.exponent_interval
            power += f" ({low:.2f}–{high:.2f})"
        verb = "grow" if is_plural else "grows"
        text = f"{what} {verb} as n^{power}: {law.words}; {_write_terms(law)}"
    if (change := fit.change) is not None:
        cause = f", where {change.cause}" if change.cause else ""
        before = f"{change.before.words}, {_write_terms(change.before)}"
        text += (
            f"; the law changes between n = {change.below} and {change.above}{cause} "
            f"(before: {before})"
        )
    if fit.max_relative_error > _BAD_FIT:
        text += f"; no such law explains all lengths (off by up to {fit.max_relative_error:.0%})"
    return text


def _write_terms(law: Law) -> str:
    """Return ``"4 n² bytes above 1.2 MiB"``: the terms that the words name."""
    named = {"linear": (law.linear, "n"), "quadratic": (law.quadratic, "n²")}
    terms = [
        (f"{c:,.0f}" if c >= 100 else f"{c:.3g}") + f" {unit}"
        for word, (c, unit) in named.items()
        if word in law.words
    ]
    if not terms:
        return format_bytes(round(law.at(law.last)))
    text = " + ".join(terms) + " bytes"
    has_floor = law.constant >= _SMALL_SHARE * law.at(law.first)
    return text + (f" above {format_bytes(round(law.constant))}" if has_floor else "")
