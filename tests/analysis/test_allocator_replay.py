"""The allocator over hand-made tables of allocations."""

import polars as pl
import pytest

from attnprof.analysis.allocator import AllocatorSettings, simulate_allocator
from attnprof.analysis.peak import replay

MIB = 2**20
LIVE = 10**6


def make_allocations(rows: list[tuple[int, int, int]], device: str = "cuda:0") -> pl.DataFrame:
    """Return blocks from (start, end, bytes requested)."""
    return pl.DataFrame(
        {
            "allocation_id": range(len(rows)),
            "device": [device] * len(rows),
            "size_bytes": [-(-size // 512) * 512 for _, _, size in rows],
            "requested_bytes": [size for _, _, size in rows],
            "start": [start for start, _, _ in rows],
            "end": [end for _, end, _ in rows],
        },
        schema_overrides={name: pl.Int64 for name in ("size_bytes", "requested_bytes", "end")},
    )


def test_simulation_follows_every_event() -> None:
    simulation = simulate_allocator(make_allocations([(0, 2, 30 * MIB), (1, LIVE, 100), (3, 4, 5)]))
    assert simulation.positions.tolist() == [0, 1, 2, 3]
    assert simulation.reserved_bytes.tolist() == [30 * MIB] + 3 * [32 * MIB]
    assert simulation.allocated_bytes.tolist() == [30 * MIB, 30 * MIB + 512, 512, 2 * 512]
    assert simulation.requested_bytes.tolist() == [30 * MIB, 30 * MIB + 100, 100, 105]
    assert simulation.out_of_memory is None


def test_simulation_finds_each_peak_where_it_first_is() -> None:
    rows = [(0, 1, 30 * MIB), (2, LIVE, 10 * MIB + 1), (3, LIVE, 10 * MIB + 1), (5, LIVE, 1)]
    simulation = simulate_allocator(make_allocations(rows))
    # Both blocks of 10 MiB are cut from the free segment of 30 MiB.
    assert (simulation.reserved_peak_bytes, simulation.reserved_peak_position) == (32 * MIB, 5)
    assert (simulation.allocated_peak_bytes, simulation.allocated_peak_position) == (30 * MIB, 0)
    assert (simulation.requested_peak_bytes, simulation.requested_peak_position) == (30 * MIB, 0)
    rest_bytes = 30 * MIB - 2 * (10 * MIB + 512)
    assert simulation.inactive_split_bytes == rest_bytes + 2 * MIB - 512
    assert simulation.largest_free_block_bytes == rest_bytes


def test_a_free_comes_before_an_allocation_at_the_same_position() -> None:
    simulation = simulate_allocator(make_allocations([(0, 1, 30 * MIB), (1, LIVE, 30 * MIB)]))
    assert simulation.reserved_peak_bytes == 30 * MIB


def test_rows_may_come_in_any_order() -> None:
    table = make_allocations([(0, 3, 7 * MIB), (1, LIVE, MIB), (2, 4, 40 * MIB), (5, LIVE, 9)])
    expected = simulate_allocator(table)
    assert simulate_allocator(table[::-1]).reserved_bytes.tolist() == (
        expected.reserved_bytes.tolist()
    )


def test_empty_tensors_take_nothing() -> None:
    simulation = simulate_allocator(make_allocations([(0, LIVE, 0), (1, LIVE, 1)]))
    assert simulation.positions.tolist() == [1]


def test_nothing_reserves_nothing() -> None:
    simulation = simulate_allocator(make_allocations([]), device=None)
    assert simulation.reserved_peak_bytes == 0
    assert simulation.positions.tolist() == []


def test_allocated_peak_is_that_of_the_blocks_where_all_are_split_exactly() -> None:
    table = make_allocations([(i, i + 3, 1000 * (i + 1)) for i in range(50)])
    assert (
        simulate_allocator(table).allocated_peak_bytes == replay(table, "cuda:0").live_bytes.max()
    )


def test_running_out_of_memory_ends_the_replay() -> None:
    rows = [(0, LIVE, 5 * MIB), (1, 2, 30 * MIB), (3, LIVE, 40 * MIB + 1), (4, LIVE, 1)]
    simulation = simulate_allocator(make_allocations(rows), capacity_bytes=60 * MIB)
    failed = simulation.out_of_memory
    assert failed is not None
    assert failed.position == 3
    assert failed.requested_bytes == 40 * MIB + 1
    assert failed.block_bytes == 40 * MIB + 512
    assert failed.allocated_bytes == 5 * MIB
    assert failed.cached_bytes == 15 * MIB  # beside the block of 5 MiB; the 30 were returned
    assert failed.free_bytes == 40 * MIB
    assert simulation.positions.tolist() == [0, 1, 2]
    assert simulation.reserved_peak_bytes == (20 + 30) * MIB


def test_settings_reach_the_allocator() -> None:
    table = make_allocations([(0, 1, 30 * MIB), (2, 3, 31 * MIB), (4, 5, 33 * MIB)])
    expandable = AllocatorSettings.parse("expandable_segments:True")
    assert simulate_allocator(table).reserved_peak_bytes == (30 + 32 + 34) * MIB
    assert simulate_allocator(table, settings=expandable).reserved_peak_bytes == 2 * 20 * MIB


def test_streams_are_kept_apart_where_the_table_has_them() -> None:
    table = make_allocations([(0, 1, 30 * MIB), (2, 3, 30 * MIB)])
    assert simulate_allocator(table).reserved_peak_bytes == 30 * MIB
    streams = table.with_columns(stream=pl.Series([0, 7]))
    assert simulate_allocator(streams).reserved_peak_bytes == 2 * 30 * MIB


def test_one_device_is_replayed() -> None:
    table = pl.concat(
        [make_allocations([(0, LIVE, MIB)], "cpu"), make_allocations([(1, LIVE, 12 * MIB)])]
    )
    assert simulate_allocator(table).device == "cuda:0"
    assert simulate_allocator(table, device="cpu").reserved_peak_bytes == 2 * MIB
    with pytest.raises(ValueError, match=r"the run has no device 'cuda:9'; it has: cpu, cuda:0"):
        simulate_allocator(table, device="cuda:9")


def test_a_block_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"starts at event 5 and ends at event 5; expected"):
        simulate_allocator(make_allocations([(5, 5, 1)]))
