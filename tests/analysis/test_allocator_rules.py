"""The allocator's rules one by one, each worked out by hand from CUDACachingAllocator.cpp."""

import pytest

from attnprof.analysis.allocator import AllocatorSettings, CachingAllocator

KIB, MIB = 2**10, 2**20


def allocate(allocator: CachingAllocator, size_bytes: int, stream: int = 0) -> int:
    address = allocator.malloc(size_bytes, stream=stream)
    assert address is not None
    return address


@pytest.mark.parametrize(
    ("size_bytes", "block_bytes"),
    [(1, 512), (511, 512), (512, 512), (513, 2 * 512), (MIB, MIB), (MIB + 1, MIB + 512)],
)
def test_a_block_is_a_multiple_of_512_bytes(size_bytes: int, block_bytes: int) -> None:
    allocator = CachingAllocator()
    allocate(allocator, size_bytes)
    assert allocator.allocated_bytes == block_bytes
    assert allocator.requested_bytes == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "segment_bytes"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounded to 10 MiB
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_a_new_segment_has_the_size_of_its_class(size_bytes: int, segment_bytes: int) -> None:
    allocator = CachingAllocator()
    allocate(allocator, size_bytes)
    assert allocator.reserved_bytes == segment_bytes


def test_small_blocks_share_a_segment_until_it_is_full() -> None:
    allocator = CachingAllocator()
    for _ in range(2 * MIB // (512 * KIB)):
        allocate(allocator, 512 * KIB)
    assert allocator.reserved_bytes == 2 * MIB
    allocate(allocator, 1)
    assert allocator.reserved_bytes == 2 * 2 * MIB


def test_small_and_large_requests_use_different_segments() -> None:
    allocator = CachingAllocator()
    allocate(allocator, MIB + 1)  # leaves nearly 19 MiB free
    allocate(allocator, MIB)
    assert allocator.reserved_bytes == 20 * MIB + 2 * MIB


def test_a_large_block_keeps_a_rest_of_one_mib_and_gives_up_a_larger_one() -> None:
    allocator = CachingAllocator()
    allocate(allocator, 11 * MIB)  # a segment of 12 MiB: the rest, 1 MiB, stays with the block
    assert allocator.allocated_bytes == 12 * MIB
    allocate(allocator, 11 * MIB - 512)  # the rest is 1 MiB and 512 bytes
    assert allocator.allocated_bytes == 12 * MIB + 11 * MIB - 512
    assert allocator.largest_free_block_bytes == MIB + 512


def test_the_smallest_sufficient_block_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocate(allocator, 40 * MIB), allocate(allocator, 30 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocate(allocator, 29 * MIB) == small
    assert allocate(allocator, 31 * MIB) == large
    assert allocator.reserved_bytes == 40 * MIB + 30 * MIB


def test_of_equal_blocks_the_lower_is_taken() -> None:
    allocator = CachingAllocator()
    first, second = allocate(allocator, 30 * MIB), allocate(allocator, 30 * MIB)
    allocator.free(second)
    allocator.free(first)
    assert allocate(allocator, 30 * MIB) == min(first, second)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_merge(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    blocks = [allocate(allocator, 5 * MIB) for _ in range(3)]
    for number in order:
        allocator.free(blocks[number])
    assert allocator.largest_free_block_bytes == 20 * MIB
    assert allocator.inactive_split_bytes == 0


def test_blocks_do_not_merge_over_a_live_one() -> None:
    allocator = CachingAllocator()
    blocks = [allocate(allocator, 5 * MIB) for _ in range(4)]
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    assert allocator.largest_free_block_bytes == 5 * MIB
    assert allocator.inactive_split_bytes == 2 * 5 * MIB
    allocate(allocator, 6 * MIB)  # 10 MiB are free, and no 6 of them together
    assert allocator.reserved_bytes == 2 * 20 * MIB


def test_streams_do_not_share_free_blocks() -> None:
    allocator = CachingAllocator()
    allocator.free(allocate(allocator, 30 * MIB, stream=0))
    allocate(allocator, 30 * MIB, stream=1)
    assert allocator.reserved_bytes == 2 * 30 * MIB


def test_emptying_the_cache_keeps_segments_in_use() -> None:
    allocator = CachingAllocator()
    allocate(allocator, 5 * MIB)
    allocator.free(allocate(allocator, 30 * MIB))
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.inactive_split_bytes == 15 * MIB


def test_a_full_device_gets_the_cache_back_before_a_request_fails() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocate(allocator, 60 * MIB))
    allocate(allocator, 80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.malloc(30 * MIB) is None
    assert allocator.free_bytes == 20 * MIB


def test_without_a_capacity_nothing_fails() -> None:
    allocator = CachingAllocator()
    allocate(allocator, 2**45)
    assert allocator.free_bytes is None


def test_a_block_above_max_split_size_serves_only_requests_near_its_size() -> None:
    settings = AllocatorSettings(max_split_size_bytes=64 * MIB)
    allocator = CachingAllocator(settings)
    allocator.free(allocate(allocator, 100 * MIB))
    allocate(allocator, 30 * MIB)  # may not split the free block
    assert allocator.reserved_bytes == (100 + 30) * MIB
    allocate(allocator, 80 * MIB)  # 20 MiB less: too far away
    assert allocator.reserved_bytes == (100 + 30 + 80) * MIB
    allocate(allocator, 82 * MIB)
    assert allocator.reserved_bytes == (100 + 30 + 80) * MIB
    assert allocator.allocated_bytes == (100 + 30 + 80) * MIB


def test_oversize_blocks_are_released_one_by_one_as_needed() -> None:
    settings = AllocatorSettings(max_split_size_bytes=64 * MIB)
    allocator = CachingAllocator(settings, capacity_bytes=400 * MIB)
    blocks = [allocate(allocator, size * MIB) for size in (20, 70, 100, 200)]
    for block in blocks:
        allocator.free(block)
    allocate(allocator, 64 * MIB)  # the block of 70 MiB is near enough
    allocate(allocator, 64 * MIB)  # no other is; releasing that of 100 MiB makes room
    assert allocator.reserved_bytes == (20 + 70 + 64 + 200) * MIB


def test_roundup_divides_each_power_of_two() -> None:
    allocator = CachingAllocator(AllocatorSettings(roundup_power2_divisions=(4,) * 16))
    assert allocator.round_size(1200) == 3 * 512  # 4 * 512 and less: in steps of 512
    assert allocator.round_size(5 * MIB + 1) == 6 * MIB  # 4, 5, 6, 7, 8 MiB
    assert allocator.round_size(8 * MIB) == 8 * MIB
    assert allocator.round_size(8 * MIB + 1) == 10 * MIB


def test_old_free_segments_are_collected_above_the_threshold() -> None:
    settings = AllocatorSettings(per_process_memory_fraction=0.9, garbage_collection_threshold=0.5)
    allocator = CachingAllocator(settings, capacity_bytes=200 * MIB)
    allocate(allocator, 40 * MIB)
    allocator.free(allocate(allocator, 60 * MIB))
    allocate(allocator, 80 * MIB)  # 100 MiB are more than half of 180: the free 60 MiB go first
    assert allocator.reserved_bytes == (40 + 80) * MIB


def test_garbage_collection_starts_with_the_blocks_free_for_longest() -> None:
    settings = AllocatorSettings(per_process_memory_fraction=0.9, garbage_collection_threshold=0.5)
    allocator = CachingAllocator(settings, capacity_bytes=200 * MIB)
    old, new, other = (allocate(allocator, size * MIB) for size in (20, 30, 42))
    allocator.free(old)
    allocator.free(other)
    allocate(allocator, 42 * MIB)  # age is counted in searches
    allocator.free(new)
    allocate(allocator, 60 * MIB)  # 92 MiB are above half of 180; releasing 20 is enough
    assert allocator.reserved_bytes == (30 + 42 + 60) * MIB


def test_the_memory_fraction_limits_segments() -> None:
    settings = AllocatorSettings(per_process_memory_fraction=0.5)
    allocator = CachingAllocator(settings, capacity_bytes=100 * MIB)
    allocate(allocator, 40 * MIB)
    assert allocator.malloc(12 * MIB) is None


def test_an_expandable_segment_grows_by_pages() -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    first = allocate(allocator, 30 * MIB)
    assert allocator.reserved_bytes == 2 * 20 * MIB
    second = allocate(allocator, 30 * MIB)
    assert second == first + 30 * MIB
    assert allocator.reserved_bytes == 3 * 20 * MIB
    allocate(allocator, 1)
    assert allocator.reserved_bytes == 3 * 20 * MIB + 2 * MIB


def test_an_expandable_segment_uses_its_free_end_where_others_would_split() -> None:
    sizes = [30 * MIB, 31 * MIB, 32 * MIB]
    reserved = {}
    for is_expandable in (False, True):
        allocator = CachingAllocator(AllocatorSettings(expandable_segments=is_expandable))
        for size_bytes in sizes:
            allocator.free(allocate(allocator, size_bytes))
        reserved[is_expandable] = allocator.reserved_bytes
    assert reserved == {False: (30 + 32) * MIB, True: 2 * 20 * MIB}


def test_emptying_the_cache_unmaps_free_pages_of_a_segment_in_use() -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    low = allocate(allocator, 30 * MIB)
    middle = allocate(allocator, 50 * MIB)
    allocate(allocator, 20 * MIB)
    assert allocator.reserved_bytes == 5 * 20 * MIB
    allocator.free(middle)  # from 30 to 80 MiB: the pages from 40 to 80 MiB are free
    allocator.empty_cache()
    assert allocator.reserved_bytes == 3 * 20 * MIB
    assert allocate(allocator, 45 * MIB) == middle  # 10 MiB are mapped still
    assert allocator.reserved_bytes == 5 * 20 * MIB
    allocator.free(low)


def test_an_empty_expandable_segment_is_given_up() -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    allocator.free(allocate(allocator, 30 * MIB))
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    allocate(allocator, MIB + 1)
    assert allocator.reserved_bytes == 20 * MIB


def test_misuse_is_refused() -> None:
    allocator = CachingAllocator()
    address = allocate(allocator, 1)
    allocator.free(address)
    with pytest.raises(ValueError, match=r"no live block has the address \d+; was it freed before"):
        allocator.free(address)
    with pytest.raises(ValueError, match="at least one byte, got 0"):
        allocator.malloc(0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        CachingAllocator(capacity_bytes=-1)
