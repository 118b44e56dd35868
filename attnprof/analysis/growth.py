"""Growth points: the most bytes of each category in each phase, of a run or of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from attnprof.analysis.fits import TOTAL
from attnprof.analysis.peak import choose_device
from attnprof.vocabulary import Category, Phase

Ints = np.ndarray

POINT_SCHEMA = {
    "seq_len": pl.Int64,
    "source": pl.String,
    "status": pl.String,
    "phase": pl.String,
    "category": pl.String,
    "layer": pl.String,
    "peak_bytes": pl.Int64,
}
"""Columns of growth points. Category ``"total"`` is all live bytes, layer ``""`` all layers."""

_LASTING = [
    category.value
    for category in (
        Category.PARAMETERS,
        Category.BUFFERS,
        Category.GRADIENTS,
        Category.OPTIMIZER_STATE,
    )
]
_SETTLED_SHARE = 0.99
"""A step begins settled if it holds this share of the most lasting bytes of any step."""
_CELLS_AT_ONCE = 1 << 20


def find_phase_peaks(allocations: pl.DataFrame, *, device: str | None = None) -> pl.DataFrame:
    """Return the most bytes of each category (and layer) live at an instant of each phase.

    Columns: phase, category, layer, peak_bytes; only where there are any. Instants are
    allocations, and their phase is that of what made them: bytes that are merely carried through
    a phase count in it too.

    Args:
        allocations: Attributed blocks with ``start`` and ``end`` (order of events).
        device: The device; chosen as for a peak without it.
    """
    frame = _take_device(allocations, device)
    every_step = dict.fromkeys(frame["step"].unique().to_list(), 0)
    return _find_peaks(frame, _find_spans(frame, every_step)).drop("seq_len")


def find_step_peaks(
    allocations: pl.DataFrame, steps: pl.DataFrame, *, device: str | None = None
) -> pl.DataFrame:
    """Return the most bytes of each category (and layer) per phase and sequence length of steps.

    Only steps that can be compared count: of one batch size, the one seen with most lengths, and
    begun with all parameters, gradients and optimizer state there will be, which the first steps
    of a training lack. Of several steps of one length the highest counts.

    Columns: seq_len, phase, category, layer, peak_bytes; only where there are any.

    Args:
        allocations: Attributed blocks with ``start`` and ``end`` (order of events).
        steps: The run's steps: columns step, seq_len, batch.
        device: The device; chosen as for a peak without it.
    """
    frame = _take_device(allocations, device)
    settled = _find_settled_steps(frame)
    known = steps.filter(pl.col("seq_len").is_not_null() & pl.col("step").is_in(settled))
    lengths = known.group_by("batch").agg(pl.col("seq_len").n_unique())
    best = lengths.sort("seq_len", "batch", descending=True)["batch"].head(1).to_list()
    chosen = known.filter(pl.col("batch").is_in(best)).select("step", "seq_len")
    return _find_peaks(frame, _find_spans(frame, dict(chosen.iter_rows())))


def _take_device(allocations: pl.DataFrame, device: str | None) -> pl.DataFrame:
    """Return the blocks of one device in the order of their allocation."""
    device = choose_device(allocations, device)
    return (
        allocations.filter(pl.col("device").cast(pl.String) == device)
        .sort("start", "allocation_id")
        .select(
            pl.col("phase", "category", "layer").cast(pl.String),
            pl.col("step", "size_bytes", "start", "end").cast(pl.Int64),
        )
    )


def _find_settled_steps(frame: pl.DataFrame) -> list[int]:
    """Return the steps whose work begins with all that lasts from step to step."""
    work = frame.filter(pl.col("phase") != Phase.OUTSIDE.value)
    begins = work.group_by("step").agg(pl.col("start").min()).sort("step")
    lasting = frame.filter(pl.col("category").is_in(_LASTING))
    at = begins["start"].to_numpy()
    held = np.zeros(len(at), np.int64)
    for event, sign in (("start", 1), ("end", -1)):
        by_event = lasting.sort(event)
        sums = np.concatenate([[0], by_event["size_bytes"].cum_sum().to_numpy()])
        held += sign * sums[np.searchsorted(by_event[event].to_numpy(), at, "right")]
    full = _SETTLED_SHARE * held.max(initial=0)
    return [s for s, size in zip(begins["step"].to_list(), held, strict=True) if size >= full]


@dataclass(frozen=True, slots=True)
class _Spans:
    """Stretches of instants that belong together."""

    first: Ints
    """Per span, the position of its first instant."""
    group: Ints
    """Per span, its group, or -1 if it does not count."""
    groups: list[tuple[int, str]]
    """Per group, its length and phase."""


def _find_spans(frame: pl.DataFrame, length_of_step: Mapping[int, int]) -> _Spans:
    """Cut the instants wherever the step's length or the phase changes."""
    lengths = frame["step"].replace_strict(
        list(length_of_step), list(length_of_step.values()), default=-1, return_dtype=pl.Int64
    )
    numbered = frame.select("phase", length=lengths).with_row_index("position")
    changed = (pl.col("phase") != pl.col("phase").shift()) | (
        pl.col("length") != pl.col("length").shift()
    )
    spans = numbered.filter(changed.fill_null(True))
    groups = spans.select("length", "phase").filter(pl.col("length") >= 0).unique().sort("length")
    number = {group: i for i, group in enumerate(groups.iter_rows())}
    of_span = [number.get(pair, -1) for pair in spans.select("length", "phase").iter_rows()]
    return _Spans(spans["position"].to_numpy(), np.array(of_span, np.int64), list(number))


def _find_peaks(frame: pl.DataFrame, spans: _Spans) -> pl.DataFrame:
    """Return the peaks of all bytes, categories, layers, and categories in layers, per group."""
    every_layer, every_category = pl.lit("").alias("layer"), pl.lit(TOTAL).alias("category")
    in_a_layer = pl.col("layer") != ""
    whole = [frame.with_columns(every_layer, every_category), frame.with_columns(every_layer)]
    single = [frame.with_columns(every_category), frame]
    parts = [_find_key_peaks(keyed, spans) for keyed in whole]
    parts += [_find_key_peaks(keyed, spans).filter(in_a_layer) for keyed in single]
    return pl.concat(parts)


def _find_key_peaks(frame: pl.DataFrame, spans: _Spans) -> pl.DataFrame:
    """Return the most live bytes of each pair of category and layer in each group of spans.

    They are highest just after an allocation of their own, or, if they only shrink, as a span
    begins.
    """
    keys = frame.select("category", "layer").unique(maintain_order=True).with_row_index("key")
    joined = frame.join(keys, on=["category", "layer"], maintain_order="left")
    key = joined["key"].cast(pl.Int64).to_numpy()
    live = _LiveBytes(frame, key)
    peaks = np.zeros((len(keys), len(spans.groups) + 1), np.int64)  # the last group is nobody's
    own = np.arange(len(frame))
    span = np.searchsorted(spans.first, own, "right") - 1
    np.maximum.at(peaks, (key, spans.group[span]), live.at(key, own))
    some = max(1, _CELLS_AT_ONCE // max(1, len(spans.first)))
    for begin in range(0, len(keys), some):
        chunk = np.arange(begin, min(begin + some, len(keys)))[:, None]
        carried = live.at(chunk, spans.first[None, :])
        np.maximum.at(peaks, (chunk, spans.group[None, :]), carried)
    at_key, at_group = np.nonzero(peaks[:, :-1])
    groups = pl.DataFrame(
        spans.groups, schema={"seq_len": pl.Int64, "phase": pl.String}, orient="row"
    )
    return pl.concat(
        [
            groups[at_group],
            keys.drop("key")[at_key],
            pl.DataFrame({"peak_bytes": peaks[at_key, at_group]}),
        ],
        how="horizontal",
    )


class _LiveBytes:
    """Live bytes per key at any instant: a position in the order of allocations."""

    def __init__(self, frame: pl.DataFrame, key: Ints) -> None:
        """Take blocks in the order of their allocation and the key of each."""
        start, end, size = (frame[name].to_numpy() for name in ("start", "end", "size_bytes"))
        gone = np.searchsorted(start, end, "left")  # the first instant without the block
        self._span = len(start) + 1
        # Sorted by key and then instant, sums over all lower keys cancel: every block of theirs
        # has come and, counted at the latest after the last instant, gone.
        self._born, self._born_bytes = _sum_up(key * self._span + np.arange(len(start)), size)
        self._gone, self._gone_bytes = _sum_up(key * self._span + gone, size)

    def at(self, key: Ints, instant: Ints) -> Ints:
        """Return the bytes of a key that are live at an instant."""
        at = key * self._span + instant
        born = self._born_bytes[np.searchsorted(self._born, at, "right")]
        return np.asarray(born - self._gone_bytes[np.searchsorted(self._gone, at, "right")])


def _sum_up(at: Ints, size: Ints) -> tuple[Ints, Ints]:
    order = np.argsort(at, kind="stable")
    return at[order], np.concatenate([[0], np.cumsum(size[order])])
