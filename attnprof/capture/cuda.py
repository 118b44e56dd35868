"""The CUDA caching allocator's own history: every private call into ``torch.cuda`` lives here.

The history is the truth for sizes and lifetimes on a GPU: it sees what ops take inside
themselves and what compiled code takes. Each allocation carries the number of the op that was
running, which `capture.ops` sets as the allocator's user metadata in the thread that allocates.

Known limitations:
    The native allocator only; with ``cudaMallocAsync`` or a pluggable allocator there is no
    history, and the ledger's view of storages is all there is.
    Allocations of a program that first uses CUDA inside the trace carry no op numbers.
    The history is a ring. What fell out of it between two commits is gone; `lost_events` says so.
    ``docs/gpu.md`` says which parts have run on a GPU.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attnprof.capture.recorder import Recorder

RING_EVENTS = 1_000_000
"""Events the allocator keeps between two commits; a step of a large model makes some 10 000."""

SEED = "seed"
"""`allocator_events.action` of a block that was taken before the history began."""


def describe_support() -> list[tuple[str, bool, str]]:
    """Return (feature, present, explanation) for what the allocator adapter needs."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # not annotated
        return [("CUDA", False, "this torch is built without CUDA")]
    if not torch.cuda.is_available():
        return [("CUDA", False, "torch has CUDA, but no usable GPU or driver was found")]
    backend = torch.cuda.get_allocator_backend()
    return [
        ("CUDA", True, f"{torch.cuda.device_count()} device(s), CUDA {torch.version.cuda}"),
        ("native allocator", backend == "native", f"allocator backend is {backend}"),
        ("allocator history", _has("_record_memory_history"), "torch.cuda.memory"),
        ("allocations tagged with ops", _find_tagger() is not None, "_set_memory_metadata"),
    ]


class AllocatorHistory:
    """Records the allocator's events of all devices for as long as a trace runs."""

    def __init__(self, recorder: Recorder) -> None:
        """Record into ``recorder``."""
        self._recorder = recorder
        self._is_started = False
        self._is_ours = False
        self._seen: dict[int, int] = {}
        self.lost_events = False
        """Whether events fell out of the ring before they were read; goes into run.json."""

    @property
    def tag(self) -> Callable[[str], None] | None:
        """The function that tags this thread's allocations, where the allocator has one."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # not annotated
            return None
        return _find_tagger()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the history on for the time being, and the user's own as it was."""
        self._start()
        self._recorder.before_commit.append(self.collect)
        tag = self.tag
        users_own = torch.cuda.memory._get_memory_metadata() if tag else ""
        try:
            yield
        finally:
            self._recorder.before_commit.remove(self.collect)
            if tag:
                tag(users_own)
            if self._is_ours:
                torch.cuda.memory._record_memory_history(enabled=None)

    def collect(self) -> None:
        """Move events that are new since the last call to the recorder."""
        self._start()
        if not self._is_started:
            return
        snapshot = torch.cuda.memory._snapshot()
        for device, trace in enumerate(snapshot["device_traces"]):
            begin = self._seen.get(device, 0)
            if len(trace) < begin:  # someone cleared the history
                begin = 0
            if len(trace) >= RING_EVENTS and self._is_ours:
                self.lost_events = True
            rows = [_read_event(device, event) for event in trace[begin:]]
            self._recorder.allocator_events.extend(rows)
            self._seen[device] = len(trace)
        if self._is_ours:
            torch.cuda.memory._record_memory_history(**_cheapest_settings())
            self._seen.clear()

    def _start(self) -> None:
        # Recording would create a CUDA context, hundreds of MiB that the program may never need.
        if (
            self._is_started
            or not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # not annotated
            or not _has("_record_memory_history")
        ):
            return
        if torch.cuda.get_allocator_backend() != "native":
            return
        self._is_started = True
        self._is_ours = not torch._C._cuda_isHistoryEnabled()
        if self._is_ours:
            torch.cuda.memory._record_memory_history(**_cheapest_settings())
        snapshot = torch.cuda.memory._snapshot()
        self._seen = {d: len(trace) for d, trace in enumerate(snapshot["device_traces"])}
        self._recorder.allocator_events.extend(_read_seeds(snapshot))


def _read_event(device: int, event: dict[str, Any]) -> tuple[Any, ...]:
    """Return an event as a row of the table ``allocator_events``."""
    metadata = event.get("user_metadata") or ""
    return (
        device,
        event["action"],
        # An out-of-memory event has no address; it says how much was free instead.
        event.get("addr", event.get("device_free", 0)),
        event["size"],
        event.get("stream", 0),
        1000 * event.get("time_us", 0),
        int(metadata) if metadata.isdigit() else -1,
    )


def _read_seeds(snapshot: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return the blocks that were taken before the history began, from the segments."""
    rows: list[tuple[Any, ...]] = []
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"]:
            address = block.get("address", address)
            if block["state"].startswith("active"):
                device, stream = segment["device"], segment["stream"]
                rows.append((device, SEED, address, block["size"], stream, 0, -1))
            address += block["size"]
    return rows


def _cheapest_settings() -> dict[str, Any]:
    """Return the arguments that record events without stacks, in this version of torch."""
    wanted: dict[str, Any] = {
        "enabled": "all",
        "context": None,
        "stacks": "python",
        "max_entries": RING_EVENTS,
        "clear_history": True,
        "skip_actions": ["free_requested"],  # halves the events and moves no peak
    }
    signature = inspect.signature(torch.cuda.memory._record_memory_history_impl)
    return {name: value for name, value in wanted.items() if name in signature.parameters}


def _has(name: str) -> bool:
    return hasattr(torch.cuda.memory, name)


def _find_tagger() -> Callable[[str], None] | None:
    found: Callable[[str], None] | None = getattr(
        torch.cuda.memory, "_set_memory_metadata", None
    ) or getattr(torch._C, "_cuda_setMemoryMetadata", None)
    return found
