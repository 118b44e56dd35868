"""What reports say of a run's KV cache, gathered once."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from attnprof.analysis.cache_forms import LayerCache, find_largest, take_growing, take_largest
from attnprof.analysis.cache_layers import CacheKind
from attnprof.analysis.weights import measure_weights
from attnprof.analysis.what_if.scenario import DoesNotApply
from attnprof.report.fold import fold_names
from attnprof.report.words import format_seconds
from attnprof.run import Run
from attnprof.units import format_bytes
from attnprof.vocabulary import Phase

_FORWARDS_SHOWN = 8
_FIXED_FORMS = {
    "cache_static": "of fixed length, read as a slice",
    "cache_static_masked": "of fixed length, attended to in full",
}


@dataclass(frozen=True, slots=True)
class PhasePeaks:
    """The most live bytes with one form of the cache; None where a phase does not occur."""

    form: str
    prefill_bytes: int | None
    decode_bytes: int | None
    total_bytes: int


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """How long the first decoding of a run took, tracing included."""

    first_seconds: float
    """From the first op to the first token: all of the prompt."""
    later_seconds: float
    """The median of the tokens after it."""


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """A run's caches and states, as reports tell them."""

    frame: pl.DataFrame
    """`Run.kv_cache`; has rows."""
    layers: list[LayerCache]
    """After the forward that left most."""
    growth: pl.DataFrame
    """A row per forward: bytes held and used by all layers, the most that one took beside."""
    fixed: list[PhasePeaks]
    """As recorded, and with caches of fixed length; empty where none grows by concatenation."""
    times: TokenTimes | None
    weights_bytes: int
    """Parameters that live beside `layers`, on the devices where these are."""


def summarise_cache(run: Run, *, device: str | None = None) -> CacheSummary | None:
    """Gather what reports say of the caches of ``run``; None if it has none.

    Args:
        run: The run.
        device: Speak of the peaks of this device; without it, as `Run.peak` chooses.

    Raises:
        ValueError: The run has no such device.
    """
    frame = run.kv_cache()
    if frame.is_empty():
        return None
    growth = _sum_forwards(frame, run.steps)
    return CacheSummary(
        frame=frame,
        layers=take_largest(frame),
        growth=growth,
        fixed=_find_fixed(run, device),
        times=_find_times(growth, run.steps, has_encoder=CacheKind.CROSS.value in frame["kind"]),
        weights_bytes=measure_weights(run.attribution, find_largest(frame)),
    )


def _sum_forwards(frame: pl.DataFrame, steps: pl.DataFrame) -> pl.DataFrame:
    return (
        frame.group_by("forward")
        .agg(
            pl.col("step", "phase").first(),
            pl.coalesce(
                pl.col("tokens").filter(pl.col("kind") != CacheKind.CROSS.value).max(),
                pl.col("tokens").max(),
            ),
            pl.col("held_bytes", "used_bytes").sum(),
            pl.col("growing_bytes", "expanded_bytes").max(),
        )
        .sort("forward")
        .join(steps.select("step", "wall_seconds"), on="step", how="left", maintain_order="left")
    )


def _find_fixed(run: Run, device: str | None) -> list[PhasePeaks]:
    found: list[PhasePeaks] = []
    known: set[str] = set()
    for scenario, form in _FIXED_FORMS.items():
        try:
            what_if = run.what_if(scenario, device=device)
        except DoesNotApply:
            continue
        most = what_if.after_by_phase
        known |= most.keys()
        prefill, decode = most.get(Phase.PREFILL.value), most.get(Phase.DECODE.value)
        found.append(PhasePeaks(form, prefill, decode, what_if.after.total_bytes))
    if not found:
        return []

    def measure(phase: Phase) -> int | None:
        is_known = phase.value in known
        return run.peak(phase=phase.value, device=device).total_bytes if is_known else None

    recorded = PhasePeaks(
        form="as recorded",
        prefill_bytes=measure(Phase.PREFILL),
        decode_bytes=measure(Phase.DECODE),
        total_bytes=run.peak(device=device).total_bytes,
    )
    return [recorded, *found]


def _find_times(
    growth: pl.DataFrame, steps: pl.DataFrame, *, has_encoder: bool
) -> TokenTimes | None:
    """Return how long tokens took, where every forward is a step of its own.

    An encoder that is a forward of its own leaves no cache; it is the step before the first.
    """
    if growth["step"].is_duplicated().any():
        return None
    is_decode = (growth["phase"] == Phase.DECODE.value).to_list()
    if True not in is_decode or is_decode[0]:
        return None
    begin, end = int(growth["step"][0]), int(growth["step"][is_decode.index(True)])
    begin -= has_encoder and begin > 0
    first = steps.filter(pl.col("step").is_between(begin, end, closed="left"))
    later = growth.filter(pl.col("phase") == Phase.DECODE.value)["wall_seconds"].median()
    assert isinstance(later, float)
    return TokenTimes(float(first["wall_seconds"].sum()), later)


def write_cache_sentence(summary: CacheSummary) -> str:
    """Return what the caches held at most, per token, beside what the architecture says."""
    layers = take_growing(summary.layers)
    count = len(summary.layers)
    held = sum(layer.held_bytes for layer in summary.layers)
    text = f"{count} layer{'' if count == 1 else 's'} held {format_bytes(held)} at most"
    if layers:
        longest = max(layers, key=lambda layer: layer.tokens)
        per_token = sum(layer.bytes_per_token for layer in layers)
        sequences = f"{longest.batch} sequences of " if longest.batch > 1 else ""
        text += f": {sequences}{longest.tokens} tokens, {format_bytes(round(per_token))} a token"
        predicted = [layer.predicted_bytes_per_token for layer in layers]
        if None not in predicted:
            total = sum(p for p in predicted if p is not None)
            agrees = "as" if total == per_token else "where"
            text += f", {agrees} the architecture says {format_bytes(total)}"
    return f"{text}."


def write_transient_sentence(summary: CacheSummary) -> str:
    """Return what layers took beside their caches for a moment, and when the first token came."""
    frame, times = summary.frame, summary.times
    is_state = pl.col("kind") == CacheKind.STATE.value
    parts = [
        f"{format_bytes(int(most))} of {what}"  # type: ignore[arg-type]  # an integer
        for most, what in (
            (
                frame.filter(~is_state)["growing_bytes"].max(),
                "an older copy while a longer one was made",
            ),
            (frame["expanded_bytes"].max(), "copies made to attend"),
            (frame.filter(is_state)["growing_bytes"].max(), "states on the way to a new one"),
        )
        if most
    ]
    what = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "nothing"
    text = f"Beside its cache a layer held at most {what}."
    if times is not None:
        first, later = map(format_seconds, (times.first_seconds, times.later_seconds))
        text += f" The first token took {first}, each later one {later}."
    return text


def pick_forwards(growth: pl.DataFrame, most: int = _FORWARDS_SHOWN) -> pl.DataFrame:
    """Return the first of `CacheSummary.growth`, the last, and some in between; all of a few."""
    count = len(growth)
    if count <= most + 2:  # so few are not worth leaving out
        return growth
    return growth[[round(i * (count - 1) / (most - 1)) for i in range(most)]]


def group_caches(layers: Sequence[LayerCache]) -> list[tuple[str, int, LayerCache]]:
    """Fold layers whose caches are alike: the folded name, how many, and one of them."""
    groups: dict[tuple[object, ...], list[LayerCache]] = {}
    for layer in layers:
        key = (layer.kind, layer.kv_heads, layer.head_dim, layer.tokens, layer.held_bytes)
        groups.setdefault(key, []).append(layer)
    return [
        (", ".join(fold_names([layer.layer for layer in group])), len(group), group[0])
        for group in groups.values()
    ]
