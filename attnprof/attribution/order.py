"""One order for everything that happened to memory: events of storages and of CUDA's allocator.

The ledger of storages and the allocator of each device keep their events in order, each for
itself. What joins them is not their clocks, which differ, but ops: the allocator notes which op
ran, the ledger how many had finished; and a storage and the block that it lies in end together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnprof.store.schema import BORN, FREED

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Bools = np.ndarray[tuple[int], np.dtype[np.bool_]]
Events = dict[str, np.ndarray]
"""The columns of `storage_events`."""

TAKEN = 4
"""Value of ``kind`` besides those of the ledger: the allocator took a block."""
OTHER = 5
"""The allocator did anything else."""


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """What the allocator of one device did, from its own history."""

    device: int
    """Row of `devices`."""
    op: Ints
    """Per event, the op that was running, or -1. Of seeds, how many ops had finished when the
    history went on; -1 where it begins."""
    is_seed: Bools
    """Per event, whether it tells what was there when the history began, or went on."""
    begin: Ints
    """Per block, the event that took it."""
    end: Ints
    """The event at which it was let go of, or -1 while it is live."""
    address: Ints
    requested_bytes: Ints
    size_bytes: Ints

    @property
    def has_ops(self) -> bool:
        """Whether the allocator noted ops; else what lies where is guessed from sizes in turn."""
        return bool((self.op[~self.is_seed] >= 0).any())

    @property
    def is_from_before(self) -> Bools:
        """Per block, whether it was there before the history began."""
        result: Bools = self.is_seed[self.begin] & (self.op[self.begin] < 0)
        return result


@dataclass(frozen=True, slots=True)
class PlacedBlocks:
    """A device's blocks and where its events stand in the order of all."""

    blocks: DeviceBlocks
    position: Ints
    """Per event, its position."""
    first_seen: Ints
    """Per block, the position of the ledger's event that shows which storage is in it, or -1."""


def pair_storage_events(events: Events) -> tuple[Ints, Ints]:
    """Return the events at which a storage has a new size, and where each of them ends.

    An event without an end ends at the number of events.
    """
    kind, storage = events["kind"], events["storage"].astype(np.int64)
    count = len(kind)
    # Sorted by storage and then by time, each event's end is the next event of its storage.
    order = np.lexsort((np.arange(count), storage))
    following = np.full(count, count, np.int64)
    same = storage[order[1:]] == storage[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    starts = np.flatnonzero((kind != FREED) & (kind < TAKEN))
    return starts, following[starts]


def merge_events(
    ledger: Events, devices: Sequence[DeviceBlocks], op_time_ns: Ints
) -> tuple[Events, list[PlacedBlocks]]:
    """Return all events in one order, and where those of each allocator are in it.

    Args:
        ledger: The events of storages.
        devices: The allocators' blocks.
        op_time_ns: When each op returned.
    """
    count = len(ledger["op"])
    starts, ends = pair_storage_events(ledger)
    matched = [_join_over_gaps(ledger, starts, ends, each) for each in devices]
    devices = [device for device, _ in matched]
    placed = [_place(ledger, starts, ends, *each) for each in matched]
    before = np.concatenate([np.arange(count), *(place.before for place in placed)])
    op = np.concatenate([ledger["op"], *(place.op for place in placed)])
    is_ledger = np.arange(len(op)) < count
    order = np.lexsort((op, is_ledger, before))
    # The ledger counts ops as several threads finish them, which need not be in order.
    merged = {
        name: np.concatenate([column, np.full(len(op) - count, -1, column.dtype)])[order]
        for name, column in ledger.items()
    }
    merged["op"] = np.maximum.accumulate(op[order])
    position = np.empty(len(op), np.int64)
    position[order] = np.arange(len(op))
    first = count
    result = []
    for each, place in zip(devices, placed, strict=True):
        own = position[first : first + len(place.op)]
        first += len(own)
        merged["kind"][own] = OTHER
        merged["kind"][own[each.begin]] = TAKEN
        merged["device"][own] = each.device
        seen = np.where(place.storage_start >= 0, position[place.storage_start], -1)
        result.append(PlacedBlocks(each, own, seen))
    _fill_times(merged, op_time_ns)
    return merged, result


def _fill_times(merged: Events, op_time_ns: Ints) -> None:
    """Give the allocator's events the time of what came before them: another event, or an op."""
    own = merged["kind"] >= TAKEN
    before = np.concatenate([op_time_ns[:1], op_time_ns])
    by_op = before[np.minimum(merged["op"][own], len(before) - 1)] if len(before) else 0
    merged["time_ns"][own] = by_op
    latest = np.maximum.accumulate(merged["time_ns"])
    merged["time_ns"][own] = latest[own]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the events of one allocator stand among those of the ledger."""

    before: Ints
    """Per event, the ledger's event that it comes right before; never descending."""
    op: Ints
    """Per event, how many ops had finished."""
    storage_start: Ints
    """Per block, the ledger's event that shows which storage is in it, or -1."""


def _join_over_gaps(
    ledger: Events, starts: Ints, ends: Ints, device: DeviceBlocks
) -> tuple[DeviceBlocks, Ints]:
    """Return the blocks, and per block the position in ``starts`` of its storage, or -1.

    A block that is seeded where the history goes on is the one that ended there, at its address, if
    the storage in that one is still live; or if no storage is seen in either, as of a workspace.
    """
    match = _match(ledger, starts, device)
    begin, end = device.begin, device.end.copy()
    ends_at = np.full(len(device.op) + 1, -1, np.int64)
    ends_at[end] = np.arange(len(end))
    ends_at[-1] = -1  # of blocks that are live
    is_kept = np.ones(len(begin), np.bool_)
    # From the last to the first, so that what is joined once can be joined again.
    for again in np.flatnonzero(device.is_seed[begin])[::-1].tolist():
        before = int(ends_at[begin[again]])
        if before < 0 or device.address[before] != device.address[again]:
            continue
        if device.requested_bytes[before] != device.requested_bytes[again]:
            continue
        storage = match[before]
        gone = ends[storage] if storage >= 0 else len(ledger["op"])
        is_live = gone == len(ledger["op"]) or ledger["op"][gone] > device.op[begin[again]]
        if is_live and match[again] < 0:
            end[before] = end[again]
            is_kept[again] = False
    kept = replace(
        device,
        begin=begin[is_kept],
        end=end[is_kept],
        address=device.address[is_kept],
        requested_bytes=device.requested_bytes[is_kept],
        size_bytes=device.size_bytes[is_kept],
    )
    return kept, match[is_kept]


def _place(ledger: Events, starts: Ints, ends: Ints, device: DeviceBlocks, match: Ints) -> _Place:
    ops = np.maximum.accumulate(ledger["op"])
    count = len(ops)
    tag = device.op
    tagged = np.flatnonzero(tag >= 0)
    # Between which of the ledger's events each of the allocator's lies.
    earliest = np.zeros(len(tag), np.int64)
    latest = np.full(len(tag), count, np.int64)
    earliest[tagged] = _find_beginnings(ops, ledger["kind"] == BORN, tag[tagged])
    latest[tagged] = np.searchsorted(ops, tag[tagged], "right")
    latest[device.is_seed & (tag < 0)] = 0
    known = np.flatnonzero(match >= 0)
    born = known[ledger["kind"][starts[match[known]]] == BORN]
    born = born[tag[device.begin[born]] < 0]
    earliest[device.begin[born]] = starts[match[born]]
    freed = known[(device.end[known] >= 0) & (ends[match[known]] < count)]
    at_free = device.end[freed]
    earliest[at_free] = np.maximum(earliest[at_free], ends[match[freed]])
    bound = np.minimum.accumulate(latest[::-1])[::-1]
    before = np.maximum.accumulate(np.minimum(earliest, bound))
    # What no op is noted for came after the op that is noted before it.
    finished = np.maximum.accumulate(np.where(tag >= 0, tag + 1, 0))
    op = np.where(tag >= 0, tag, finished)
    op = np.maximum(op, np.append(0, ops)[before])
    following = np.append(ops, np.iinfo(np.int64).max)[before]
    op = np.minimum(op, following)
    is_anchored = before[at_free] == ends[match[freed]]
    op[at_free[is_anchored]] = following[at_free[is_anchored]]
    storage_start = np.where(match >= 0, np.append(starts, -1)[match], -1)
    return _Place(before, np.maximum.accumulate(op), storage_start)


def _find_beginnings(ops: Ints, is_born: np.ndarray, wanted: Ints) -> Ints:
    """Return for ops the ledger's event before which they began.

    That is the birth of the first result; what was let go of between the op before and this one has
    the same number of finished ops, and comes earlier.
    """
    births = np.append(np.flatnonzero(is_born), len(ops))
    first = births[np.searchsorted(ops[births[:-1]], wanted, "left")]
    is_own = np.append(ops, -1)[first] == wanted
    return np.where(is_own, first, np.searchsorted(ops, wanted, "left"))


def _match(ledger: Events, starts: Ints, device: DeviceBlocks) -> Ints:
    """Return per block the position in ``starts`` of the storage that lies in it, or -1.

    That is the first of those at its address, on its device, that were seen while it was live.
    Where the allocator noted no ops, that is not known, and sizes have to tell.
    """
    result = np.full(len(device.begin), -1, np.int64)
    is_own = (ledger["device"][starts] == device.device) & (ledger["size_bytes"][starts] > 0)
    storages = np.flatnonzero(is_own)
    if not len(storages) or not len(result):
        return result
    tag = device.op
    if not device.has_ops:
        return _match_in_turn(ledger, starts, storages, device)
    never = np.iinfo(np.int64).max
    begun = np.maximum.accumulate(np.where(tag >= 0, tag, 0))
    to_come = np.minimum.accumulate(np.where(tag >= 0, tag, never)[::-1])[::-1]
    gone = np.append(to_come, never)[device.end]  # by then; a live block's -1 is the last entry
    own = starts[storages]
    op = ledger["op"][own].astype(np.int64)
    # Between two ops that are noted, fused kernels take and return many blocks at one address.
    there, wanted = _number_kinds(
        (device.address, ledger["address"][own]),
        (device.requested_bytes, ledger["size_bytes"][own]),
    )
    at_begin = begun[device.begin]
    by_size = _find_last_begun(there, at_begin, device.begin, wanted, op)
    is_found = (by_size >= 0) & (op <= gone[by_size])
    there, wanted = _number_kinds((device.address, ledger["address"][own]))
    by_address = _find_last_begun(there, at_begin, device.begin, wanted, op)
    block = np.where(is_found, by_size, by_address)
    ok = (block >= 0) & (op <= gone[block])
    # Assigned last wins: the first storage.
    result[block[ok][::-1]] = storages[ok][::-1]
    return result


def _number_kinds(*columns: tuple[np.ndarray, np.ndarray]) -> tuple[Ints, Ints]:
    """Return a number per block and per storage that are equal where all columns are.

    Args:
        columns: Pairs of the blocks' values and the storages'.
    """
    number = np.zeros(sum(map(len, columns[0])), np.int64)
    for column in columns:
        values, rank = np.unique(np.concatenate(column), return_inverse=True)
        _, number = np.unique(number * len(values) + rank, return_inverse=True)
    return number[: len(columns[0][0])], number[len(columns[0][0]) :]


def _find_last_begun(there: Ints, at_begin: Ints, begin: Ints, wanted: Ints, op: Ints) -> Ints:
    """Return for each storage the last block of its kind that had begun at its op, or -1.

    Args:
        there: Per block the number of its kind.
        at_begin: Per block, the op that had begun when it was taken.
        begin: Per block, the event that took it.
        wanted: Per storage the number of its block's kind.
        op: Per storage, the op by which it was seen.
    """
    span = max(int(at_begin.max(initial=0)), int(op.max())) + 1
    order = np.lexsort((begin, there))
    keys = there[order] * span + at_begin[order]
    at = np.searchsorted(keys, wanted * span + op, "right") - 1
    block = order[np.maximum(at, 0)]
    return np.where((at >= 0) & (there[block] == wanted), block, -1)


def _match_in_turn(ledger: Events, starts: Ints, storages: Ints, device: DeviceBlocks) -> Ints:
    """Match without ops: at each address, blocks with storages of their size, one after another."""
    result = np.full(len(device.begin), -1, np.int64)
    own = starts[storages]
    there, wanted = _number_kinds(
        (device.address, ledger["address"][own]),
        (device.requested_bytes, ledger["size_bytes"][own]),
    )
    blocks = np.lexsort((device.begin, there))
    seen = np.argsort(wanted, kind="stable")
    key = _number_in_turn(there[blocks])
    wanted_key = _number_in_turn(wanted[seen])
    at = np.minimum(np.searchsorted(key, wanted_key), len(key) - 1)
    ok = key[at] == wanted_key
    result[blocks[at[ok]]] = storages[seen[ok]]
    return result


def _number_in_turn(groups: Ints) -> Ints:
    """Return for sorted groups an ascending number per member: its group and its turn in it."""
    first = np.searchsorted(groups, groups, "left")
    result: Ints = (groups.astype(np.int64) << 32) + np.arange(len(groups)) - first
    return result
