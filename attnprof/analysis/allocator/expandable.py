"""Expandable segments: one range of addresses per pool and stream, given memory page by page.

A request that no free block serves extends the segment at the lowest address where free and
unmapped ranges together are large enough, which is its end unless memory was returned before.
"""

from bisect import insort
from operator import attrgetter

from attnprof.analysis.allocator.blocks import (
    Block,
    Device,
    Pool,
    absorb,
    absorb_free_neighbours,
    link,
)

_by_address = attrgetter("address")


def extend(pool: Pool, size_bytes: int, device: Device) -> Block | None:
    """Return a block of at least ``size_bytes``, off the list; None if the device has no room.

    After a failure part of the range may have been mapped, as in torch: it is free then.
    """
    block = _find_room(pool, size_bytes, device)
    if not block.is_mapped and not _map(block, min(size_bytes, block.size_bytes), device):
        return None
    while block.size_bytes < size_bytes:
        # Free blocks never touch each other, so what lies above is unmapped.
        above = block.next
        assert above is not None
        missing_bytes = min(size_bytes - block.size_bytes, above.size_bytes)
        if not _map(above, missing_bytes, device):
            return None
        block = above  # it has absorbed the block below
    pool.remove(block)
    return block


def find_best_fit(pool: Pool, position: int) -> int:
    """Return the position of the best fit, from that of the smallest block that is large enough.

    A block that could grow counts with what it could grow by, so that one inside of the segment
    is preferred to the segment's end.
    """
    size_bytes = _growable_bytes(pool.at(position))
    while position + 1 < len(pool):
        next_bytes = _growable_bytes(pool.at(position + 1))
        if next_bytes >= size_bytes:
            break
        position, size_bytes = position + 1, next_bytes
    return position


def release_pages(pool: Pool, device: Device) -> None:
    """Return to the device every page that no live block touches."""
    page_bytes = pool.page_bytes
    for block in pool.blocks:
        begin = -(-block.address // page_bytes) * page_bytes
        end = (block.address + block.size_bytes) // page_bytes * page_bytes
        if begin >= end:
            continue
        pool.remove(block)
        _cut_off_below(block, begin)
        _cut_off_above(block, end)
        block.is_mapped = False
        device.give_back(end - begin)
        for neighbour in (block.previous, block.next):
            if neighbour is not None and not neighbour.is_mapped:
                pool.unmapped.remove(neighbour)
                absorb(block, neighbour)
        if block.is_split:  # else the whole segment is empty, and its addresses are given up
            insort(pool.unmapped, block, key=_by_address)


def _find_room(pool: Pool, size_bytes: int, device: Device) -> Block:
    """Return the lowest block from which free and unmapped ranges reach over ``size_bytes``."""
    for unmapped in pool.unmapped:
        below = unmapped.previous
        start = below if below is not None and not below.is_live else unmapped
        room_bytes = 0
        block: Block | None = start
        while room_bytes < size_bytes and block is not None and not block.is_live:
            room_bytes += block.size_bytes
            block = block.next
        if room_bytes >= size_bytes:
            return start
    # Torch reserves addresses for 9/8 of the device's memory.
    pages = -(-(device.capacity_bytes + device.capacity_bytes // 8) // pool.page_bytes)
    range_bytes = pages * pool.page_bytes
    segment = Block(device.place(range_bytes, pool.page_bytes), range_bytes, pool)
    segment.is_mapped = False
    pool.unmapped.append(segment)  # its address is the highest
    return segment


def _map(block: Block, size_bytes: int, device: Device) -> bool:
    """Give the first ``size_bytes`` of an unmapped block memory, in whole pages, all or none."""
    pool = block.pool
    mapped_bytes = -(-size_bytes // pool.page_bytes) * pool.page_bytes
    if not device.take(mapped_bytes):
        return False
    pool.unmapped.remove(block)
    if mapped_bytes < block.size_bytes:
        rest = Block(block.address + mapped_bytes, block.size_bytes - mapped_bytes, pool)
        rest.is_mapped = False
        link(rest, block.next)
        link(block, rest)
        insort(pool.unmapped, rest, key=_by_address)
        block.size_bytes = mapped_bytes
    block.is_mapped = True
    absorb_free_neighbours(block)
    pool.add(block)
    return True


def _growable_bytes(block: Block) -> int:
    above = block.next
    return block.size_bytes + (0 if above is None or above.is_mapped else above.size_bytes)


def _cut_off_below(block: Block, address: int) -> None:
    """Move the block's start up to ``address``; what lies below becomes a free block."""
    if address > block.address:
        lower = Block(block.address, address - block.address, block.pool)
        link(block.previous, lower)
        link(lower, block)
        block.size_bytes -= lower.size_bytes
        block.address = address
        block.pool.add(lower)


def _cut_off_above(block: Block, address: int) -> None:
    """Move the block's end down to ``address``; what lies above becomes a free block."""
    end = block.address + block.size_bytes
    if end > address:
        upper = Block(address, end - address, block.pool)
        link(upper, block.next)
        link(block, upper)
        block.size_bytes -= upper.size_bytes
        block.pool.add(upper)
