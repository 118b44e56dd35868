"""Gather what reports say about growth from a `Growth` and the run of its longest length."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import polars as pl

from attnprof.analysis.fits import TOTAL, Fit
from attnprof.analysis.peak import Peak
from attnprof.growth import Growth, read_capacity
from attnprof.palette import stack_order
from attnprof.report.fold import fold_names
from attnprof.report.growth_summary import Capacity, GrowthSummary, LayerLaw, Point
from attnprof.report.summary import find_holders
from attnprof.run import Run
from attnprof.store.lengths import DRY_RUN, STEPS
from attnprof.vocabulary import AttentionKind, Category, Status

_MAX_LAYER_LAWS = 12
"""Layers and categories whose law is worth a line."""
_PREDICTIONS = 24
"""Lengths at which the line beyond those known is predicted."""
_BEYOND = 4
"""The line reaches so many times the longest length, where no wall lies farther."""
_ENVIRONMENT = ("torch", "transformers", "python")


def summarise_growth(
    growth: Growth,
    *,
    capacities: Sequence[int | str] = (),
    focus: str = TOTAL,
    name: str = "",
) -> GrowthSummary:
    """Gather what reports say.

    Args:
        growth: The growth.
        capacities: What a step has to fit into, as for `Growth.find_wall`. If ``growth`` can make
            dry runs, they are made here.
        focus: The category that the report is about, or ``"total"``.
        name: What to call it; without it the ``make_step`` that was swept.

    Raises:
        ValueError: A capacity is neither a size nor a known device, or there is no such category.
    """
    check_focus(focus)
    sizes = [(str(capacity), read_capacity(capacity)) for capacity in capacities]
    points = list_points(growth)
    done = [point for point in points if point.is_done and point.sizes]
    if not done:
        why = (
            "nothing was recorded" if any(p.is_done for p in points) else "no length was completed"
        )
        unknown = [Capacity(name, size, None, why) for name, size in sizes]
        return GrowthSummary(
            name=name or "growth",
            path=growth.path,
            points=tuple(points),
            capacities=tuple(unknown),
            focus=focus,
        )
    longest = max((p for p in done if p.source == growth.source), key=lambda p: p.seq_len)
    run = growth.run(longest.seq_len)
    fits = _fit_all(growth, longest, focus) if _count_lengths(points, growth.source) > 1 else {}
    walls = [_find_capacity(growth, given, size) for given, size in sizes]
    if any(p.status == Status.OUT_OF_MEMORY for p in points if p.source != DRY_RUN):
        walls.append(Capacity("memory", None, growth.find_wall()))
    return GrowthSummary(
        name=name or _name_of(run),
        path=growth.path or run.path,
        about=tuple(_describe_run(run)),
        points=tuple(points),
        fits=fits,
        longest=longest.seq_len,
        holders=tuple(find_holders(_find_peak(run, longest))),
        layer_laws=tuple(_find_layer_laws(growth, longest)) if fits else (),
        predicted=tuple(_predict(growth, longest.seq_len, walls)) if fits else (),
        theory=tuple(_apply_theory(run, [p.seq_len for p in done])),
        capacities=tuple(walls),
        assumptions=tuple(_list_assumptions(growth)),
        focus=focus,
    )


def list_points(growth: Growth) -> list[Point]:
    """Return every length with the most bytes of each category, whatever the phase."""
    frame = (
        growth.points.filter(pl.col("layer") == "")
        .group_by("source", "seq_len", "category")
        .agg(pl.col("peak_bytes").max())
        .sort("category")
    )
    sizes: dict[tuple[str, int], dict[str, int]] = {}
    for source, seq_len, category, size in frame.iter_rows():
        sizes.setdefault((source, seq_len), {})[category] = size
    return [
        Point(x.seq_len, x.source, x.status, x.reason, sizes.get((x.source, x.seq_len), {}))
        for x in growth.lengths
    ]


def _count_lengths(points: Sequence[Point], source: str) -> int:
    return len({p.seq_len for p in points if p.is_done and p.source == source})


def check_focus(focus: str) -> None:
    """Raise if a report cannot be about this.

    Raises:
        ValueError: It is no category.
    """
    words = [TOTAL, *(category.value for category in Category)]
    if focus not in words:
        raise ValueError(f"there is no category {focus!r}; there are: {', '.join(words)}")


def _fit_all(growth: Growth, longest: Point, focus: str) -> dict[str, Fit]:
    """Return the fits of the total and of every category, the largest first."""
    sizes = {name: size for name, size in longest.sizes.items() if name != TOTAL}
    by_size = sorted(sizes, key=lambda name: (-sizes[name], stack_order(name)))
    return {name: growth.fit(name) for name in dict.fromkeys((TOTAL, *by_size, focus))}


def _find_capacity(growth: Growth, name: str, size: int) -> Capacity:
    try:
        return Capacity(name, size, growth.find_wall(size))
    except ValueError as error:  # memory does not grow, or too few lengths are known
        return Capacity(name, size, None, str(error))


def _find_peak(run: Run, point: Point) -> Peak:
    """Return the peak of a length: of its run, or where lengths are steps, of its highest step."""
    if point.source != STEPS:
        return run.peak()
    steps = run.steps.filter(pl.col("seq_len") == point.seq_len)
    return run.peak(step=steps.sort("peak_bytes", descending=True)["step"][0])


def _name_of(run: Run) -> str:
    workload = run.info.get("workload")
    name = workload.get("make_step") if isinstance(workload, dict) else None
    return str(name or run.path.resolve().name)


def _describe_run(run: Run) -> list[str]:
    """Return where the longest length ran and with what, in a few words each."""
    environment: dict[str, Any] = run.info.get("environment") or {}
    dry: dict[str, Any] = run.info.get("dry_run") or {}
    words = [f"dry runs for {dry.get('device') or dry['target']}"] if dry else []
    words += [] if dry else [str(gpu) for gpu in environment.get("gpus") or []][:1]
    return words + [f"{key} {environment[key]}" for key in _ENVIRONMENT if environment.get(key)]


def _find_layer_laws(growth: Growth, longest: Point) -> list[LayerLaw]:
    """Return the laws of what single layers hold, layers that are alike at all lengths folded."""
    own = growth.points.filter(
        pl.col("layer") != "",
        pl.col("category") != TOTAL,
        pl.col("source") == longest.source,
        pl.col("status") == Status.COMPLETED.value,
    ).sort("category", "layer", "seq_len", "phase")
    alike: dict[tuple[object, ...], list[str]] = {}
    rows = own.group_by("category", "layer", maintain_order=True).agg(
        "seq_len", "phase", "peak_bytes"
    )
    for category, layer, lengths, phases, sizes in rows.iter_rows():
        if longest.seq_len in lengths:
            at_longest = [s for n, s in zip(lengths, sizes, strict=True) if n == longest.seq_len]
            key = (max(at_longest), category, tuple(lengths), tuple(phases), tuple(sizes))
            alike.setdefault(key, []).append(layer)
    folded = [
        (int(str(key[0])), str(key[1]), label, members)
        for key, layers in alike.items()
        for label, members in fold_names(layers).items()
    ]
    folded.sort(key=lambda row: (-row[0] * len(row[3]), row[1], row[2]))
    return [
        LayerLaw(label, len(members), growth.fit(category, members[0]), size)
        for size, category, label, members in folded[:_MAX_LAYER_LAWS]
    ]


def _predict(growth: Growth, first: int, walls: Sequence[Capacity]) -> Iterator[tuple[int, int]]:
    """Yield predicted peaks from a length on, evenly spaced for a logarithmic axis."""
    farthest = max((c.wall.next_seq_len for c in walls if c.wall is not None), default=0)
    last = max(_BEYOND * first, farthest)
    ratio = last / first
    lengths = [round(first * ratio ** (i / _PREDICTIONS)) for i in range(_PREDICTIONS + 1)]
    with suppress(ValueError):  # there are lengths whose bytes cannot be counted
        for n in dict.fromkeys(lengths):
            yield n, growth.predict(n)


def _apply_theory(run: Run, seq_lens: Sequence[int]) -> list[tuple[int, int]]:
    """Return what theory says autograd keeps between QKᵀ and PV, from the shapes of one run.

    A materialised layer keeps B·H·n² elements, a banded or low-rank one B·H·n times a width that
    stays.
    """
    layers = run.layers()
    known = layers.filter(pl.col("q_len") > 0).select("kind", "q_len", "predicted_saved_bytes")
    theory = []
    for n in sorted(set(seq_lens)):
        total = 0.0
        for kind, q_len, size in known.iter_rows():
            power = 2 if kind == AttentionKind.MATERIALISED.value else 1
            total += size * (n / q_len) ** power
        theory.append((n, round(total)))
    return theory if any(size for _, size in theory) else []


def _list_assumptions(growth: Growth) -> list[str]:
    """Return what the dry runs assumed, each assumption once."""
    found: dict[str, None] = {}
    for length in growth.lengths:
        if length.source == DRY_RUN and length.path is not None:
            dry = Run.load(length.path).info.get("dry_run") or {}
            found |= dict.fromkeys(str(a) for a in dry.get("assumptions") or ())
    return list(found)
