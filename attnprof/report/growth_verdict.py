"""The one sentence about growth: the law, who holds the peak, and where the wall is."""

from attnprof.analysis.fits import TOTAL, Fit
from attnprof.analysis.laws import Law
from attnprof.report.growth_summary import Capacity, GrowthSummary
from attnprof.report.verdict import format_share
from attnprof.report.words import NO_TENSORS
from attnprof.store.lengths import DRY_RUN, MEASURED, STEPS
from attnprof.units import format_bytes

BAD_FIT = 0.05
"""Relative error from which on a law is said not to explain the points."""
_SMALL_SHARE = 0.001
"""Of the longest length's bytes; a smaller constant is not worth naming."""
_SOURCES = {
    MEASURED: "",
    DRY_RUN: "By dry runs, ",
    STEPS: "Over the steps of this run, ",
}


def write_growth_verdict(summary: GrowthSummary) -> str:
    """Return the sentence, as honest as few points or a change of law allow."""
    clauses = [_describe_growth(summary), _describe_holder(summary)]
    clauses += [_describe_wall(capacity) for capacity in summary.capacities]
    return "; ".join(clause for clause in clauses if clause) + "."


def _describe_growth(summary: GrowthSummary) -> str:
    fit = summary.fit
    if fit is None:
        return _describe_ignorance(summary)
    subject = _name_subject(fit)
    law = fit.pieces[fit.phase][-1]
    if law.words == "constant":
        size = format_bytes(round(law.at(law.last)))
        return f"{subject} does not grow with n: it stays at {size}"
    if fit.max_relative_error > BAD_FIT:
        power = "" if fit.exponent is None else f" about as n^{fit.exponent:.2f}"
        off = format_fraction(fit.max_relative_error)
        return f"{subject} grows{power}, and by no law c0 + c1·n + c2·n² (the best is off by {off})"
    text = f"{subject} grows with {_name_power(law)}: {format_law(law)}"
    if fit.change is not None:
        text += f" from n = {fit.change.above:,} on ({fit.change.before.words} before)"
    if fit.points["seq_len"].n_unique() == 2:
        text += ", as far as two lengths can tell"
    return text


def _name_subject(fit: Fit) -> str:
    what = "peak memory" if fit.category == TOTAL else f"the memory of {fit.category}"
    text = _SOURCES[fit.source] + what
    return text[0].upper() + text[1:]


def _describe_ignorance(summary: GrowthSummary) -> str:
    """Say why there is no law."""
    done = [point for point in summary.points if point.is_done and point.sizes]
    if done:
        peak = format_bytes(done[0].held_bytes() or 0)
        return (
            f"Memory is known at one length only, {peak} at n = {done[0].seq_len:,}, so how it "
            "grows cannot be told"
        )
    if not summary.points:
        return "No length was run, so how memory grows is not known"
    if any(point.is_done for point in summary.points):
        return f"Nothing was recorded: {NO_TENSORS}"
    first = summary.points[0]
    ended = first.status.replace("_", " ")
    reason = f" ({first.reason})" if first.reason else ""
    return f"No length was completed: n = {first.seq_len:,} ended {ended}{reason}"


def _name_power(law: Law) -> str:
    """Return ``"n"``, ``"n²"``, or from where on the square outweighs the rest."""
    if "quadratic" not in law.words:
        return "n"
    if law.linear * law.last <= law.quadratic * law.last**2:
        return "n²"
    return f"n, from n = {law.linear / law.quadratic:,.0f} on mostly with n²"


def format_law(law: Law) -> str:
    """Return a law in its own words: ``"12.3 n² + 4,096 n bytes + 1.20 GiB"``."""
    words = law.words
    terms = [
        f"{_format_coefficient(size)} {power}"
        for word, size, power in (("quadratic", law.quadratic, "n²"), ("linear", law.linear, "n"))
        if word in words
    ]
    if not terms:
        return format_bytes(round(law.at(law.last)))
    text = " + ".join(terms) + " bytes"
    if law.constant < _SMALL_SHARE * law.at(law.last):
        return text
    return f"{text} + {format_bytes(round(law.constant))}"


def format_fraction(fraction: float) -> str:
    """Return a fraction in per cent: ``"61 %"``, ``"0.4 %"``, ``"<0.1 %"``."""
    return format_share(round(fraction * 10**9), 10**9)


def _format_coefficient(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_exponent(fit: Fit) -> str:
    """Return ``"n^1.98 (1.95–2.01)"``; the interval if it is known and has a width."""
    interval = format_interval(fit)
    return f"{format_power(fit)} ({interval})" if interval else format_power(fit)


def format_power(fit: Fit) -> str:
    """Return ``"n^1.98"``, or a dash if the exponent cannot be told."""
    return "–" if fit.exponent is None else f"n^{fit.exponent:.2f}"


def format_interval(fit: Fit) -> str:
    """Return the exponent's interval, ``"1.95–2.01"``; nothing if it has no width to be seen."""
    low, high = (f"{bound:.2f}" for bound in fit.exponent_interval or (0.0, 0.0))
    return "" if low == high else f"{low}–{high}"


def _describe_holder(summary: GrowthSummary) -> str:
    """Say which category is most of the peak at the longest length, and in how many layers."""
    sizes: dict[str, int] = {}
    layers: dict[str, int] = {}
    for holder in summary.holders:
        sizes[holder.category] = sizes.get(holder.category, 0) + holder.size_bytes
        in_layers = holder.count if holder.layer else 0
        layers[holder.category] = layers.get(holder.category, 0) + in_layers
    if not summary.largest_bytes or summary.longest is None:
        return ""
    at = f"at n = {summary.longest:,}"
    if summary.focus != TOTAL:
        share = format_share(sizes.get(summary.focus, 0), summary.largest_bytes)
        return f"{at} it is {share} of the peak"
    name = max(sizes, key=lambda category: sizes[category])
    share = format_share(sizes[name], summary.largest_bytes)
    where = f" in {layers[name]} layers" if layers[name] > 1 else ""
    return f"{at}, {share} of it is {name}{where}"


def _describe_wall(capacity: Capacity) -> str:
    wall = capacity.wall
    if wall is None:
        return ""
    if capacity.size_bytes is None:
        ran = f"n = {wall.seq_len:,} fits and " if wall.seq_len else ""
        return f"{ran}n = {wall.next_seq_len:,} ran out of memory"
    if not wall.seq_len:
        return f"no length fits into {capacity.name}"
    word = "at" if capacity.name[0].isdigit() else "on"
    return f"the wall {word} {capacity.name} is n = {wall.seq_len:,}"
