"""Blocks, sizes and reserved bytes of hand-made histories, also of ones that were off a while."""

import numpy as np
import pytest

from attnprof.analysis.allocator.history import KINDS, Events, Lives, list_lives, list_seedings
from attnprof.analysis.allocator.settings import AllocatorSettings
from attnprof.analysis.device_history import DeviceHistory
from attnprof.analysis.memory_state import describe_state
from attnprof.store.schema import RESUMED, SEED, SEGMENT_SEED

MIB = 2**20
BASE = 2**32
Row = tuple[str, int, int]


def make_history(*rows: Row) -> DeviceHistory:
    """Return a history from (action, address above `BASE`, size)."""
    words = [word for word, _, _ in rows]
    events = Events(
        np.array([KINDS[word] for word in words]),
        BASE + np.array([address for _, address, _ in rows]),
        np.array([size for _, _, size in rows]),
        np.array([word in (SEED, SEGMENT_SEED) for word in words], np.bool_),
    )
    count = np.arange(len(rows))
    lives = list_lives(events)
    return DeviceHistory(
        "cuda:0", 0, events, lives, count, count, count, count, count, count, AllocatorSettings()
    )


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
