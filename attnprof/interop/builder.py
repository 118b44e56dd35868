"""Write a memory snapshot as PyTorch would have recorded it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attnprof.analysis.allocator import AllocatorSettings, CachingAllocator
from attnprof.store.schema import SHARED_POOL

Frame = dict[str, Any]
Entry = dict[str, Any]

_SMALL_SEGMENT_BYTES = 2 * 2**20


@dataclass(slots=True)
class _Block:
    """A live block."""

    requested_bytes: int
    size_bytes: int
    frames: list[Frame]
    category: str | None


@dataclass(slots=True)
class _Device:
    """What a device holds, and what happened on it."""

    allocator: CachingAllocator
    trace: list[Entry] = field(default_factory=list)
    segments: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Size and stream by address."""
    live: dict[int, _Block] = field(default_factory=dict)


class SnapshotBuilder:
    """Allocations and frees in, a snapshot in the form of ``torch.cuda.memory._snapshot()`` out.

    Addresses and segments are those that CUDA's caching allocator would choose on an empty device
    without limit.
    """

    def __init__(self, settings: AllocatorSettings | None = None) -> None:
        """Start with nothing recorded.

        Args:
            settings: The allocator's options; without, torch's defaults.
        """
        self.is_recording = True
        """Whether events go into the trace; what happens without is only seen in its segments."""
        self._settings = settings or AllocatorSettings()
        self._devices: dict[int, _Device] = {}

    def allocate(
        self,
        size_bytes: int,
        *,
        device: int = 0,
        stream: int = 0,
        time_us: int = 0,
        frames: Sequence[Frame] = (),
        category: str | None = None,
    ) -> int:
        """Take a block and return its address.

        Args:
            size_bytes: At least 1.
            device: Number of the GPU.
            stream: Number of the stream.
            time_us: When, in microseconds.
            frames: The stack, innermost first. Pass the same list for the same stack.
            category: What memory_viz colours it by; without, it has none.
        """
        own = self._device(device)
        allocator = own.allocator
        reserved, allocated = allocator.reserved_bytes, allocator.allocated_bytes
        address = allocator.malloc(size_bytes, stream=stream)
        assert address is not None, "an allocator without limit has room"
        stack = frames if isinstance(frames, list) else list(frames)
        grown = allocator.reserved_bytes - reserved
        if grown:
            own.segments[address] = (grown, stream)
            self._record(own, "segment_alloc", address, grown, stream, time_us, stack)
        own.live[address] = _Block(
            size_bytes, allocator.allocated_bytes - allocated, stack, category
        )
        self._record(own, "alloc", address, size_bytes, stream, time_us, stack, category)
        return address

    def free(self, address: int, *, device: int = 0, stream: int = 0, time_us: int = 0) -> None:
        """Let go of a block."""
        own = self._device(device)
        block = own.live.pop(address)
        own.allocator.free(address)
        for action in ("free_requested", "free_completed"):
            size, frames, category = block.requested_bytes, block.frames, block.category
            self._record(own, action, address, size, stream, time_us, frames, category)

    def count_allocated_bytes(self, device: int = 0) -> int:
        """Return the bytes of a device's live blocks, as large as the allocator made them."""
        return self._device(device).allocator.allocated_bytes

    def build(self) -> dict[str, Any]:
        """Return the snapshot."""
        count = max(self._devices, default=-1) + 1
        traces = [self._devices[d].trace if d in self._devices else [] for d in range(count)]
        segments = [
            segment
            for number, device in sorted(self._devices.items())
            for segment in _describe_segments(number, device)
        ]
        return {
            "segments": segments,
            "device_traces": traces,
            "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": ""},
            "external_annotations": [],
        }

    def _device(self, number: int) -> _Device:
        if number not in self._devices:
            self._devices[number] = _Device(CachingAllocator(self._settings))
        return self._devices[number]

    def _record(
        self,
        device: _Device,
        action: str,
        address: int,
        size_bytes: int,
        stream: int,
        time_us: int,
        frames: list[Frame],
        category: str | None = None,
    ) -> None:
        if not self.is_recording:
            return
        entry: Entry = {
            "action": action,
            "addr": address,
            "size": size_bytes,
            "stream": stream,
            "time_us": time_us,
            "compile_context": "N/A",
            "user_metadata": "",
            "pool_id": SHARED_POOL,
            "frames": frames,
        }
        if category is not None:
            entry["category"] = category
        device.trace.append(entry)


def _describe_segments(number: int, device: _Device) -> list[Entry]:
    """Return a device's segments with their blocks, live and free, in order of addresses."""
    addresses = sorted(device.live)
    found: list[Entry] = []
    position = 0
    for begin, (size, stream) in sorted(device.segments.items()):
        blocks: list[Entry] = []
        at = begin
        while position < len(addresses) and addresses[position] < begin + size:
            start = addresses[position]
            block = device.live[start]
            if at < start:
                blocks.append(_describe_gap(at, start))
            blocks.append(_describe_block(start, block))
            at = start + block.size_bytes
            position += 1
        if at < begin + size:
            blocks.append(_describe_gap(at, begin + size))
        live = [b for b in blocks if b["state"] != "inactive"]
        in_use = sum(b["size"] for b in live)
        found.append(
            {
                "device": number,
                "address": begin,
                "total_size": size,
                "allocated_size": in_use,
                "active_size": in_use,
                "requested_size": sum(b["requested_size"] for b in live),
                "stream": stream,
                "segment_type": "small" if size == _SMALL_SEGMENT_BYTES else "large",
                "segment_pool_id": SHARED_POOL,
                "is_expandable": False,
                "frames": [],
                "blocks": blocks,
            }
        )
    return found


def _describe_block(address: int, block: _Block) -> Entry:
    entry: Entry = {
        "address": address,
        "size": block.size_bytes,
        "requested_size": block.requested_bytes,
        "state": "active_allocated",
        "frames": block.frames,
    }
    return entry if block.category is None else {**entry, "category": block.category}


def _describe_gap(begin: int, end: int) -> Entry:
    size = end - begin
    return {
        "address": begin, "size": size, "requested_size": 0, "state": "inactive", "frames": [],
    }  # fmt: skip
