"""Which events happened in private pools, from lists of their segments."""

from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis.allocator import pools
from attnprof.analysis.allocator.history import (
    ALLOC,
    FREE_COMPLETED,
    GOES_ON,
    SEGMENT_GIVEN,
    SEGMENT_TAKEN,
    Events,
)
from attnprof.analysis.allocator.pools import SHARED, PrivateSegments, find_pools

Row = tuple[int, int, int]
Listed = tuple[int, int, int, int]


def make_events(rows: list[Row]) -> Events:
    """Return events of (kind, address, size)."""
    kind, address, size = np.array(rows, np.int64).reshape(-1, 3).T
    return Events(kind, address, size, np.zeros(len(kind), np.bool_))


def list_segments(rows: list[Listed]) -> PrivateSegments:
    """Return segments of (events before, address, size, pool)."""
    return PrivateSegments(*np.array(rows, np.int64).reshape(-1, 4).T)


def test_place_is_private_only_while_its_segment_is() -> None:
    events = make_events(
        [
            (SEGMENT_TAKEN, 0, 4),
            (ALLOC, 0, 2),
            (SEGMENT_GIVEN, 0, 4),
            (SEGMENT_TAKEN, 0, 4),  # of the pool that everyone shares
            (ALLOC, 0, 2),
            (SEGMENT_GIVEN, 0, 4),
            (SEGMENT_TAKEN, 0, 4),  # of the first one again
            (ALLOC, 0, 2),
        ]
    )
    listed = list_segments([(2, 0, 4, 1), (8, 0, 4, 1)])
    assert find_pools(events, listed).tolist() == [1, 1, SHARED, SHARED, SHARED, SHARED, 1, 1]


def test_segment_that_is_listed_at_every_commit_is_looked_for_once() -> None:
    segments, commits = 20, 50
    rows: list[Row] = [(SEGMENT_TAKEN, 4 * at, 4) for at in range(segments)]
    listed: list[Listed] = []
    for _ in range(commits):  # another segment comes and goes
        rows += [(SEGMENT_TAKEN, 4 * segments, 4), (SEGMENT_GIVEN, 4 * segments, 4)]
        listed += [(len(rows), 4 * at, 4, 1 + at) for at in range(segments)]
    looked = pools._Moves.list_lives
    with patch.object(pools._Moves, "list_lives", autospec=True, side_effect=looked) as spy:
        found = find_pools(make_events(rows), list_segments(listed))
    assert spy.call_count == segments
    assert found[:segments].tolist() == list(range(1, segments + 1))
    assert not found[segments:].any()


KINDS = st.sampled_from([SEGMENT_TAKEN, SEGMENT_GIVEN, ALLOC, FREE_COMPLETED, GOES_ON])
ROWS = st.lists(st.tuples(KINDS, st.integers(0, 7), st.integers(1, 4)), min_size=1, max_size=30)


@given(ROWS, st.data())
def test_lists_say_together_what_each_says_alone(rows: list[Row], data: st.DataObject) -> None:
    segment = st.sampled_from([(0, 4, 1), (4, 4, 2), (2, 2, 1), (6, 5, 2)])
    count = st.integers(0, len(rows))
    drawn = data.draw(st.lists(st.tuples(count, segment), max_size=12))
    listed = [(before, *each) for before, each in sorted(drawn)]
    events = make_events(rows)
    together = np.full(len(rows), SHARED)
    for each in listed:
        alone = find_pools(events, list_segments([each]))
        together = np.where(alone != SHARED, alone, together)
    assert find_pools(events, list_segments(listed)).tolist() == together.tolist()
