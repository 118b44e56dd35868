"""Peaks and timelines on hand-made tables, against counting by hand."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis.peak import find_peak
from attnprof.analysis.timeline import sample_timeline
from attnprof.vocabulary import Category

CATEGORIES = [c.value for c in (Category.SOFTMAX, Category.PARAMETERS, Category.TEMPORARIES)]


def make_allocations(rows: list[tuple[int, int | None, int]]) -> pl.DataFrame:
    """Return blocks from (start, end or None while live, size), in numbers of events."""
    last = 10**6
    return pl.DataFrame(
        {
            "allocation_id": range(len(rows)),
            "device": ["cpu"] * len(rows),
            "size_bytes": [size for _, _, size in rows],
            "start_ns": [start for start, _, _ in rows],
            "end_ns": [end for _, end, _ in rows],
            "step": [0] * len(rows),
            "phase": ["forward"] * len(rows),
            "layer": [f"h.{i % 3}" for i in range(len(rows))],
            "op": ["aten::mm"] * len(rows),
            "category": [CATEGORIES[i % 3] for i in range(len(rows))],
            "start": [start for start, _, _ in rows],
            "end": [last if end is None else end for _, end, _ in rows],
        },
        schema_overrides={"end_ns": pl.Int64, "size_bytes": pl.Int64, "device": pl.String},
    )


@st.composite
def allocation_tables(draw: st.DrawFn) -> pl.DataFrame:
    count = draw(st.integers(1, 40))
    events = draw(st.permutations(range(2 * count)))
    rows = []
    for i in range(count):
        start, end = sorted(events[2 * i : 2 * i + 2])
        rows.append((start, end if draw(st.booleans()) else None, draw(st.integers(0, 1000))))
    return make_allocations(sorted(rows))


def count_live(allocations: pl.DataFrame, event: int) -> int:
    held = allocations.filter((pl.col("start") <= event) & (pl.col("end") > event))
    return int(held["size_bytes"].sum())


def test_peak_of_a_phase_that_a_step_lacks_names_those_it_has() -> None:
    blocks = make_allocations([(0, 1, 8), (2, 3, 8)]).with_columns(
        step=pl.Series([0, 1]), phase=pl.Series(["prefill", "decode"])
    )
    with pytest.raises(ValueError, match=r"step 0 has no phase 'decode'; it has: prefill$"):
        find_peak(blocks, step=0, phase="decode")


@given(allocation_tables())
def test_peak_is_the_highest_instant(allocations: pl.DataFrame) -> None:
    peak = find_peak(allocations)
    assert peak.total_bytes == max(count_live(allocations, e) for e in allocations["start"])


@given(allocation_tables())
def test_peak_categories_sum_to_the_total(allocations: pl.DataFrame) -> None:
    peak = find_peak(allocations)
    assert sum(peak.by_category().values()) == peak.total_bytes
    assert peak.by_layer()["size_bytes"].sum() == peak.total_bytes
    assert peak.allocations["size_bytes"].sum() == peak.total_bytes


@given(allocation_tables(), st.data())
def test_peak_never_rises_when_rows_are_dropped(
    allocations: pl.DataFrame, data: st.DataObject
) -> None:
    keep = data.draw(st.lists(st.booleans(), min_size=len(allocations), max_size=len(allocations)))
    assert find_peak(allocations.filter(keep)).total_bytes <= find_peak(allocations).total_bytes


@given(allocation_tables(), st.integers(4, 30))
def test_timeline_keeps_the_peak_and_sums(allocations: pl.DataFrame, max_points: int) -> None:
    timeline = sample_timeline(allocations, max_points=max_points)
    assert len(timeline) <= max_points
    assert timeline["total_bytes"].max() == find_peak(allocations).total_bytes
    categories = timeline.drop("time_ns", "total_bytes")
    assert np.array_equal(categories.sum_horizontal(), timeline["total_bytes"])


def test_a_block_freed_before_another_is_made_does_not_overlap_it() -> None:
    allocations = make_allocations([(0, 1, 100), (2, None, 60)])
    assert find_peak(allocations).total_bytes == 100


def test_a_block_freed_as_an_op_returns_overlaps_its_result() -> None:
    allocations = make_allocations([(0, 2, 100), (1, None, 60)])
    assert find_peak(allocations).total_bytes == 160


def test_peak_of_nothing_is_zero() -> None:
    peak = find_peak(make_allocations([]))
    assert (peak.total_bytes, peak.by_category()) == (0, {})
    assert find_peak(make_allocations([]), step=peak.step).total_bytes == 0
    with pytest.raises(ValueError, match="the run has no step 1; it has: 0"):
        find_peak(make_allocations([]), step=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 7}, r"the run has no step 7; it has: 0"),
        ({"phase": "lunch"}, r"the run has no phase 'lunch'; it has: forward"),
        ({"device": "cuda:0"}, r"the run has no device 'cuda:0'; it has: cpu"),
    ],
)
def test_peak_refuses_what_does_not_occur(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_peak(make_allocations([(0, None, 1)]), **arguments)  # type: ignore[arg-type]  # on purpose


def test_timeline_refuses_too_few_points() -> None:
    with pytest.raises(ValueError, match="max_points must be at least 4, got 3"):
        sample_timeline(make_allocations([(0, None, 1)]), max_points=3)
