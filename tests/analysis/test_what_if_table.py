"""Rewriting and replaying hand-made tables, against counting by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis.what_if.scene import list_ranges
from attnprof.analysis.what_if.table import Table, follow_links, round_up
from attnprof.vocabulary import Category, Phase

Row = tuple[int, int, int]
"""Start, end and size of a block; its place is its storage."""

SPAN = 1000


def make_table(rows: list[Row]) -> Table:
    """Return a table of blocks that live from event to event."""
    numbers = np.arange(len(rows))
    start, end, size = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    return Table(
        device="cpu",
        span=SPAN,
        block=numbers,
        storage=numbers,
        size_bytes=size,
        start=start * SPAN,
        end=end * SPAN,
        category=np.zeros(len(rows), np.int64),
        phase=np.zeros(len(rows), np.int64),
    )


def find_peak(table: Table) -> int:
    """Return the peak of a table's replay."""
    return int(table.replay().live_bytes.max(initial=0))


def count_peak(table: Table) -> int:
    """Return the peak, counted at every beginning of a block."""
    live = [
        table.size_bytes[(table.start <= at) & (table.end > at)].sum()
        for at in table.start.tolist()
    ]
    return int(max(live, default=0))


@st.composite
def tables(draw: st.DrawFn, *, most: int = 25) -> Table:
    count = draw(st.integers(1, most))
    events = draw(st.permutations(range(2 * count)))
    rows = []
    for i in range(count):
        start, end = sorted(events[2 * i : 2 * i + 2])
        rows.append((start, end, draw(st.integers(0, 1000))))
    return make_table(sorted(rows))


def draw_mask(data: st.DataObject, table: Table) -> np.ndarray:
    count = len(table)
    return np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_)


@given(tables())
def test_replay_finds_the_highest_instant(table: Table) -> None:
    assert find_peak(table) == count_peak(table)


@given(tables())
def test_dropping_nothing_changes_nothing(table: Table) -> None:
    nothing = np.zeros(len(table), np.bool_)
    same = table.drop(nothing).elide({}).resize(nothing, table.size_bytes * 2).add(table.take([]))
    assert np.array_equal(same.replay().live_bytes, table.replay().live_bytes)


@given(tables(), st.data())
def test_peak_never_rises_when_rows_are_dropped(table: Table, data: st.DataObject) -> None:
    assert find_peak(table.drop(draw_mask(data, table))) <= find_peak(table)


@given(tables(), st.data())
def test_peak_never_rises_when_rows_shrink_or_end_earlier(
    table: Table, data: st.DataObject
) -> None:
    smaller = table.resize(draw_mask(data, table), table.size_bytes // 2)
    assert find_peak(smaller) <= find_peak(table)
    end = np.array([data.draw(st.integers(0, 60)) for _ in range(len(table))]) * SPAN
    shorter = smaller.end_by(draw_mask(data, table), end)
    assert find_peak(shorter) <= find_peak(smaller)
    assert (shorter.end > shorter.start).all()


@given(tables(), st.data())
def test_peak_never_falls_when_rows_live_longer(table: Table, data: st.DataObject) -> None:
    end = np.array([data.draw(st.integers(0, 60)) for _ in range(len(table))]) * SPAN
    longer = table.hold_until(draw_mask(data, table), end)
    assert find_peak(longer) >= find_peak(table)
    assert (longer.end >= table.end).all()


@given(tables(), st.data())
def test_peak_never_rises_when_copies_of_the_same_size_are_elided(
    table: Table, data: st.DataObject
) -> None:
    """A copy is made while its source lives, so one block in place of both needs no more."""
    table = replace(table, size_bytes=np.full(len(table), 8))
    links = {}
    for copy in range(1, len(table)):
        lives = [s for s in range(copy) if table.start[copy] < table.end[s]]
        source = data.draw(st.sampled_from([None, *lives]))
        if source is not None:
            links[copy] = source
    elided = table.elide(links)
    assert find_peak(elided) == count_peak(elided) <= find_peak(table)
    assert len(elided) == len(table) - len(links)


def test_elided_copies_leave_the_source_until_all_are_done_with() -> None:
    table = make_table([(0, 2, 100), (1, 5, 40), (3, 9, 40)]).elide({1: 0, 2: 1})
    assert table.storage.tolist() == [0]
    assert table.size_bytes.tolist() == [100]
    assert table.end.tolist() == [9 * SPAN]


def test_copies_of_what_is_not_there_stay() -> None:
    table = make_table([(0, 2, 100), (1, 5, 40)])
    without = table.drop(np.array([True, False])).elide({1: 0})
    assert without.storage.tolist() == [1]


def test_what_ends_before_it_begins_is_gone() -> None:
    table = make_table([(3, 9, 100)]).end_by(np.array([True]), np.array([2 * SPAN]))
    assert len(table) == 0


def test_places_before_an_event_come_after_the_event_before_it() -> None:
    table = make_table([(0, 1, 1)])
    places = table.before(np.array([7, 7, 7]), np.array([0, 1, SPAN - 2]))
    assert (places > 6 * SPAN).all()
    assert (places < 7 * SPAN).all()
    assert (np.diff(places) > 0).all()


def test_inserted_blocks_meet_those_that_live_across() -> None:
    table = make_table([(0, 4, 100), (5, 6, 30)])
    inserted = table.take([1]).move(
        table.before(np.array([2]), np.array([0])), np.array([2 * SPAN])
    )
    assert find_peak(table.add(inserted)) == 130


def test_relabelled_blocks_keep_everything_else() -> None:
    table = make_table([(0, 4, 100), (5, 6, 30)])
    which = np.array([False, True])
    other = table.relabel(which, category=Category.SOFTMAX, phase=Phase.RECOMPUTE)
    assert other.is_of(Category.SOFTMAX).tolist() == other.is_in(Phase.RECOMPUTE).tolist()
    assert other.is_of(Category.SOFTMAX).tolist() == [False, True]
    assert np.array_equal(other.end, table.end)


def test_a_gpu_takes_multiples_of_512_bytes() -> None:
    sizes = np.array([0, 1, 512, 513])
    assert round_up(sizes, "cuda:0").tolist() == [0, 512, 512, 1024]
    assert round_up(sizes, "cpu").tolist() == [0, 1, 512, 513]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8))
def test_ranges_are_listed_as_loops_would(ranges: list[tuple[int, int]]) -> None:
    begin, end = (np.array([r[i] for r in ranges], np.int64) for i in range(2))
    which, items = list_ranges(begin, end)
    expected = [(i, j) for i, (b, e) in enumerate(ranges) for j in range(b, e)]
    assert list(zip(which.tolist(), items.tolist(), strict=True)) == expected


def walk_to_end(links: dict[int, int], copy: int) -> int:
    """Return the end of one chain, the long way; in a ring it is before the first one again."""
    passed = [copy]
    while passed[-1] in links and links[passed[-1]] not in passed:
        passed.append(links[passed[-1]])
    return passed[-1]


@given(st.dictionaries(st.integers(0, 9), st.integers(0, 9)))
def test_links_end_where_a_walk_of_each_chain_does(links: dict[int, int]) -> None:
    copies, sources = follow_links(links)
    walked = {copy: walk_to_end(links, copy) for copy in links}
    expected = [(copy, end) for copy, end in walked.items() if copy != end]
    assert list(zip(copies.tolist(), sources.tolist(), strict=True)) == expected


class CountedLinks(dict[int, int]):
    """Links that count how often one of them is followed."""

    followed = 0

    def __getitem__(self, storage: int) -> int:
        self.followed += 1
        return super().__getitem__(storage)

    def get(self, storage: int, default: Any = None) -> Any:
        """Count this way of asking too."""
        self.followed += storage in self
        return super().get(storage, default)


@pytest.mark.parametrize("is_newest_first", [False, True])
def test_a_long_chain_is_followed_once(is_newest_first: bool) -> None:
    copies = range(1, 1001)
    links = CountedLinks((n, n - 1) for n in (reversed(copies) if is_newest_first else copies))
    assert follow_links(links)[1].tolist() == [0] * 1000
    assert links.followed == 1000  # and not half a million times


@pytest.mark.parametrize(
    ("links", "ends"), [({1: 2, 2: 3}, {1: 3, 2: 3}), ({1: 2, 2: 1}, {1: 2, 2: 1}), ({}, {})]
)
def test_links_are_followed_to_their_end(links: dict[int, int], ends: dict[int, int]) -> None:
    copies, sources = follow_links(links)
    assert dict(zip(copies.tolist(), sources.tolist(), strict=True)) == ends
