"""Blocks, sizes and reserved bytes of hand-made histories, also of ones that were off a while."""

import numpy as np
import polars as pl
import pytest

from attnprof.analysis.allocator.history import KINDS, Events, Lives, list_lives, list_seedings
from attnprof.analysis.allocator.pools import PrivateSegments, find_pools
from attnprof.analysis.allocator.settings import AllocatorSettings
from attnprof.analysis.device_history import DeviceHistory
from attnprof.analysis.memory_state import _try_expandable, describe_state
from attnprof.store.schema import RESUMED, SEED, SEGMENT_SEED

MIB = 2**20
BASE = 2**32
Row = tuple[str, int, int]
Listed = tuple[int, int, int, int]


def make_history(*rows: Row, private: tuple[Listed, ...] = ()) -> DeviceHistory:
    """Return a history from (action, address above `BASE`, size), and private segments from
    (events before, address above `BASE`, size, pool).
    """
    words = [word for word, _, _ in rows]
    events = Events(
        np.array([KINDS[word] for word in words]),
        BASE + np.array([address for _, address, _ in rows]),
        np.array([size for _, _, size in rows]),
        np.array([word in (SEED, SEGMENT_SEED) for word in words], np.bool_),
    )
    count = np.arange(len(rows))
    lives = list_lives(events)
    before, address, size, pool = np.array(private, np.int64).reshape(-1, 4).T
    pools = find_pools(events, PrivateSegments(before, BASE + address, size, pool))
    return DeviceHistory(
        "cuda:0", 0, events, lives, count, count, count, count, pools, count, count,
        AllocatorSettings(),
    )  # fmt: skip


def list_blocks(lives: Lives) -> list[tuple[int, int, int]]:
    """Return (begin, end, size) per block."""
    rows = zip(lives.begin, lives.end, lives.size_bytes, strict=True)
    return [(int(begin), int(end), int(size)) for begin, end, size in rows]


LARGE = 3 * MIB + 512
"""Of a segment of 20 MiB a block of this size is split off; of one of 4 MiB it takes all."""

BEFORE: tuple[Row, ...] = (
    ("segment_alloc", 0, 20 * MIB),
    ("alloc", 0, LARGE),
    ("alloc", LARGE, LARGE),
    ("segment_alloc", 32 * MIB, 4 * MIB),
    ("alloc", 32 * MIB, LARGE),
)
AFTER: tuple[Row, ...] = (
    (RESUMED, 0, 0),  # the first block has gone, and so has the second segment
    (SEGMENT_SEED, 0, 20 * MIB),
    (SEED, LARGE, LARGE),
    (SEGMENT_SEED, 64 * MIB, 4 * MIB),
    (SEED, 64 * MIB, LARGE),
)


def test_block_takes_the_rest_that_is_not_worth_splitting_off() -> None:
    assert list_blocks(make_history(*BEFORE).lives) == [
        (1, -1, LARGE),
        (2, -1, LARGE),
        (4, -1, 4 * MIB),
    ]


def test_history_that_goes_on_ends_what_is_gone_and_takes_up_what_is_there() -> None:
    history = make_history(*BEFORE, *AFTER)
    goes_on = len(BEFORE)
    assert list_seedings(history.events) == [(goes_on, goes_on + 5)]
    assert list_blocks(history.lives) == [
        (1, goes_on, LARGE),
        (2, goes_on + 2, LARGE),  # seeded again: it ends at the very event that takes it up
        (4, goes_on, 4 * MIB),
        (goes_on + 2, -1, LARGE),
        (goes_on + 4, -1, 4 * MIB),
    ]


def test_free_memory_is_that_of_the_seeds_after_a_gap() -> None:
    # 3 MiB are free at the beginning of the first segment, since its first block is gone.
    history = make_history(*BEFORE, *AFTER, ("alloc", 0, 3 * MIB))
    assert list_blocks(history.lives)[-1] == (10, -1, LARGE)


def test_reserved_bytes_are_told_anew_after_a_gap() -> None:
    reserved = make_history(*BEFORE, *AFTER, ("segment_free", 64 * MIB, 4 * MIB)).reserved_bytes()
    assert reserved.tolist() == [20 * MIB] * 3 + [24 * MIB] * 7 + [20 * MIB]


@pytest.mark.parametrize("at", range(len(BEFORE), len(BEFORE) + len(AFTER)))
def test_state_at_a_seed_is_that_of_all_seeds(at: int) -> None:
    state = describe_state(make_history(*BEFORE, *AFTER), at)
    assert state.reserved_bytes == 24 * MIB
    assert state.allocated_bytes == LARGE + 4 * MIB
    assert state.free_blocks == 2


def test_device_that_is_empty_when_the_history_goes_on_holds_nothing() -> None:
    history = make_history(*BEFORE, (RESUMED, 0, 0), ("segment_alloc", 0, 2 * MIB))
    assert {end for _, end, _ in list_blocks(history.lives)} == {len(BEFORE)}
    assert history.reserved_bytes()[-2:].tolist() == [0, 2 * MIB]


def test_histories_that_go_on_twice_in_a_row_count_once() -> None:
    history = make_history(*BEFORE, *AFTER, *AFTER)
    assert history.reserved_bytes()[-1] == 24 * MIB
    live = [size for _, end, size in list_blocks(history.lives) if end < 0]
    assert live == [LARGE, 4 * MIB]


POOLS: tuple[Row, ...] = (
    ("segment_alloc", 0, 20 * MIB),
    ("alloc", 0, LARGE),
    ("segment_alloc", 32 * MIB, 20 * MIB),  # private
    ("alloc", 32 * MIB, LARGE),
    ("oom", 33 * MIB, 30 * MIB),  # in place of an address: what the device had free
    ("free_completed", 32 * MIB, LARGE),
    ("segment_free", 32 * MIB, 20 * MIB),
    ("segment_alloc", 32 * MIB, 20 * MIB),  # for everyone
    ("alloc", 32 * MIB, LARGE),
)
PRIVATE = (32 * MIB, 20 * MIB, 7)


@pytest.mark.parametrize("listed_at", [3, 4, 6])
def test_pool_is_that_of_the_segment_until_its_place_is_anothers(listed_at: int) -> None:
    history = make_history(*POOLS, private=((listed_at, *PRIVATE),))
    assert history.pool.tolist() == [0, 0, 7, 7, 0, 7, 0, 0, 0]


def test_segment_that_is_listed_later_is_the_later_one() -> None:
    history = make_history(*POOLS, private=((9, *PRIVATE),))
    assert history.pool.tolist() == [0, 0, 0, 0, 0, 0, 0, 7, 7]


def test_segment_is_listed_twice_and_marked_once() -> None:
    twice = tuple((at, *PRIVATE) for at in (3, 5))
    assert make_history(*POOLS, private=twice).pool.tolist() == [0, 0, 7, 7, 0, 7, 0, 0, 0]


def test_pool_ends_where_the_history_goes_on_and_is_told_anew() -> None:
    rows = (*POOLS[:4], *AFTER)
    before, after = (3, *PRIVATE), (len(rows), 64 * MIB, 4 * MIB, 7)
    history = make_history(*rows, private=(before, after))
    assert history.pool.tolist() == [0, 0, 7, 7, 0, 0, 0, 7, 7]


def test_expandable_segment_is_mapped_in_parts() -> None:
    rows = (
        ("segment_map", 0, 20 * MIB),
        ("segment_map", 20 * MIB, 20 * MIB),
        ("alloc", 20 * MIB, LARGE),
        ("segment_map", 40 * MIB, 20 * MIB),  # another's
        ("segment_unmap", 0, 20 * MIB),
    )
    history = make_history(*rows, private=((3, 0, 40 * MIB, 1), (5, 20 * MIB, 20 * MIB, 1)))
    assert history.pool.tolist() == [1, 1, 1, 0, 0]


def test_state_says_what_lies_in_private_pools_and_what_of_that_is_free() -> None:
    state = describe_state(make_history(*POOLS, private=((3, *PRIVATE),)), 4)
    assert (state.allocated_bytes, state.private_bytes) == (2 * LARGE, LARGE)
    assert state.free_bytes == 2 * (20 * MIB - LARGE)
    assert state.private_free_bytes == 20 * MIB - LARGE


def test_nothing_is_private_where_no_segment_was_listed() -> None:
    history = make_history(*POOLS)
    assert not history.pool.any()
    assert describe_state(history, 4).private_free_bytes == 0


def test_blocks_of_a_pool_that_has_gone_are_no_requests_of_the_one_everyone_shares() -> None:
    rows: tuple[Row, ...] = (
        ("segment_alloc", 0, 60 * MIB),
        ("alloc", 0, 60 * MIB),
        ("free_completed", 0, 60 * MIB),
        ("segment_free", 0, 60 * MIB),
        ("segment_alloc", 64 * MIB, 20 * MIB),
        ("segment_alloc", 96 * MIB, 20 * MIB),
        ("alloc", 64 * MIB, 20 * MIB),
        ("alloc", 96 * MIB, 20 * MIB),
        ("free_completed", 64 * MIB, 20 * MIB),
        ("free_completed", 96 * MIB, 20 * MIB),
        ("oom", -BASE, 40 * MIB),  # the device has nothing left
    )
    history = make_history(*rows, private=((3, 0, 60 * MIB, 1),))
    begin, end, size = map(list, zip(*list_blocks(history.lives), strict=True))
    own = pl.DataFrame(
        {
            "device": "cuda:0",
            "start": begin,
            "end": [len(rows) if each < 0 else each for each in end],
            "requested_bytes": size,
            "size_bytes": size,
            "address": history.events.address[begin],
        }
    )
    at = len(rows) - 1
    assert _try_expandable(history, own, at, describe_state(history, at)) is True
