"""Growth points of hand-made tables, against counting by hand."""

from itertools import product

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis.growth import find_phase_peaks, find_step_peaks

CATEGORIES = ("softmax", "parameters")
LAYERS = ("", "h.0", "h.1")
PHASES = ("forward", "backward")

Row = tuple[int, int, int, str, str, str, int]


def make_table(rows: list[Row]) -> pl.DataFrame:
    """Return blocks from (start, end, size, category, layer, phase, step)."""
    names = ("start", "end", "size_bytes", "category", "layer", "phase", "step")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return pl.DataFrame(
        {"allocation_id": range(len(rows)), "device": ["cpu"] * len(rows), **columns},
        schema_overrides={"start": pl.Int64, "end": pl.Int64, "size_bytes": pl.Int64},
    )


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    count = draw(st.integers(1, 25))
    events = draw(st.permutations(range(2 * count)))
    rows = []
    for i in range(count):
        start, end = sorted(events[2 * i : 2 * i + 2])
        rows.append(
            (
                start,
                end if draw(st.booleans()) else 2 * count,
                draw(st.integers(0, 1000)),
                draw(st.sampled_from(CATEGORIES)),
                draw(st.sampled_from(LAYERS)),
                draw(st.sampled_from(PHASES)),
                0,
            )
        )
    return make_table(sorted(rows))


def count_peak(table: pl.DataFrame, phase: str, category: str, layer: str) -> int:
    """Count live bytes at each allocation of a phase, one by one."""
    own = table.filter(
        (pl.lit(category == "total") | (pl.col("category") == category))
        & (pl.lit(layer == "") | (pl.col("layer") == layer))
    )
    instants = table.filter(pl.col("phase") == phase)["start"]
    return max(
        (
            int(own.filter(pl.col("start") <= at, pl.col("end") > at)["size_bytes"].sum())
            for at in instants
        ),
        default=0,
    )


@given(tables())
def test_phase_peaks_are_the_highest_instants(table: pl.DataFrame) -> None:
    found = {row[:3]: row[3] for row in find_phase_peaks(table).iter_rows()}
    for key in product(PHASES, ("total", *CATEGORIES), LAYERS):
        assert found.pop(key, 0) == count_peak(table, *key)
    assert not found


def test_phase_peaks_count_what_is_carried_through() -> None:
    table = make_table(
        [
            (0, 9, 100, "softmax", "h.0", "forward", 0),
            (1, 3, 7, "parameters", "h.0", "backward", 0),
        ]
    )
    peaks = find_phase_peaks(table).filter(category="softmax", layer="h.0")
    assert dict(peaks.select("phase", "peak_bytes").iter_rows()) == {
        "forward": 100,
        "backward": 100,
    }


def test_phase_peaks_free_before_they_allocate() -> None:
    table = make_table(
        [
            (0, 5, 100, "softmax", "h.0", "forward", 0),
            (5, 9, 70, "softmax", "h.0", "forward", 0),
        ]
    )
    assert find_phase_peaks(table).filter(category="total", layer="")["peak_bytes"].item() == 100


def make_loop(steps: list[tuple[int, int]], *, parameters: int = 1000) -> pl.DataFrame:
    """Return blocks of steps of (length, batch): parameters, n² of softmax, Adam from step 1 on."""
    rows: list[Row] = [(0, 10**6, parameters, "parameters", "h.0", "outside", 0)]
    for step, (n, batch) in enumerate(steps):
        at = 10 * step
        rows.append((at + 1, at + 5, 4 * batch * n * n, "softmax", "h.0", "forward", step))
        rows.append((at + 2, at + 4, 8, "temporaries", "h.0", "backward", step))
        if step == 0:
            rows.append((9, 10**6, 2000, "optimizer_state", "h.0", "optimizer", 0))
    return make_table(rows)


def list_steps(steps: list[tuple[int, int]]) -> pl.DataFrame:
    return pl.DataFrame(
        [(i, n, batch) for i, (n, batch) in enumerate(steps)],
        schema={"step": pl.Int64, "seq_len": pl.Int64, "batch": pl.Int64},
        orient="row",
    )


def test_step_peaks_give_a_point_per_length() -> None:
    steps = [(8, 2), (16, 2), (32, 2), (16, 2)]
    peaks = find_step_peaks(make_loop(steps), list_steps(steps))
    softmax = peaks.filter(category="softmax", layer="", phase="forward")
    assert dict(softmax.select("seq_len", "peak_bytes").iter_rows()) == {
        16: 4 * 2 * 16 * 16,
        32: 4 * 2 * 32 * 32,
    }


def test_step_peaks_leave_out_steps_without_optimizer_state() -> None:
    steps = [(64, 1), (8, 1), (16, 1)]
    total = find_step_peaks(make_loop(steps), list_steps(steps)).filter(
        category="total", layer="", phase="forward"
    )
    assert dict(total.select("seq_len", "peak_bytes").iter_rows()) == {
        8: 1000 + 2000 + 4 * 8 * 8,
        16: 1000 + 2000 + 4 * 16 * 16,
    }


def test_step_peaks_compare_one_batch_size() -> None:
    steps = [(8, 1), (8, 4), (16, 2), (32, 2), (64, 2), (64, 8)]
    peaks = find_step_peaks(make_loop(steps), list_steps(steps))
    assert sorted(peaks["seq_len"].unique()) == [16, 32, 64]
    assert peaks.filter(category="softmax", seq_len=64)["peak_bytes"].max() == 4 * 2 * 64 * 64


@pytest.mark.parametrize("unknown", [[], [(None, None)]])
def test_step_peaks_without_lengths_are_empty(unknown: list[tuple[int, int]]) -> None:
    assert find_step_peaks(make_loop([(8, 1)]), list_steps(unknown)).is_empty()
