"""The allocator itself: serves one request after the other, as CUDACachingAllocator.cpp does.

The rules are those of torch 2.8 to 2.13; the binaries of both give the same answers, request by
request (``docs/cuda-model.md``). Where a function here follows one there, it names it:
https://github.com/pytorch/pytorch/blob/v2.13.0/c10/cuda/CUDACachingAllocator.cpp
"""

from attnprof.analysis.allocator.blocks import Block, Device, Pool, absorb_free_neighbours, link
from attnprof.analysis.allocator.expandable import extend, find_best_fit, release_pages
from attnprof.analysis.allocator.settings import (
    DIVISION_INTERVALS,
    MIN_BLOCK_BYTES,
    MIN_EXACT_BYTES,
    ROUND_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    AllocatorSettings,
)

_UNLIMITED_BYTES = 2**63 - 1
"""More than any run has: sums of bytes are refused above."""
_FIRST_INTERVAL = 20
"""log2 of the size at which the first interval of ``roundup_power2_divisions`` begins: 1 MiB."""


class CachingAllocator:
    """The caching allocator of one device.

    Known limitations:
        A stream only chooses the pool: what was used on other streams too is free at once. Private
        pools (CUDA graphs, ``torch.cuda.MemPool``) and the cudaMallocAsync backend are left out.
    """

    def __init__(
        self, settings: AllocatorSettings | None = None, *, capacity_bytes: int | None = None
    ) -> None:
        """Start with nothing reserved.

        Args:
            settings: The options; without, torch's defaults.
            capacity_bytes: What the device has for this allocator; without, no limit.

        Raises:
            ValueError: The capacity is negative.
        """
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ValueError(f"a device's capacity must not be negative, got {capacity_bytes}")
        self.settings = settings = settings or AllocatorSettings()
        self.allocated_bytes = 0
        """All live blocks."""
        self.requested_bytes = 0
        """What the live blocks were asked to hold."""
        self._device = Device(_UNLIMITED_BYTES if capacity_bytes is None else capacity_bytes)
        self._is_expandable = settings.expandable_segments
        fraction = settings.per_process_memory_fraction
        has_limit = fraction < 1 and capacity_bytes is not None
        self._allowed_bytes = int(fraction * self._device.capacity_bytes) if has_limit else None
        self._rounds_up = any(divisions > 1 for divisions in settings.roundup_power2_divisions)
        self._max_split_bytes = settings.max_split_size_bytes or _UNLIMITED_BYTES
        self._max_spare_bytes = (
            settings.max_non_split_rounding_bytes or settings.large_segment_bytes
        )
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._live: dict[int, Block] = {}
        self._whole_free_bytes = 0
        """Segments that are one free block."""
        self._searches = 0
        """How often the large pools were searched: the clock of garbage collection."""

    @property
    def reserved_bytes(self) -> int:
        """All segments: what the process holds of the device."""
        return self._device.reserved_bytes

    @property
    def free_bytes(self) -> int | None:
        """What the device has left; None without a capacity."""
        if self._device.capacity_bytes == _UNLIMITED_BYTES:
            return None
        return self._device.capacity_bytes - self._device.reserved_bytes

    @property
    def largest_free_block_bytes(self) -> int:
        """The largest free block of any pool."""
        return max((pool.largest_bytes for pool in self._pools.values()), default=0)

    @property
    def inactive_split_bytes(self) -> int:
        """Free blocks of segments in use, which no `empty_cache` returns.

        As in ``torch.cuda.memory_stats``, 0 with expandable segments, whose free pages it returns.
        """
        if self._is_expandable:
            return 0
        return self.reserved_bytes - self.allocated_bytes - self._whole_free_bytes

    def malloc(self, size_bytes: int, *, stream: int = 0) -> int | None:
        """Allocate a block and return its address, or None if the device has no room for it.

        Args:
            size_bytes: What the tensor needs; the block is larger.
            stream: Any number; blocks are reused on the stream they were allocated on.

        Raises:
            ValueError: ``size_bytes`` is not positive; torch allocates nothing for empty tensors.
        """
        if size_bytes <= 0:
            raise ValueError(f"an allocation must have at least one byte, got {size_bytes}")
        size = self.round_size(size_bytes)
        pool = self._choose_pool(stream, size)
        block = self._take_free(pool, size) or self._take_new(pool, size)
        if block is None:
            return None
        if self._should_split(block, size):
            rest = block
            block = Block(rest.address, size, pool)
            link(rest.previous, block)
            link(block, rest)
            rest.address += size
            rest.size_bytes -= size
            pool.add(rest)
        block.is_live = True
        block.requested_bytes = size_bytes
        self._live[block.address] = block
        self.allocated_bytes += block.size_bytes
        self.requested_bytes += size_bytes
        return block.address

    def free(self, address: int) -> None:
        """Put a block back into its pool, merged with the free blocks beside it.

        Raises:
            ValueError: No live block has this address.
        """
        block = self._live.pop(address, None)
        if block is None:
            raise ValueError(f"no live block has the address {address}; was it freed before?")
        self.allocated_bytes -= block.size_bytes
        self.requested_bytes -= block.requested_bytes
        block.is_live = False
        absorb_free_neighbours(block)
        block.born = self._searches
        block.pool.add(block)
        if not block.is_split:
            self._whole_free_bytes += block.size_bytes

    def empty_cache(self) -> None:
        """Return to the device what holds no live block (``release_cached_blocks``)."""
        for pool in self._pools.values():
            if self._is_expandable:
                release_pages(pool, self._device)
                continue
            for block in pool.blocks:
                if not block.is_split:
                    self._release(block)

    def round_size(self, size_bytes: int) -> int:
        """Return the size of the smallest block that may serve a request (``round_size``)."""
        if self._rounds_up:
            interval = min(
                max(size_bytes.bit_length() - 1 - _FIRST_INTERVAL, 0), DIVISION_INTERVALS - 1
            )
            divisions = self.settings.roundup_power2_divisions[interval]
            if divisions > 1 and size_bytes > MIN_BLOCK_BYTES * divisions:
                step = (1 << size_bytes.bit_length() - 1) // divisions
                return -(-size_bytes // step) * step
        return -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES

    def _choose_pool(self, stream: int, size: int) -> Pool:
        is_small = size <= SMALL_BYTES
        pool = self._pools.get((stream, is_small))
        if pool is None:
            page_bytes = SMALL_SEGMENT_BYTES if is_small else self.settings.large_segment_bytes
            pool = self._pools[stream, is_small] = Pool(is_small=is_small, page_bytes=page_bytes)
        return pool

    def _should_split(self, block: Block, size: int) -> bool:
        """Follow ``should_split``."""
        rest = block.size_bytes - size
        if block.pool.is_small or self._is_expandable:
            return rest >= MIN_BLOCK_BYTES
        return size < self._max_split_bytes and rest > SMALL_BYTES

    def _take_free(self, pool: Pool, size: int) -> Block | None:
        """Take the best fit off the pool's list (``get_free_block``)."""
        if not pool.is_small:
            self._searches += 1
        position = pool.find(size)
        if position == len(pool):
            return None
        if self._is_expandable:
            position = find_best_fit(pool, position)
        block = pool.at(position)
        if block.size_bytes >= self._max_split_bytes and (
            size < self._max_split_bytes or block.size_bytes >= size + self._max_spare_bytes
        ):
            return None
        if not block.is_split:
            self._whole_free_bytes -= block.size_bytes
        return pool.take_at(position)

    def _take_new(self, pool: Pool, size: int) -> Block | None:
        """Get memory from the device, and if it has none left, after returning cached blocks."""
        if self._allowed_bytes is not None and self.settings.garbage_collection_threshold > 0:
            self._collect_garbage(self._allowed_bytes)
        block = self._allocate(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._allocate(pool, size)
        if block is None:
            self.empty_cache()
            block = self._allocate(pool, size)
        return block

    def _allocate(self, pool: Pool, size: int) -> Block | None:
        """Follow ``alloc_block`` and ``get_allocation_size``."""
        if size < MIN_EXACT_BYTES:
            segment_bytes = pool.page_bytes
        else:
            segment_bytes = -(-size // ROUND_BYTES) * ROUND_BYTES
        allowed_bytes = self._allowed_bytes
        if allowed_bytes is not None and self.reserved_bytes + segment_bytes > allowed_bytes:
            return None
        if self._is_expandable:
            return extend(pool, size, self._device)
        if not self._device.take(segment_bytes):
            return None
        return Block(self._device.place(segment_bytes, ROUND_BYTES), segment_bytes, pool)

    def _release(self, block: Block) -> None:
        """Return a segment that is one free block (``release_block``)."""
        block.pool.remove(block)
        self._whole_free_bytes -= block.size_bytes
        self._device.give_back(block.size_bytes)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Return blocks that may not be split, until there is room for ``size``.

        The smallest that is large enough alone, else the largest ones together
        (``release_available_cached_blocks``).
        """
        limit = self._max_split_bytes
        if limit == _UNLIMITED_BYTES or self._is_expandable:
            return False
        needed_bytes = max(size, limit)
        position = pool.find(needed_bytes)
        if position < len(pool):
            self._release(pool.at(position))
            return True
        released_bytes = 0
        while released_bytes < needed_bytes and pool.largest_bytes >= limit:
            released_bytes += pool.largest_bytes
            self._release(pool.at(len(pool) - 1))
        return released_bytes >= needed_bytes

    def _collect_garbage(self, allowed_bytes: int) -> None:
        """Return old free segments of the large pools (``garbage_collect_cached_blocks``).

        Those at least as old as the average go first, age being searches since the segment became
        free, and then again, until enough is returned to be below the threshold.
        """
        threshold_bytes = int(self.settings.garbage_collection_threshold * allowed_bytes)
        excess_bytes = self._device.reserved_bytes - threshold_bytes
        if excess_bytes <= 0 or self._is_expandable:
            return
        blocks = [
            block
            for (_, is_small), pool in self._pools.items()
            if not is_small
            for block in pool.blocks
            if not block.is_split
        ]
        while blocks and excess_bytes > 0:
            average = sum(self._searches - block.born for block in blocks) / len(blocks)
            for block in blocks:
                if self._searches - block.born >= average:
                    excess_bytes -= block.size_bytes
                    self._release(block)
            blocks = [block for block in blocks if self._searches - block.born < average]
