"""What must hold for any sequence of requests, whatever the settings."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis.allocator import AllocatorSettings, CachingAllocator
from attnprof.analysis.allocator.blocks import Block

MIB = 2**20
SETTINGS = [
    "",
    "expandable_segments:True",
    "max_split_size_mb:20",
    "roundup_power2_divisions:4",
    "large_segment_size_mb:12",
    "per_process_memory_fraction:0.8,garbage_collection_threshold:0.3",
]
SIZES = st.one_of(
    st.integers(1, 4 * 512),
    st.integers(1, 2 * MIB),
    st.integers(MIB, 40 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 20 * MIB]),
)


@dataclass
class Request:
    """An allocation on a stream, the free of one of the live blocks, or emptying the cache."""

    size_bytes: int = 0
    stream: int = 0
    frees: int | None = None


REQUESTS = st.lists(
    st.one_of(
        st.builds(Request, SIZES, st.integers(0, 1)),
        st.builds(Request, frees=st.integers(0, 30)),
        st.builds(Request, SIZES, st.integers(0, 1)),
        st.just(Request()),
    ),
    max_size=60,
)


@dataclass
class Program:
    """Runs requests and remembers what it holds: address to (block's bytes, requested bytes)."""

    allocator: CachingAllocator
    held: dict[int, tuple[int, int]] = field(default_factory=dict)

    def run(self, request: Request) -> None:
        allocator = self.allocator
        if request.size_bytes:
            before = allocator.allocated_bytes
            address = allocator.malloc(request.size_bytes, stream=request.stream)
            if address is not None:
                block_bytes = allocator.allocated_bytes - before
                self.held[address] = (block_bytes, request.size_bytes)
        elif request.frees is None:
            allocator.empty_cache()
        elif self.held:
            address = sorted(self.held)[request.frees % len(self.held)]
            del self.held[address]
            allocator.free(address)


def start_program(settings: str, capacity_bytes: int | None) -> Program:
    return Program(
        CachingAllocator(AllocatorSettings.parse(settings), capacity_bytes=capacity_bytes)
    )


def find_segments(allocator: CachingAllocator) -> list[list[Block]]:
    """Return the blocks of every segment, from its lowest to its highest."""
    known = [*allocator._live.values()]
    for pool in allocator._pools.values():
        known += [*pool.blocks, *pool.unmapped]
    segments = []
    for block in known:
        if block.previous is None:
            segments.append([block])
            while (above := segments[-1][-1].next) is not None:
                segments[-1].append(above)
    assert sum(map(len, segments)) == len(known), "each block is in one segment"
    return segments


requests_with_settings = pytest.mark.parametrize("settings", SETTINGS)
CAPACITIES = st.sampled_from([None, 60 * MIB, 200 * MIB])


@requests_with_settings
@given(requests=REQUESTS, capacity_bytes=CAPACITIES)
def test_reserved_covers_allocated_covers_requested(
    settings: str, requests: list[Request], capacity_bytes: int | None
) -> None:
    program = start_program(settings, capacity_bytes)
    for request in requests:
        program.run(request)
        allocator = program.allocator
        assert allocator.reserved_bytes >= allocator.allocated_bytes >= allocator.requested_bytes
        assert allocator.allocated_bytes == sum(size for size, _ in program.held.values())
        assert allocator.requested_bytes == sum(size for _, size in program.held.values())
        assert allocator.inactive_split_bytes >= 0
        assert allocator.reserved_bytes <= (capacity_bytes or allocator.reserved_bytes)


@requests_with_settings
@given(requests=REQUESTS, capacity_bytes=CAPACITIES)
def test_live_blocks_are_aligned_and_do_not_overlap(
    settings: str, requests: list[Request], capacity_bytes: int | None
) -> None:
    program = start_program(settings, capacity_bytes)
    for request in requests:
        program.run(request)
    ends = 0
    for address, (block_bytes, requested_bytes) in sorted(program.held.items()):
        assert address % 512 == block_bytes % 512 == 0
        assert block_bytes >= requested_bytes
        assert address >= ends
        ends = address + block_bytes


@requests_with_settings
@given(requests=REQUESTS, capacity_bytes=CAPACITIES)
def test_blocks_tile_their_segments(
    settings: str, requests: list[Request], capacity_bytes: int | None
) -> None:
    program = start_program(settings, capacity_bytes)
    for request in requests:
        program.run(request)
        mapped_bytes = 0
        for blocks in find_segments(program.allocator):
            for lower, upper in pairwise(blocks):
                assert upper.previous is lower
                assert lower.address + lower.size_bytes == upper.address
                assert lower.is_live or upper.is_live or lower.is_mapped != upper.is_mapped
            mapped_bytes += sum(block.size_bytes for block in blocks if block.is_mapped)
        assert mapped_bytes == program.allocator.reserved_bytes


@requests_with_settings
@given(requests=REQUESTS, capacity_bytes=CAPACITIES)
def test_nothing_is_left_when_all_is_freed(
    settings: str, requests: list[Request], capacity_bytes: int | None
) -> None:
    program = start_program(settings, capacity_bytes)
    for request in requests:
        program.run(request)
    allocator = program.allocator
    for address in program.held:
        allocator.free(address)
    assert (allocator.allocated_bytes, allocator.requested_bytes) == (0, 0)
    assert allocator.inactive_split_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


@given(requests=REQUESTS)
def test_with_expandable_segments_repeating_a_program_reserves_no_more(
    requests: list[Request],
) -> None:
    program = start_program("expandable_segments:True", None)
    reserved = []
    for _ in range(2):
        for request in requests:
            if request.size_bytes or request.frees is not None:
                program.run(request)
        for address in list(program.held):
            del program.held[address]
            program.allocator.free(address)
        reserved.append(program.allocator.reserved_bytes)
    assert reserved[1] == reserved[0]
