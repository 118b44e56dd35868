"""Judge how a test's memory grows with the sequence length by what its markers allow; pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from attnprof.analysis.fits import TOTAL, Fit
from attnprof.analysis.laws import Exponent, Law, fit_exponent
from attnprof.analysis.peak import choose_device, find_peak
from attnprof.growth import Growth
from attnprof.pytest_plugin.held import describe_instant, describe_phase, list_blocks
from attnprof.pytest_plugin.marks import GROWTH, GrowthLaw
from attnprof.pytest_plugin.verdicts import Breach
from attnprof.report.growth_verdict import format_fraction, format_law
from attnprof.run import Run
from attnprof.units import format_bytes

_POWERS = {"constant": 0, "linear": 1, "quadratic": 2}
"""Of the terms that `Law.words` names."""
_EXPONENT_NOISE = 0.05
"""By how much an exponent may exceed a named law's: rounding of blocks bends a line a little."""
_BAD_FIT = 0.01
"""Relative error from which on it is said that a law misses its points."""


@dataclass(frozen=True, slots=True)
class PhaseLaw:
    """How the bytes of one phase grow, at the longest lengths."""

    phase: str
    law: Law
    exponent: Exponent | None
    """None if it cannot be told."""
    sizes: dict[int, int]
    """Bytes by length: all that were run."""
    changed_from: str
    """The law before, in words; empty if one law holds for all lengths."""

    @property
    def _is_beyond_laws(self) -> bool:
        """Whether it grows faster than any law does, whose powers end with the square.

        That shows in the exponent alone. A parabola with a negative term, such as the pairs of n
        tokens, is bent as strongly at short lengths: but it goes through its points, or where these
        are too few, 2 is within the interval.
        """
        if self.exponent is None or self.law.max_relative_error <= _BAD_FIT:
            return False
        least = self.exponent.interval[0] if self.exponent.interval else self.exponent.value
        return self.exponent.value > 2 + _EXPONENT_NOISE and least > 2

    def breaks(self, allowed: GrowthLaw) -> bool:
        """Return whether bytes grow faster than is allowed."""
        power = max(_POWERS[word] for word in self.law.words.split(" + "))
        if allowed.at_most is None:
            assert allowed.exponent is not None
            found = power if self.exponent is None else round(self.exponent.value, 2)
            return found > allowed.exponent
        return power > _POWERS[allowed.at_most] or self._is_beyond_laws

    def list_sizes(self) -> Iterator[str]:
        """Yield a line per length with its bytes."""
        for seq_len, size in self.sizes.items():
            yield f"{format_bytes(size):>12}  at seq_len {seq_len:,}"

    def describe_power(self) -> str:
        """Return the exponent and its interval."""
        if self.exponent is None:
            return "(these lengths do not tell by what power of n)"
        return f"as n^{self.exponent.value:.2f} ({self._describe_interval()})"

    def _describe_interval(self) -> str:
        if self.exponent is None or self.exponent.interval is None:
            return "four lengths would give an interval" if len(self.sizes) < 4 else "no interval"
        low, high = self.exponent.interval
        return f"95 %: {low:.2f}–{high:.2f}"

    def describe_law(self) -> str:
        """Return the law in words and in numbers, and how far to trust it."""
        miss = f"misses by up to {format_fraction(self.law.max_relative_error)}"
        if self._is_beyond_laws:
            return f"faster than quadratic; the closest law, {format_law(self.law)}, {miss}"
        text = f"{self.law.words}, {format_law(self.law)}"
        if self.changed_from:
            text += f", from n = {self.law.first:,} on ({self.changed_from} before)"
        if self.law.max_relative_error > _BAD_FIT:
            text += f"; the law {miss}"
        return text


def find_phase_laws(fit: Fit) -> list[PhaseLaw]:
    """Return the law of every phase, that with most bytes at its longest length first."""
    found = []
    for phase, pieces in fit.pieces.items():
        points = fit.points.filter(phase=phase).sort("seq_len")
        sizes = dict(points.select("seq_len", "peak_bytes").iter_rows())
        law = pieces[-1]
        under = {n: size for n, size in sizes.items() if n >= law.first}
        exponent = fit_exponent(list(under), list(under.values()), law)
        before = pieces[-2].words if len(pieces) > 1 else ""
        found.append(PhaseLaw(phase, law, exponent, sizes, before))
    return sorted(found, key=lambda p: -p.sizes[max(p.sizes)])


def judge_growth(growth: Growth, longest: Run, laws: Sequence[GrowthLaw]) -> Iterator[Breach]:
    """Yield a breach for every law by which the bytes of any phase grow faster than is allowed.

    Every phase counts, not only that with most bytes at the lengths that were run: what is
    quadratic in one that is small now holds the peak of longer sequences. The total breaks a law
    where a category does: that the peak moves from one instant to another bends its points too.

    Args:
        growth: Of the runs of all lengths.
        longest: The run of the longest.
        laws: What is allowed.
    """
    for allowed in laws:
        for law in find_phase_laws(growth.fit(allowed.category)):
            guilty = _find_guilty(growth, allowed, law.phase) if law.breaks(allowed) else []
            if guilty:
                yield Breach(
                    GROWTH,
                    f"{allowed.category} grows {law.describe_power()} {describe_phase(law.phase)}, "
                    f"limit {allowed}: it is {law.describe_law()}",
                    (*law.list_sizes(), *_list_holders(longest, law, guilty)),
                    None,
                )
                break


def describe_laws(growth: Growth, laws: Sequence[GrowthLaw]) -> dict[str, str]:
    """Return by category the law of the phase that holds most, for tables and files."""
    found = {}
    for allowed in laws:
        law = find_phase_laws(growth.fit(allowed.category))[0]
        exponent = law.exponent
        found[allowed.category] = law.law.words if exponent is None else f"n^{exponent.value:.2f}"
    return found


def _find_guilty(growth: Growth, allowed: GrowthLaw, phase: str) -> list[str]:
    """Return the categories whose bytes of a phase grow faster than is allowed."""
    if allowed.category != TOTAL:
        return [allowed.category]
    categories = growth.points.filter(pl.col("category") != TOTAL)["category"].unique().sort()
    return [
        category
        for category in categories
        for law in find_phase_laws(growth.fit(category))
        if law.phase == phase and law.breaks(allowed)
    ]


def _list_holders(longest: Run, law: PhaseLaw, categories: Sequence[str]) -> Iterator[str]:
    """Yield who holds the bytes of categories, when the phase held most at the longest length."""
    allocations = longest.attribution.allocations
    own = allocations.filter(pl.col("category").cast(pl.String).is_in(categories))
    is_made_there = (own["phase"].cast(pl.String) == law.phase).any()
    device = choose_device(allocations, None)
    peak = find_peak(own, device=device, phase=law.phase if is_made_there else None)
    yield f"what grows so, {describe_instant(peak)}, at seq_len {max(law.sizes):,}:"
    yield from list_blocks(peak.allocations)
