"""The one order of events of storages and of allocators, on hand-made and on drawn histories."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attnprof.attribution.order import OTHER, TAKEN, DeviceBlocks, merge_events
from attnprof.store.schema import BORN, FOUND, FREED

COLUMNS = ("storage", "kind", "size_bytes", "address", "device", "time_ns", "op", "signature")


def make_ledger(rows: list[tuple[int, int, int, int, int, int]]) -> dict[str, np.ndarray]:
    """Return events from (storage, kind, size, address, device, op)."""
    whole = [(*row[:5], 10 * n, row[5], -1) for n, row in enumerate(rows)]
    table = np.array(whole, np.int64).reshape(-1, len(COLUMNS))
    return dict(zip(COLUMNS, table.T, strict=True))


def make_device(
    device: int, rows: list[tuple[int, int]], blocks: list[tuple[int, int, int, int]]
) -> DeviceBlocks:
    """Return a history: (op, is a seed) per event, and (begin, end, address, size) per block."""
    begin, end, address, size = np.array(blocks, np.int64).reshape(-1, 4).T
    ops = np.array([op for op, _ in rows], np.int64)
    is_seed = np.array([seed for _, seed in rows], np.bool_)
    return DeviceBlocks(device, ops, is_seed, begin, end, address, size, size)


def test_block_that_an_op_keeps_to_itself_lies_before_its_result() -> None:
    ledger = make_ledger([(0, BORN, 100, 512, 0, 0), (1, BORN, 100, 1024, 0, 1)])
    # Op 0 takes its result; op 1 a workspace, its result, and gives the workspace back.
    device = make_device(
        0,
        [(0, 0), (1, 0), (1, 0), (1, 0)],
        [(0, -1, 512, 100), (1, 3, 4096, 700), (2, -1, 1024, 100)],
    )
    merged, (placed,) = merge_events(ledger, [device], np.array([5, 15]))
    assert merged["kind"].tolist() == [TAKEN, BORN, TAKEN, TAKEN, OTHER, BORN]
    assert merged["op"].tolist() == [0, 0, 1, 1, 1, 1]
    assert placed.position.tolist() == [0, 2, 3, 4]
    assert placed.first_seen.tolist() == [1, -1, 5]


def test_block_ends_with_its_storage_and_not_with_the_op_before() -> None:
    # Op 0 makes a storage, ops 1 and 2 allocate nothing, and then it is let go of.
    ledger = make_ledger([(0, BORN, 100, 512, 0, 0), (0, FREED, 0, 0, -1, 3)])
    device = make_device(0, [(0, 0), (-1, 0)], [(0, 1, 512, 100)])
    merged, (placed,) = merge_events(ledger, [device], np.array([5, 15, 25]))
    assert merged["op"][placed.position].tolist() == [0, 3]


def test_address_taken_again_belongs_to_the_storage_of_its_time() -> None:
    ledger = make_ledger(
        [(0, BORN, 9, 512, 0, 0), (0, FREED, 0, 0, -1, 1), (1, BORN, 9, 512, 0, 1)]
    )
    device = make_device(0, [(0, 0), (-1, 0), (1, 0)], [(0, 1, 512, 9), (2, -1, 512, 9)])
    _, (placed,) = merge_events(ledger, [device], np.array([5, 15]))
    assert placed.first_seen.tolist() == [placed.position[0] + 1, placed.position[2] + 1]


def test_devices_have_addresses_of_their_own() -> None:
    ledger = make_ledger([(0, BORN, 9, 512, 0, 0), (1, BORN, 9, 512, 1, 1)])
    first = make_device(0, [(0, 0)], [(0, -1, 512, 9)])
    second = make_device(1, [(1, 0)], [(0, -1, 512, 9)])
    merged, placed = merge_events(ledger, [first, second], np.array([5, 15]))
    assert [each.first_seen.tolist() for each in placed] == [[1], [3]]
    assert merged["device"].tolist() == [0, 0, 1, 1]


def make_gap(ledger_rows: list[tuple[int, int, int, int, int, int]]) -> tuple[list[int], list[int]]:
    """Return which blocks are left, and where they end, of a history that was off after op 0.

    The block of op 0 is seeded when the history goes on, before op 1.
    """
    rows = [(0, 0), (1, 0), (1, 1), (1, 0)]  # taken by op 0; goes on; seeded; op 1 takes another
    blocks = [(0, 2, 512, 9), (2, -1, 512, 9), (3, -1, 1024, 9)]
    merged = merge_events(make_ledger(ledger_rows), [make_device(0, rows, blocks)], np.arange(2))
    own = merged[1][0].blocks
    return own.begin.tolist(), own.end.tolist()


def test_block_goes_on_over_a_gap_while_its_storage_is_live() -> None:
    assert make_gap([(0, BORN, 9, 512, 0, 0), (1, BORN, 9, 1024, 0, 1)]) == ([0, 3], [-1, -1])


def test_block_whose_storage_was_freed_in_a_gap_is_another_one_after_it() -> None:
    rows = [(0, BORN, 9, 512, 0, 0), (0, FREED, 0, 0, -1, 1), (1, BORN, 9, 1024, 0, 1)]
    assert make_gap(rows) == ([0, 2, 3], [2, -1, -1])


def test_block_without_a_storage_goes_on_over_a_gap() -> None:
    assert make_gap([(1, BORN, 9, 1024, 0, 1)]) == ([0, 3], [-1, -1])


def test_block_in_which_another_storage_lies_after_a_gap_is_another_one() -> None:
    rows = [(1, FOUND, 9, 512, 0, 1), (2, BORN, 9, 1024, 0, 1)]
    assert make_gap(rows) == ([0, 2, 3], [2, -1, -1])


@given(st.data())
def test_every_source_keeps_its_order_and_ops_ascend(data: st.DataObject) -> None:
    ops = data.draw(st.lists(st.integers(0, 6), max_size=12).map(sorted))
    draws = [(n, BORN, 8, 512 * data.draw(st.integers(1, 3)), 0, op) for n, op in enumerate(ops)]
    ledger = make_ledger(draws)
    devices = []
    for number in range(data.draw(st.integers(1, 2))):
        tags = data.draw(st.lists(st.integers(-1, 6), max_size=8))
        blocks = [(n, -1, 512 * data.draw(st.integers(1, 3)), 8) for n in range(len(tags))]
        devices.append(make_device(number, [(tag, 0) for tag in tags], blocks))
    merged, placed = merge_events(ledger, devices, np.arange(7) * 10)
    assert len(merged["op"]) == len(ops) + sum(len(device.op) for device in devices)
    assert (np.diff(merged["op"]) >= 0).all()
    assert (np.diff(merged["storage"][merged["kind"] == BORN]) > 0).all()
    for each in placed:
        assert (np.diff(each.position) > 0).all()
