"""One row per step: how long it took, how much it needed, how long its sequences were."""

from typing import Any

import numpy as np
import polars as pl

from attnprof.analysis.allocator import simulate_allocator
from attnprof.analysis.device_history import AllocatorAttribution
from attnprof.analysis.imported import ImportedAttribution, describe_imported_steps
from attnprof.analysis.peak import choose_device, replay
from attnprof.attribution.attribute import Attribution
from attnprof.attribution.phases import CODE


def describe_steps(
    attribution: Attribution, *, device: str | None = None, is_dry: bool = False
) -> pl.DataFrame:
    """Return a row per step.

    Columns: ``step``, ``begin_ns``, ``end_ns``, ``wall_seconds``, ``seq_len`` and ``batch`` of the
    data, ``ops``, ``peak_bytes`` and ``peak_phase`` on the device, ``reserved_bytes`` (null where
    it is not known), ``is_detailed``, and seconds per phase as ``<phase>_seconds``.

    Of a step that was only counted (``is_detailed`` is false) there is what the allocator counted;
    ``peak_bytes`` is null unless its peak was the highest so far.

    Args:
        attribution: A run's facts and what they mean.
        device: The device; chosen as for a peak without it.
        is_dry: Whether it was a dry run: what its CUDA device would reserve is simulated.
    """
    timeline, facts = attribution.timeline, attribution.facts
    device = choose_device(attribution.allocations, device)
    if isinstance(attribution, ImportedAttribution):
        return describe_imported_steps(attribution, device)
    begins = timeline.step_begin
    ends = np.append(begins[1:], facts.count)
    replayed = replay(attribution.allocations, device)
    step_of_block = replayed.frame["step"].to_numpy()
    phase_of_block = replayed.frame["phase"].cast(pl.String).to_list()
    lengths = _read_lengths(attribution)
    reserved = _find_reserved(attribution, device, is_dry=is_dry)
    counted = _describe_counted(attribution, device)
    rows: list[dict[str, Any]] = []
    for step, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        if timeline.counted[step] >= 0:
            rows.append({"step": step, **counted[int(timeline.counted[step])]})
            continue
        own = np.flatnonzero(step_of_block == step)
        at = int(own[np.argmax(replayed.live_bytes[own])]) if len(own) else None
        first = int(facts.time_ns[begin]) if begin < facts.count else 0
        last = int(facts.time_ns[end - 1]) if end > begin else first
        batch, seq_len = lengths.get(step, (None, None))
        rows.append(
            {
                "step": step,
                "begin_ns": first,
                "end_ns": last,
                "wall_seconds": (last - first) / 1e9,
                "seq_len": seq_len,
                "batch": batch,
                "ops": end - begin,
                "peak_bytes": int(replayed.live_bytes[at]) if at is not None else 0,
                "peak_phase": phase_of_block[at] if at is not None else None,
                "reserved_bytes": reserved[step] if reserved else None,
                "is_detailed": True,
                **_time_phases(attribution, begin, end),
            }
        )
    nullable = ("seq_len", "batch", "peak_bytes", "reserved_bytes")
    return pl.DataFrame(
        rows, schema_overrides=dict.fromkeys(nullable, pl.Int64), infer_schema_length=None
    )


def _describe_counted(attribution: Attribution, device: str) -> dict[int, dict[str, Any]]:
    """Return by number what is known of the steps that were only counted."""
    facts = attribution.facts
    table = facts.stored.table("counted_steps").to_pylist()
    nobody = dict.fromkeys(("seq_len", "batch", "peak_bytes", "peak_phase", "reserved_bytes"))
    found: dict[int, dict[str, Any]] = {}
    for row in table:
        step = found.setdefault(
            row["step"],
            {
                "begin_ns": row["begin_ns"],
                "end_ns": row["end_ns"],
                "wall_seconds": (row["end_ns"] - row["begin_ns"]) / 1e9,
                "ops": 0,
                "is_detailed": False,
                **nobody,
                **{f"{phase.value}_seconds": None for phase in CODE},
            },
        )
        if facts.devices[row["device"]] == device:
            step["reserved_bytes"] = row["reserved_bytes"]
            step["peak_bytes"] = row["peak_bytes"] if row["peak_bytes"] >= 0 else None
    return found


def _find_reserved(attribution: Attribution, device: str, *, is_dry: bool) -> list[int]:
    """Return per step the most bytes reserved in it; none where nothing tells.

    A recorded history does; in a dry run CUDA's caching allocator is simulated.
    """
    if isinstance(attribution, AllocatorAttribution):
        own = [history for history in attribution.histories if history.device == device]
        if not own:
            return []
        positions, after = own[0].position, own[0].reserved_bytes()
    elif is_dry and device.startswith("cuda"):
        simulated = simulate_allocator(attribution.allocations, device=device)
        positions, after = simulated.positions, simulated.reserved_bytes
    else:
        return []
    begins = np.searchsorted(
        attribution.facts.events["op"], attribution.timeline.step_begin, "left"
    )
    first = np.searchsorted(positions, begins, "left")
    ends = np.append(first[1:], len(positions))
    # What was reserved when a step begins still is.
    return [
        int(after[max(begin - 1, 0) : end].max(initial=0))
        for begin, end in zip(first.tolist(), ends.tolist(), strict=True)
    ]


def _time_phases(attribution: Attribution, begin: int, end: int) -> dict[str, float]:
    """Return the seconds between an op and the one before it, summed per phase."""
    times = attribution.facts.time_ns[begin:end]
    spent = np.diff(times, prepend=times[:1]) / 1e9
    phases = attribution.timeline.phase[begin:end]
    return {f"{p.value}_seconds": float(spent[phases == code].sum()) for p, code in CODE.items()}


def _read_lengths(attribution: Attribution) -> dict[int, tuple[int | None, int | None]]:
    """Return batch and sequence length per step: those of its longest attention call.

    Without attention, those of the data that enters the outermost forward.
    """
    facts, timeline = attribution.facts, attribution.timeline
    found: dict[int, tuple[int | None, int | None]] = {}
    for begin, leave in zip(timeline.forward_begin, timeline.forward_exit, strict=True):
        if begin < facts.count:
            shape = facts.first_input_shape(int(begin), int(leave))
            step = int(timeline.step_of(np.array([begin]))[0])
            if len(shape) >= 2 and step not in found:
                found[step] = (shape[0], shape[1])
    longest: dict[int, int] = {}
    for call in attribution.calls:
        step = int(timeline.step_of(np.array([call.ops[0]]))[0])
        length = max(call.q_len, call.k_len)
        if call.kind in ("materialised", "fused") and length > longest.get(step, 0):
            longest[step] = length
            found[step] = (call.batch, length)
    return found
