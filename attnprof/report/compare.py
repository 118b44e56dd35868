"""Two runs side by side, and what a run would have needed with fused attention."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from attnprof.analysis.peak import Peak, find_peak
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts
from attnprof.palette import stack_order
from attnprof.report.verdict import QUADRATIC
from attnprof.run import Run
from attnprof.vocabulary import AttentionKind, Category

_COPIES = frozenset({"clone", "_to_copy", "copy"})
"""Ops whose result is nothing but the values of their operand."""
_LSE_BYTES = 4
"""Fused kernels keep the log-sum-exp of each query row in float32, whatever Q is:
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/attention.cpp"""


@dataclass(frozen=True, slots=True)
class Change:
    """One category at the peaks of two runs."""

    category: str
    first_bytes: int
    second_bytes: int

    @property
    def difference_bytes(self) -> int:
        """What the second run holds more; negative where it holds less."""
        return self.second_bytes - self.first_bytes


def compare_peaks(first: Peak, second: Peak) -> list[Change]:
    """Return a row per category of either peak, the largest difference first.

    The differences sum to the difference of the peaks, for the categories sum to each.
    """
    mine, theirs = first.by_category(), second.by_category()
    changes = [Change(name, mine.get(name, 0), theirs.get(name, 0)) for name in {**mine, **theirs}]
    return sorted(changes, key=lambda c: (-abs(c.difference_bytes), stack_order(c.category)))


def predict_fused(run: Run, *, device: str | None = None) -> Peak:
    """Return the peak ``run`` would have had with fused attention, found by replaying it.

    The run's own allocations are rewritten and replayed, so the peak may move:

    - scores, softmax results and masks of materialised layers never exist;
    - in place of a softmax result that backward needs, its log-sum-exp is kept: B·H·Tq floats;
    - Q, K and V are read where they lie: copies made only to multiply them never exist, and what
      they were copied from is kept for as long as they were.

    Known limitations:
        The kernel's own workspace is not known to a run that never called it; it is not added.
        Dropout inside attention, and a bias that needs a gradient, may rule a fused kernel out.

    Args:
        run: A run with materialised attention.
        device: As for `Run.peak`.

    Raises:
        ValueError: The run has no such device.
    """
    attribution = run.attribution
    calls = [c for c in attribution.calls if c.kind is AttentionKind.MATERIALISED]
    storage = pl.Series("storage", attribution.blocks.storage)
    frame = attribution.allocations.with_columns(storage)
    frame = _drop_scores(frame, calls, attribution.facts)
    frame = _read_in_place(frame, calls, attribution.facts)
    return find_peak(frame.drop("storage"), device=device)


def _drop_scores(frame: pl.DataFrame, calls: list[AttentionCall], facts: Facts) -> pl.DataFrame:
    """Leave of all between QKᵀ and PV the log-sum-exp, where backward would need it."""
    log_sum_exp: dict[int, int] = {}
    for call in calls:
        results = [int(facts.storage[row]) for row in call.result_rows]
        size = _LSE_BYTES * call.batch * call.heads * call.q_len
        log_sum_exp |= dict.fromkeys(results, size)
    layers = list({call.layer for call in calls})
    goes = pl.col("category").cast(pl.String).is_in([c.value for c in QUADRATIC]) & (
        pl.col("layer").cast(pl.String).is_in(layers)
        | (pl.col("category").cast(pl.String) == Category.ATTENTION_MASK.value)
    )
    stays_small = pl.col("storage").is_in(list(log_sum_exp)) & pl.col("saved")
    small = pl.col("storage").replace_strict(log_sum_exp, default=0, return_dtype=pl.Int64)
    return frame.filter(~goes | stays_small).with_columns(
        pl.when(goes).then(small).otherwise("size_bytes").alias("size_bytes"),
        pl.when(goes)
        .then(pl.lit(Category.ATTENTION_IO.value))
        .otherwise(pl.col("category").cast(pl.String))
        .cast(pl.Categorical)
        .alias("category"),
    )


def _read_in_place(frame: pl.DataFrame, calls: list[AttentionCall], facts: Facts) -> pl.DataFrame:
    """Drop the copies of Q, K and V that products read, and keep what they were copied from."""
    sources = _find_copies(calls, facts)
    copies = frame.filter(pl.col("storage").is_in(list(sources)))
    kept_until: dict[int, int] = {}
    for copy, end in copies.select("storage", "end").iter_rows():
        source = sources[copy]
        kept_until[source] = max(end, kept_until.get(source, 0))
    longer = pl.col("storage").replace_strict(kept_until, default=0, return_dtype=pl.Int64)
    return frame.filter(~pl.col("storage").is_in(list(sources))).with_columns(
        pl.max_horizontal("end", longer).alias("end")
    )


def _find_copies(calls: list[AttentionCall], facts: Facts) -> dict[int, int]:
    """Return per storage that is a copy of Q, K or V for products only, what it was copied from.

    Repeated heads (an operand with stride 0) are more than a copy: they stay.
    """
    attention = {op for call in calls for op in call.ops}
    operands = {
        int(facts.storage[row])
        for call in calls
        for row in (*call.io_rows, *call.key_rows)
        if facts.is_input[row]
    }
    found = {}
    for storage in operands:
        op = int(facts.born_by[storage])
        if op < 0 or facts.short_names[facts.code[op]] not in _COPIES or not facts.n_in[op]:
            continue
        row = facts.rows_in(op)[0]
        if 0 not in facts.signature_of(row).stride:
            found[storage] = int(facts.storage[row])
    return {s: found[s] for s in found if _is_read_only_by(attention, s, facts)}


def _is_read_only_by(ops: set[int], storage: int, facts: Facts) -> bool:
    """Return whether nothing but ``ops``, views and backward reads a storage."""
    rows = np.flatnonzero(facts.is_input & (facts.storage == storage))
    for op in np.unique(facts.row_op[rows]).tolist():
        is_view = all(facts.storage[row] == storage for row in facts.rows_out(op))
        if not (op in ops or is_view or facts.is_backward[op]):
            return False
    return True
