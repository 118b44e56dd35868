"""The index against all events: nothing high or low is lost, and categories always sum."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof_dashboard.data import timeline_index
from attnprof_dashboard.data.timeline_index import (
    Changes,
    TimelineIndex,
    Window,
    map_column,
    write_index,
)

NAMES = ("softmax", "parameters", "unattributed")


def make_changes(rows: list[tuple[int, int, int, int]]) -> Changes:
    """Return changes from (steps in the order, nanoseconds since the last, bytes, category)."""
    table = np.array(rows, np.int64).reshape(-1, 4)
    return Changes(np.cumsum(table[:, 0]), np.cumsum(table[:, 1]), table[:, 2], table[:, 3])


rows = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 5), st.integers(-100, 100), st.integers(0, len(NAMES) - 1)
    ),
    max_size=120,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_index, "BLOCK", 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indices")


def open_index(folders: Path, changes: Changes) -> TimelineIndex:
    folder = folders / str(sum(1 for _ in folders.iterdir()))
    write_index(folder, changes, NAMES)
    return TimelineIndex(folder, NAMES)


def list_totals(changes: Changes) -> dict[int, tuple[int, int]]:
    """Return per place in the order of events its time and the bytes once all of it happened."""
    live, found = 0, {}
    for at, time_ns, change in zip(
        changes.position, changes.time_ns, changes.change_bytes, strict=True
    ):
        live += int(change)
        found[int(at)] = int(time_ns), live
    return found


@given(rows=rows, begin=st.integers(-5, 300), span=st.integers(0, 300), bins=st.integers(1, 40))
def test_window_keeps_every_extreme(
    folders: Path, rows: list[tuple[int, int, int, int]], begin: int, span: int, bins: int
) -> None:
    changes = make_changes(rows)
    index = open_index(folders, changes)
    window = index.window(begin, begin + span, bins)
    totals = list_totals(changes)
    inside = [size for time_ns, size in totals.values() if begin <= time_ns <= begin + span]
    before = [size for time_ns, size in totals.values() if time_ns < begin][-1:] or [0]
    known = inside + before
    assert window.total_bytes.max() == max(known)
    assert window.total_bytes.min() == min(known)


@given(rows=rows, begin=st.integers(0, 200), span=st.integers(1, 300), bins=st.integers(1, 40))
def test_every_bin_keeps_its_own_extremes(
    folders: Path, rows: list[tuple[int, int, int, int]], begin: int, span: int, bins: int
) -> None:
    changes = make_changes(rows)
    window = open_index(folders, changes).window(begin, begin + span, bins)
    edges = np.linspace(begin, begin + span, bins + 1).astype(np.int64)
    edges[-1] += 1
    for low, high in itertools.pairwise(edges):
        own = [size for t, size in list_totals(changes).values() if low <= t < high]
        shown = window.total_bytes[(window.time_ns >= low) & (window.time_ns < high)].tolist()
        if own:
            assert max(own) in shown
            assert min(own) in shown


@given(rows=rows, begin=st.integers(-5, 300), span=st.integers(0, 300))
def test_categories_sum_to_the_total_at_every_sample(
    folders: Path, rows: list[tuple[int, int, int, int]], begin: int, span: int
) -> None:
    window: Window = open_index(folders, make_changes(rows)).window(begin, begin + span, 7)
    assert (sum(window.by_category.values()) == window.total_bytes).all()


@given(rows=rows, begin=st.integers(0, 60), end=st.integers(0, 120))
def test_peak_is_the_first_of_the_highest_events(
    folders: Path, rows: list[tuple[int, int, int, int]], begin: int, end: int
) -> None:
    index = open_index(folders, make_changes(rows))
    end = min(end, len(index))
    totals = np.array(index.total_bytes[begin:end])
    expected = begin + int(totals.argmax()) if len(totals) else -1
    assert index.peak(begin, end) == expected


def test_index_of_nothing_answers_with_zero(folders: Path) -> None:
    window = open_index(folders, make_changes([])).window(0, 10)
    assert window.total_bytes.tolist() == [0, 0]
    assert window.time_ns.tolist() == [0, 10]


def test_what_happens_at_one_place_counts_together(folders: Path) -> None:
    # A storage that is resized: 100 bytes go and 160 come at the same place in the order.
    index = open_index(folders, make_changes([(1, 1, 100, 0), (1, 1, -100, 0), (0, 0, 160, 0)]))
    assert index.total_bytes.tolist() == [100, 160]


def test_columns_keep_no_file_open(tmp_path: Path) -> None:
    np.save(tmp_path / "column.npy", np.arange(5000))
    before = len(os.listdir("/proc/self/fd"))
    column = map_column(tmp_path / "column.npy")
    assert len(os.listdir("/proc/self/fd")) == before
    assert column.tolist() == list(range(5000))


def test_empty_column_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "column.npy", np.arange(0))
    assert map_column(tmp_path / "column.npy").tolist() == []
