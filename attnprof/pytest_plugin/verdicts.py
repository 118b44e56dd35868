"""Judge the runs of a test by what its markers ask for, and say what is wrong; pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from attnprof.pytest_plugin.marks import (
    BUDGET,
    GROWTH,
    KV_PER_TOKEN,
    LEAKED,
    NO_SCORES,
    PEAK,
    RESERVED,
    SAVED_SOFTMAX,
    Budget,
    Checks,
    GrowthLaw,
)
from attnprof.units import format_bytes

if TYPE_CHECKING:
    import polars as pl

    from attnprof.analysis.fits import Fit
    from attnprof.run import Run

_GROWTH_SHARE = 0.02
"""A power of n with less than this share of what grows is taken for noise (padding, say)."""
_EXPONENT_NOISE = 0.05
_MOST_LINES = 5


@dataclass(frozen=True, slots=True)
class Breach:
    """One limit that a test broke."""

    what: str
    """One line: what was limited, the limit, what was measured, the excess."""
    holders: tuple[str, ...] = field(default=())
    """A line for each of the largest that hold it."""


def find_breaches(
    runs: Sequence["Run"], by_length: Sequence["Run"], checks: Checks
) -> list[tuple[str, Breach]]:
    """Return every limit that a test's runs break, each with the marker that sets it.

    Args:
        runs: The runs of the test's body; several with a growth law.
        by_length: The runs to fit the law to.
        checks: What the markers ask for.
    """
    found: list[tuple[str, Breach]] = []
    for run in runs:
        if checks.budget is not None:
            found += [(BUDGET, breach) for breach in judge_budget(run, checks.budget)]
        if checks.forbids_scores:
            found += [(NO_SCORES, breach) for breach in judge_scores(run)]
        if found:
            break  # longer sequences break the same limits, only further
    if checks.growth is not None:
        from attnprof.growth import Growth

        fit = Growth.from_runs(by_length).fit(checks.growth.category, checks.growth.layer)
        found += [(GROWTH, breach) for breach in judge_growth(fit, checks.growth)]
    return found


def format_breaches(breaches: Sequence[tuple[str, Breach]], kept: Path | None) -> str:
    """Return what a failed test prints.

    Args:
        breaches: The broken limits, each with the marker that sets it.
        kept: Where the run was kept, if it was.
    """
    lines = []
    for marker, breach in breaches:
        lines.append(f"{marker}: {breach.what}")
        lines += [f"    {line}" for line in breach.holders]
    how = f"attnprof report {kept}" if kept else "run it again with --attnprof-html DIR"
    lines.append(f"To see every byte: {how}")
    return "\n".join(lines)


def judge_budget(run: "Run", budget: Budget) -> Iterator[Breach]:
    """Yield every limit of a budget that a run breaks, each with who holds the bytes."""
    for name, limit in budget.limits.items():
        measured = _measure(run, name)
        if measured is None:
            yield Breach(
                f"{name} is limited to {format_bytes(limit)}, but is not known: the test held "
                "nothing on a CUDA device"
            )
        elif measured > limit:
            yield Breach(_describe(name, limit, measured), tuple(_list_holders(run, name)))
    for name, limit in budget.per_layer.items():
        largest = _measure_layers(run, name)
        over = [(layer, size) for layer, size in largest.items() if size > limit]
        if over:
            layer, size = over[0]
            lines = (f"{format_bytes(size):>12}  {layer or '(no module)'}" for layer, size in over)
            yield Breach(
                _describe(f"{name} in {layer or 'no module'}", limit, size),
                tuple(_shorten(list(lines))),
            )


def measure_all(run: "Run") -> dict[str, int]:
    """Return what is kept of a run for summaries and baselines, in bytes, by name of the limit."""
    values = {PEAK: run.peak().total_bytes, **_category_peaks(run)}
    values[SAVED_SOFTMAX] = _measure(run, SAVED_SOFTMAX) or 0
    values[LEAKED] = _measure(run, LEAKED) or 0
    return dict(sorted(values.items()))


def judge_scores(run: "Run") -> Iterator[Breach]:
    """Yield a breach if any layer makes scores, with the reason for each."""
    layers = run.layers()
    made = layers.filter(layers["kind"] == "materialised")
    if len(made):
        lines = [
            f"{format_bytes(row['scores_peak_bytes']):>12}  {row['layer'] or '(no module)'}: "
            f"{row['q_len']} × {row['k_len']} scores in {row['heads']} heads; "
            f"{row['backend_reason']}"
            for row in made.iter_rows(named=True)
        ]
        count = f"{len(made)} attention layer" + ("s make" if len(made) > 1 else " makes")
        yield Breach(f"{count} a score matrix, and the test allows none", tuple(_shorten(lines)))


def judge_growth(fit: "Fit", law: GrowthLaw) -> Iterator[Breach]:
    """Yield a breach if bytes grow faster than a law allows."""
    worst = _find_fastest(fit, law)
    if worst is None:
        return
    phase, why = worst
    what = fit.category if law.layer is None else f"{fit.category} of {law.layer}"
    points = fit.points.filter(fit.points["phase"] == phase).sort("seq_len")
    lines = [
        f"n = {row['seq_len']:>8}: {format_bytes(row['peak_bytes'])}"
        for row in points.iter_rows(named=True)
    ]
    yield Breach(f"{what} may grow as {law.name} at most, but in {phase} {why}", tuple(lines))


def _find_fastest(fit: "Fit", law: GrowthLaw) -> tuple[str, str] | None:
    """Return the phase that breaks a law and what it does instead; None if none does."""
    lengths = law.seq_lens
    longest = max(lengths)
    if law.name.startswith("n^"):
        if fit.exponent is None or fit.exponent <= law.most_exponent:
            return None
        return fit.phase, _describe_exponent(fit)
    for phase, (_, c1, c2) in fit.coefficients.items():
        linear, quadratic = c1 * longest, c2 * longest**2
        allowed = {0.0: 0.0, 1.0: linear}.get(law.most_exponent, linear + quadratic)
        whole = linear + quadratic
        if whole and whole - allowed > _GROWTH_SHARE * whole:
            return phase, f"it grows by {_describe_terms(c1, c2)}"
    if fit.exponent is not None and fit.exponent > law.most_exponent + 1 + _EXPONENT_NOISE:
        return fit.phase, _describe_exponent(fit)
    return None


def _describe_exponent(fit: "Fit") -> str:
    interval = fit.exponent_interval
    spread = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
    return f"it grows as n^{fit.exponent:.2f}{spread}"


def _describe_terms(c1: float, c2: float) -> str:
    terms = [f"{c2:,.6g} n²"] if c2 else []
    terms += [f"{c1:,.6g} n"] if c1 else []
    return " + ".join(terms) + " bytes"


def _describe(name: str, limit: int, measured: int) -> str:
    excess = measured - limit
    share = f", {100 * excess / limit:.0f} %" if limit else ""
    return (
        f"{name} is limited to {format_bytes(limit)}, but was {format_bytes(measured)}: "
        f"{format_bytes(excess)}{share} too much"
    )


def _measure(run: "Run", name: str) -> int | None:
    """Return what a limit is compared with; None if the run cannot know it."""
    if name == PEAK:
        return run.peak().total_bytes
    if name == RESERVED:
        reserved = run.steps["reserved_bytes"].max()
        return reserved if isinstance(reserved, int) else None
    if name == LEAKED:
        return int(_find_leaked(run)["size_bytes"].sum())
    if name in (SAVED_SOFTMAX, KV_PER_TOKEN):
        return sum(_measure_layers(run, name).values())
    return _category_peaks(run).get(name, 0)


def _category_peaks(run: "Run") -> dict[str, int]:
    """Return the most bytes of each category live at any instant of the run."""
    from attnprof.analysis.growth import find_phase_peaks

    peaks = find_phase_peaks(run.attribution.allocations)
    own = peaks.filter((peaks["layer"] == "") & (peaks["category"] != "total"))
    return dict(own.group_by("category").agg(own["peak_bytes"].max()).iter_rows())


def _measure_layers(run: "Run", name: str) -> dict[str, int]:
    """Return per layer the most bytes it held, largest first."""
    if name in (SAVED_SOFTMAX, KV_PER_TOKEN):
        rows = run.layers().iter_rows(named=True)
        if name == SAVED_SOFTMAX:
            sizes = {row["layer"]: row["saved_softmax_bytes"] for row in rows}
        else:
            sizes = {
                row["layer"]: -(-row["kv_cache_bytes"] // max(1, row["batch"] * row["k_len"]))
                for row in rows
            }
    else:
        from attnprof.analysis.growth import find_phase_peaks

        peaks = find_phase_peaks(run.attribution.allocations)
        own = peaks.filter((peaks["layer"] != "") & (peaks["category"] == name))
        sizes = dict(own.group_by("layer").agg(own["peak_bytes"].max()).iter_rows())
    return dict(sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])))


def _find_leaked(run: "Run") -> "pl.DataFrame":
    """Return the blocks that an op of the test made and that outlived it."""
    rows = run.allocations
    return rows.filter(rows["end_ns"].is_null() & rows["op"].is_not_null())


def _list_holders(run: "Run", name: str) -> Iterator[str]:
    """Yield a line for each of the largest holders of what a limit counts."""
    if name in (SAVED_SOFTMAX, KV_PER_TOKEN):
        sizes = _measure_layers(run, name)
        lines = [f"{format_bytes(size):>12}  {layer}" for layer, size in sizes.items() if size]
    else:
        held = _find_leaked(run) if name == LEAKED else _find_held(run, name)
        lines = [_describe_block(row) for row in _sum_blocks(held).iter_rows(named=True)]
    yield from _shorten(lines)


def _find_held(run: "Run", name: str) -> "pl.DataFrame":
    """Return the blocks at the instant that a limit is about."""
    import polars as pl

    from attnprof.analysis.peak import find_peak

    allocations = run.attribution.allocations
    if name in (PEAK, RESERVED):
        return run.peak().allocations
    own = allocations.filter(pl.col("category").cast(pl.String) == name)
    return find_peak(own).allocations


def _sum_blocks(held: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    return (
        held.group_by(pl.col("category", "layer", "op").cast(pl.String))
        .agg(pl.col("size_bytes").sum(), count=pl.len())
        .sort("size_bytes", "layer", descending=[True, False])
    )


def _describe_block(row: dict[str, object]) -> str:
    size = row["size_bytes"]
    assert isinstance(size, int)
    made = f", made by {row['op']}" if row["op"] else ""
    where = f" of {row['layer']}" if row["layer"] else ""
    blocks = f" in {row['count']} blocks" if row["count"] != 1 else ""
    return f"{format_bytes(size):>12}  {row['category']}{where}{made}{blocks}"


def _shorten(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], f"{'':>12}  and {more} more"]
