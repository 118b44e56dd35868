"""Which scenarios there are, what they come to in a run, and which of them are worth advising."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import isfinite

from attnprof.analysis.peak import Peak
from attnprof.analysis.what_if.cache import (
    keep_latent,
    offload,
    preallocate,
    store_fp8,
    store_int4,
    use_pages,
)
from attnprof.analysis.what_if.fused import fuse_attention
from attnprof.analysis.what_if.heads import group_queries
from attnprof.analysis.what_if.loss import chunk_loss
from attnprof.analysis.what_if.masks import share_masks, use_causal_flag
from attnprof.analysis.what_if.optimizer import free_gradients, fuse_optimizer, narrow_optimizer
from attnprof.analysis.what_if.recompute import checkpoint_blocks, free_activations
from attnprof.analysis.what_if.room import preallocate_masked
from attnprof.analysis.what_if.scale import scale_batch, scale_length
from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Scenario
from attnprof.analysis.what_if.scene import Scene
from attnprof.analysis.what_if.softmax import narrow_softmax, turn_dropout_off
from attnprof.attribution.attribute import Attribution

SCENARIOS = (
    Scenario("no_attention_dropout", turn_dropout_off),
    Scenario("fused_attention", fuse_attention),
    Scenario("bf16_softmax", narrow_softmax),
    Scenario("causal_flag", use_causal_flag),
    Scenario("no_mask_copies", share_masks),
    Scenario("gqa", group_queries, needs="kv_heads"),
    Scenario("cache_latent", keep_latent, needs="latent_dim"),
    Scenario("cache_static", preallocate, choice="where the cache lies"),
    Scenario("cache_static_masked", preallocate_masked, choice="where the cache lies"),
    Scenario("cache_paged", use_pages, choice="where the cache lies"),
    Scenario("cache_fp8", store_fp8, choice="the cache's dtype"),
    Scenario("cache_int4", store_int4, choice="the cache's dtype"),
    Scenario("cache_offload", offload),
    Scenario("chunked_loss", chunk_loss),
    Scenario("fused_optimizer", fuse_optimizer),
    Scenario("optimizer_8bit", narrow_optimizer),
    Scenario("free_gradients", free_gradients),
    Scenario("no_grad", free_activations),
    Scenario("checkpointing", checkpoint_blocks),
    Scenario("batch", scale_batch, needs="batch"),
    Scenario("seq_len", scale_length, needs="seq_len"),
)
"""In the order in which they are replayed together: what is left out goes first, then what is
smaller, then when it lives, then how large everything is."""

_LEAST_SAVING = 0.01
"""Of the peak: below, a change is not worth advising."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What a run would have needed with some changes."""

    scenarios: tuple[str, ...]
    """Their names, in the order in which they were replayed."""
    changes: tuple[Change, ...]
    """One per scenario."""
    before: Peak
    """The peak that was recorded."""
    after: Peak
    """The peak with the changes, and what would be live then."""
    after_by_phase: dict[str, int]
    """The most live bytes at any allocation of each phase, with the changes."""

    @property
    def saves_bytes(self) -> int:
        """By how much the peak falls; negative where it rises."""
        return self.before.total_bytes - self.after.total_bytes

    @property
    def exact(self) -> bool:
        """Whether all sizes are read off the run, rather than estimated."""
        return all(change.exact for change in self.changes)


@dataclass(frozen=True, slots=True)
class Advice:
    """A change to the program that lowers its peak."""

    kind: str
    """The name of the scenario, such as ``"fused_attention"``."""
    title: str
    """The change, in a few words."""
    evidence: str
    """What in the run it acts on."""
    how: str
    """The option or line of code that does it."""
    layers: tuple[str, ...]
    """The layers it acts on; empty where it is none or all."""
    saves_bytes: int
    """By how much the peak falls."""
    new_peak_bytes: int
    """The peak with the change."""
    new_peak_step: int
    """The step in which the peak then is."""
    new_peak_phase: str
    """What the program then does at its peak."""
    new_peak_layer: str
    """The module that then runs at the peak."""
    assumes: tuple[str, ...]
    """What the program is taken to do, that the run cannot show."""
    exact: bool
    """Whether all sizes are read off the run, rather than estimated."""
    scenarios: tuple[str, ...]
    """What to give `Run.what_if` for the whole peak: mostly the kind alone."""


def ask(
    attribution: Attribution, names: Iterable[str], options: Options, *, device: str | None = None
) -> WhatIf:
    """Replay a run with some changes.

    Args:
        attribution: The run.
        names: Scenarios, in any order. One that needs a number which `options` has is added.
        options: The numbers that some scenarios need.
        device: As for `Run.peak`.

    Raises:
        DoesNotApply: A scenario has nothing to change in the run.
        ValueError: No scenario, an unknown one, one without its number, two that exclude each
            other, a number out of range, or a device that the run does not have.
        TypeError: A scenario is no name, or a number is none.
    """
    asked = list(names)
    for name in asked:
        if not isinstance(name, str):
            raise TypeError(f"scenarios are names, one argument each; got {name!r}")
    chosen = _choose({*asked, *_implied(options)}, options)
    return _replay(Scene(attribution, device), chosen, options)


def ask_all(
    attribution: Attribution, options: Options, *, device: str | None = None
) -> tuple[list[WhatIf], dict[str, str]]:
    """Replay every scenario on its own, but for those that lack a number.

    Returns:
        Those that apply, the largest saving first, and why the others do not, by name.

    Raises:
        ValueError: A number is out of range, or the run does not have the device.
    """
    _check(options)
    scene = Scene(attribution, device)
    applied: list[WhatIf] = []
    refused: dict[str, str] = {}
    for scenario in SCENARIOS:
        if scenario.needs and getattr(options, scenario.needs) is None:
            continue
        try:
            applied.append(_replay(scene, [scenario], options))
        except DoesNotApply as refusal:
            refused[scenario.name] = refusal.reason
    return sorted(applied, key=lambda w: (-w.saves_bytes, w.scenarios)), refused


def find_advice(attribution: Attribution, *, device: str | None = None) -> list[Advice]:
    """Return what would lower a run's peak by at least 1 %, the largest saving first.

    Scenarios that need a number are not among it: they change what the program computes. Where
    dropout keeps attention from being fused, both are advised together.

    Raises:
        ValueError: The run has no such device.
    """
    scene = Scene(attribution, device)
    found: list[WhatIf] = []
    applied: set[str] = set()
    for names in _ADVISED:
        if names <= applied:
            continue  # a combination whose parts can be had one by one
        try:
            what_if = _replay(scene, [s for s in SCENARIOS if s.name in names], Options())
        except DoesNotApply:
            continue
        applied |= names
        parts = [other.saves_bytes for other in found if names > set(other.scenarios)]
        if what_if.saves_bytes > max([_LEAST_SAVING * scene.before.total_bytes, *parts]):
            found.append(what_if)
    advice = [_make_advice(what_if) for what_if in found]
    return sorted(advice, key=lambda a: (-a.saves_bytes, a.kind))


_ADVISED: tuple[set[str], ...] = (
    *({s.name} for s in SCENARIOS if not s.needs),
    {"no_attention_dropout", "fused_attention"},
)
"""What is tried; a combination after its parts, for where one does not apply alone."""


def _choose(names: set[str], options: Options) -> list[Scenario]:
    """Return the scenarios of some names in the order of their replay.

    Raises:
        ValueError: As `ask` does.
    """
    _check(options)
    known = [s.name for s in SCENARIOS]
    unknown = sorted(names - set(known))
    if unknown or not names:
        got = f"unknown scenario {unknown[0]!r}" if unknown else "no scenario was given"
        raise ValueError(f"{got}; expected one or more of: {', '.join(known)}")
    chosen = [s for s in SCENARIOS if s.name in names]
    decided: dict[str, str] = {}
    for scenario in chosen:
        if scenario.needs and getattr(options, scenario.needs) is None:
            option = scenario.needs.replace("kv_heads", "heads").replace("_", "-")
            raise ValueError(
                f"{scenario.name} needs a number: give {scenario.needs} (in a shell, --{option})"
            )
        if scenario.choice in decided:
            raise ValueError(
                f"{decided[scenario.choice]} and {scenario.name} both decide {scenario.choice}; "
                "give one of them"
            )
        if scenario.choice:
            decided[scenario.choice] = scenario.name
    return chosen


def _implied(options: Options) -> set[str]:
    return {s.name for s in SCENARIOS if s.needs and getattr(options, s.needs) is not None}


def _check(options: Options) -> None:
    for scenario in SCENARIOS:
        number = getattr(options, scenario.needs) if scenario.needs else None
        if number is None:
            continue
        kinds, words = (int | float, "a") if scenario.needs == "batch" else (int, "a whole")
        if not isinstance(number, kinds) or isinstance(number, bool):
            kind = type(number).__name__
            raise TypeError(f"{scenario.needs} must be {words} number, got {number!r} ({kind})")
        if not (number > 0 and isfinite(number)):
            raise ValueError(f"{scenario.needs} must be a number above 0, got {number}")


def _replay(scene: Scene, scenarios: list[Scenario], options: Options) -> WhatIf:
    """Apply scenarios one after the other.

    Raises:
        DoesNotApply: One of them has nothing to change.
    """
    options = replace(options, applied=frozenset(s.name for s in scenarios))
    table = scene.table
    changes = []
    for scenario in scenarios:
        try:
            table, change = scenario.apply(scene, table, options)
        except DoesNotApply as refusal:
            raise DoesNotApply(refusal.reason, scenario.name) from None
        changes.append(change)
    replayed = table.replay()
    return WhatIf(
        scenarios=tuple(s.name for s in scenarios),
        changes=tuple(changes),
        before=scene.before,
        after=table.find_peak(scene.attribution, replayed),
        after_by_phase=table.most_by_phase(replayed),
    )


def _make_advice(found: WhatIf) -> Advice:
    *others, main = found.changes
    return Advice(
        kind=found.scenarios[-1],
        title=", ".join([main.title, *(c.title[0].lower() + c.title[1:] for c in others)]),
        evidence=main.evidence,
        how="; ".join(change.how for change in found.changes),
        layers=main.layers,
        saves_bytes=found.saves_bytes,
        new_peak_bytes=found.after.total_bytes,
        new_peak_step=found.after.step,
        new_peak_phase=found.after.phase,
        new_peak_layer=found.after.layer,
        assumes=main.assumes,
        exact=found.exact,
        scenarios=found.scenarios,
    )
