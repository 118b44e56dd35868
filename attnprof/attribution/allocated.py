"""Blocks of the CUDA allocator in place of the storages that lie in them."""

from dataclasses import replace

import numpy as np

from attnprof.attribution.blocks import Blocks
from attnprof.attribution.facts import Facts, Ints
from attnprof.attribution.order import PlacedBlocks
from attnprof.attribution.workspace import NO_STORAGE


def replace_storages(blocks: Blocks, facts: Facts) -> Blocks:
    """Return the blocks with those of devices whose allocator kept a history as it tells them.

    What a storage lies in stays that storage's block. The rest has no storage: workspace of the op
    that took it, or memory that nobody saw being taken.

    Args:
        blocks: The blocks of all storages.
        facts: The run's facts.
    """
    if not facts.allocated:
        return blocks
    told = np.isin(blocks.device, [each.blocks.device for each in facts.allocated])
    row_of_start = np.full(len(facts.events["op"]) + 1, -1, np.int64)
    row_of_start[blocks.start] = np.arange(len(blocks.start))
    parts = [_take(blocks, ~told)]
    parts += [_describe(each, blocks, row_of_start, facts) for each in facts.allocated]
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in Blocks.__dataclass_fields__
    }
    return _take(Blocks(**joined), np.argsort(joined["start"], kind="stable"))


def _take(blocks: Blocks, which: np.ndarray) -> Blocks:
    columns = {name: getattr(blocks, name)[which] for name in Blocks.__dataclass_fields__}
    return replace(blocks, **columns)


def _describe(placed: PlacedBlocks, storages: Blocks, row_of_start: Ints, facts: Facts) -> Blocks:
    own, events = placed.blocks, facts.events
    count = len(events["op"])
    row = row_of_start[placed.first_seen]
    is_known = row >= 0
    start = placed.position[own.begin]
    is_freed = own.end >= 0
    end = np.where(is_freed, np.append(placed.position, count)[own.end], count)
    tag = own.op[own.begin]
    tag = np.where((tag < facts.count) & ~own.is_seed[own.begin], tag, -1)
    started, ended = events["time_ns"][start], np.append(events["time_ns"], -1)[end]

    def of_storage(name: str, otherwise: Ints) -> Ints:
        column = np.append(getattr(storages, name), 0)
        result: Ints = np.where(is_known, column[row], otherwise)
        return result

    end_ns = of_storage("end_ns", ended)
    op = of_storage("op", tag)
    return Blocks(
        storage=of_storage("storage", np.full(len(row), NO_STORAGE)),
        size_bytes=own.size_bytes,
        requested_bytes=of_storage("requested_bytes", own.requested_bytes),
        address=own.address,
        device=np.full(len(row), own.device, np.int64),
        start=start,
        end=end,
        start_ns=of_storage("start_ns", started),
        end_ns=np.where(is_freed, np.where(end_ns < 0, ended, end_ns), -1),
        op=np.where(op < 0, tag, op),
        at_op=events["op"][start],
        signature=of_storage("signature", np.full(len(row), -1)),
        is_found=own.is_from_before,
        is_freed=is_freed,
    )
