"""Runs made of a memory snapshot: blocks from the allocator's history, labels from call stacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from attnprof.analysis.device_history import (
    AllocatorAttribution,
    DeviceHistory,
    read_histories,
)
from attnprof.analysis.peak import replay
from attnprof.attribution.blocks import Blocks
from attnprof.attribution.cache import Kept
from attnprof.attribution.facts import Bools, Facts, Ints
from attnprof.attribution.frames import Meaning, read_stack
from attnprof.attribution.inferred import Allocations, Inferred, infer, read_category
from attnprof.attribution.labels import CATEGORIES
from attnprof.attribution.phases import CODE as PHASE
from attnprof.attribution.phases import PHASES, find_timeline
from attnprof.attribution.workspace import NO_STORAGE
from attnprof.store.reader import StoredRun
from attnprof.vocabulary import Phase

_OPTIMIZER_STEP = "Optimizer.step#"
"""What torch's optimizers call their steps in annotations (``Optimizer.profile_hook_step``)."""


@dataclass(frozen=True)
class ImportedAttribution(AllocatorAttribution):
    """What a snapshot means; it has no ops, so that the parts about ops are empty."""

    meanings: list[Meaning]
    """Per row of `stacks`, what it says."""

    def describe_event(self, history: DeviceHistory, at: int) -> tuple[str, str | None]:
        """Return the line of the program at which an event happened, and in which op."""
        stack = int(history.stack[at])
        return (self.meanings[stack].place, self.meanings[stack].op) if stack >= 0 else ("", None)


def attribute_snapshot(stored: StoredRun) -> ImportedAttribution:
    """Attribute every block of a run that was made of a snapshot."""
    facts = Facts(stored)
    about = stored.info["snapshot"]
    histories = read_histories(
        stored,
        about.get("allocator_settings", {}),
        sizes_are_exact=about.get("sizes_are_exact", False),
    )
    meanings = _read_meanings(stored)
    frames = [
        _build_allocations(history, stored, meanings, _list_step_ends(stored, history.number))
        for history in histories
    ]
    allocations = pl.concat(frames).with_columns(
        pl.int_range(pl.len()).alias("allocation_id"),
        pl.col("device", "phase", "layer", "op", "category", "role", "dtype").cast(pl.Categorical),
    )
    return ImportedAttribution(
        facts=facts,
        timeline=find_timeline(facts),
        blocks=_to_blocks(allocations),
        calls=[],
        kept=Kept({}, {}),
        allocations=allocations,
        histories=histories,
        meanings=meanings,
    )


def _read_meanings(stored: StoredRun) -> list[Meaning]:
    """Return what each row of `stacks` says."""
    table = stored.table("frames")
    columns = (table[name].to_pylist() for name in ("filename", "line", "name"))
    frames = list(zip(*columns, strict=True))
    stacks = stored.table("stacks")["frames"].to_pylist()
    return [read_stack([frames[number] for number in stack]) for stack in stacks]


def _list_step_ends(stored: StoredRun, device: int) -> Ints:
    """Return the times at which steps of optimizers ended, ascending."""
    table = stored.table("annotations")
    names, begins = table["name"].to_pylist(), table["begins"].to_pylist()
    is_end = [n.startswith(_OPTIMIZER_STEP) and not b for n, b in zip(names, begins, strict=True)]
    of_device = table["device"].to_numpy() == device
    found: Ints = np.sort(table["time_ns"].to_numpy()[np.array(is_end, np.bool_) & of_device])
    return found


def _build_allocations(
    history: DeviceHistory, stored: StoredRun, meanings: list[Meaning], step_ends: Ints
) -> pl.DataFrame:
    lives, times = history.lives, history.time_ns
    own = stored.table("allocator_contexts").slice(int(history.rows[0]), len(times))
    stack = history.stack[lives.begin]
    is_seed = history.events.is_seed[lives.begin]
    named = _read_words(own["category"], read_category)[lives.begin]
    blocks = Allocations(lives.begin, lives.end, is_seed, stack, lives.requested_bytes, named)
    inferred = infer(blocks, meanings)
    ended = lives.end >= 0
    words = {
        "phase": _gather([p.value for p in PHASES], inferred.phase),
        "layer": _name_layers(own["metadata"], lives.begin, meanings, stack),
        "op": _gather([m.op for m in meanings], stack),
        "category": _gather([c.value for c in CATEGORIES], inferred.category),
    }
    return pl.DataFrame(
        {
            "allocation_id": np.arange(len(stack)),
            "device": pl.repeat(history.device, len(stack), eager=True),
            "address": history.events.address[lives.begin],
            "size_bytes": lives.size_bytes,
            "requested_bytes": lives.requested_bytes,
            "start_ns": times[lives.begin],
            "end_ns": pl.Series(times[lives.end]).set(pl.Series(~ended), None),
            "step": _number_steps(inferred, is_seed, times[lives.begin], step_ends),
            **words,
            "role": pl.repeat(_ROLE, len(stack), eager=True),
            "shape": pl.repeat(None, len(stack), dtype=pl.List(pl.Int64), eager=True),
            "dtype": pl.repeat(None, len(stack), dtype=pl.String, eager=True),
            "saved": inferred.saved,
            "exact": inferred.exact,
            "start": lives.begin,
            "end": np.where(ended, lives.end, len(times)),
        }
    )


_ROLE = "value"
"""`allocations.role` where nothing says that it is a gradient or belongs to a module."""


def _gather(words: list[Any], positions: Ints) -> pl.Series:
    index = pl.Series(positions.astype(np.int64))
    return pl.Series(words, dtype=pl.String).gather(index.set(index < 0, None))


def _read_words(column: pa.ChunkedArray, read: Callable[[str | None], int]) -> Ints:
    """Return a number per row, from a reading of each distinct text."""
    encoded = _join(column).dictionary_encode()
    numbers = np.array([read(word) for word in encoded.dictionary.to_pylist()] + [-1], np.int64)
    result: Ints = numbers[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return result


def _join(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _name_layers(
    metadata: pa.ChunkedArray, begin: Ints, meanings: list[Meaning], stack: Ints
) -> pl.Series:
    """Return where blocks belong: what the program tagged them with, else the line that asked."""
    places = [meaning.place for meaning in meanings]
    words = list(dict.fromkeys(w for w in _join(metadata).unique().to_pylist() if w))
    position = {word: number for number, word in enumerate(words)}
    tag = _read_words(metadata, lambda word: position.get(word or "", -1))[begin]
    lines = np.where(stack >= 0, stack + len(words), len(words) + len(places))
    return _gather([*words, *places, ""], np.where(tag >= 0, tag, lines))


def _number_steps(inferred: Inferred, is_seed: Bools, begin_ns: Ints, step_ends: Ints) -> Ints:
    """Return the step of each block: one ends where a forward follows upon an optimizer."""
    phase = np.where(is_seed, PHASE[Phase.OUTSIDE], inferred.phase)
    order = np.arange(len(phase), dtype=np.int64)
    optimized = np.where(phase == PHASE[Phase.OPTIMIZER], order, -1)
    # An optimizer that allocates nothing shows in its annotation only.
    after = np.searchsorted(begin_ns, step_ends, "right")
    after = after[after < len(phase)]
    optimized[after] = np.maximum(optimized[after], after - 1)
    optimized = np.maximum.accumulate(optimized)
    forwards = phase == PHASE[Phase.FORWARD]
    newest_forward = np.maximum.accumulate(np.where(forwards, order, -1))
    before = np.append(-1, newest_forward[:-1])
    begins = forwards & (optimized > before) & (before >= 0)
    return np.cumsum(begins)


def describe_imported_steps(attribution: ImportedAttribution, device: str) -> pl.DataFrame:
    """Return a row per step of an imported run, in the columns of `describe_steps`.

    What only ops tell (lengths of data, seconds per phase) is null; ``ops`` is 0.

    Args:
        attribution: What the snapshot means.
        device: One that occurs in its allocations.
    """
    replayed = replay(attribution.allocations, device)
    frame = replayed.frame.with_columns(live=pl.Series(replayed.live_bytes))
    seconds = {f"{phase.value}_seconds": pl.lit(None, pl.Float64) for phase in PHASES}
    highest = pl.col("live").arg_max()
    return (
        frame.group_by("step", maintain_order=True)
        .agg(
            begin_ns=pl.col("start_ns").min(),
            end_ns=pl.col("start_ns").max(),
            seq_len=pl.lit(None, pl.Int64),
            batch=pl.lit(None, pl.Int64),
            ops=pl.lit(0, pl.Int64),
            peak_bytes=pl.col("live").max(),
            peak_phase=pl.col("phase").cast(pl.String).get(highest),
            first=pl.col("start").first(),
            is_detailed=pl.lit(True),
            **seconds,
        )
        .with_columns(
            wall_seconds=(pl.col("end_ns") - pl.col("begin_ns")) / 1e9,
            reserved_bytes=pl.col("first").map_batches(
                lambda first: _find_reserved(attribution, device, first.to_numpy()),
                return_dtype=pl.Int64,
            ),
        )
        .select(
            *("step", "begin_ns", "end_ns", "wall_seconds", "seq_len", "batch", "ops"),
            *("peak_bytes", "peak_phase", "reserved_bytes", "is_detailed", *seconds),
        )
    )


def _find_reserved(attribution: ImportedAttribution, device: str, first: Ints) -> pl.Series:
    """Return per step the most bytes reserved from its first event up to the next step's."""
    after = next(h.reserved_bytes() for h in attribution.histories if h.device == device)
    ends = np.append(first[1:], len(after))
    # Segments that hold nothing yet are told of before the block for which they were taken.
    spans = zip(np.maximum(first - 1, 0).tolist(), ends.tolist(), strict=True)
    most = [int(after[begin:end].max(initial=0)) for begin, end in spans]
    return pl.Series(most if any(most) else [None] * len(most), dtype=pl.Int64)


def _to_blocks(allocations: pl.DataFrame) -> Blocks:
    """Return the blocks in the form that rules about ops expect, none of which has one."""
    nothing = np.full(len(allocations), -1, np.int64)
    column = {
        name: allocations[name].to_numpy()
        for name in ("address", "size_bytes", "requested_bytes", "start", "end", "start_ns")
    }
    devices = allocations["device"].to_physical().to_numpy().astype(np.int64)
    return Blocks(
        storage=np.full(len(allocations), NO_STORAGE, np.int64),
        device=devices,
        end_ns=allocations["end_ns"].fill_null(-1).to_numpy(),
        op=nothing,
        at_op=np.zeros(len(allocations), np.int64),
        signature=nothing,
        is_found=np.zeros(len(allocations), np.bool_),
        is_freed=allocations["end_ns"].is_not_null().to_numpy(),
        **column,
    )
