"""The CUDA caching allocator's own history: every private call into ``torch.cuda`` lives here.

The history is the truth for sizes and lifetimes on a GPU: it sees what ops take inside
themselves and what compiled code takes. While an op runs, `capture.ops` has the allocator note the
op's number with every block that the op's thread takes or gives back.

Known limitations:
    The native allocator only; with ``cudaMallocAsync`` or a pluggable allocator there is no
    history, and the ledger's view of storages is all there is.
    When a block that other streams use can serve again is not recorded: it counts as free from
    when the program let go of it, as in ``torch.cuda.memory_allocated``.
    The history is a ring. What fell out of it between two commits is gone; run.json says so.
    ``docs/gpu.md`` says which parts have run on a GPU.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attnprof.capture.devices import GpuReader
from attnprof.capture.recorder import Recorder
from attnprof.store.schema import SEED, SEGMENT_SEED

RING_EVENTS = 1_000_000
"""Events the allocator keeps between two commits; a step of a large model makes some 10 000."""

OP_PREFIX = "attnprof:"
"""An allocation's metadata is this and the number of the op that made it."""

COUNTERS = ("allocated_bytes", "reserved_bytes")
"""What is read of ``torch.cuda.memory_stats``, to hold the answers against."""


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
        ("allocations tagged with ops", _has("_set_memory_metadata"), "_set_memory_metadata"),
    ]


class AllocatorHistory:
    """Records the allocator's events of all devices for as long as a trace runs."""

    def __init__(
        self,
        recorder: Recorder,
        tag_ops: Callable[[Callable[[str], None], Callable[[], str] | None], None],
    ) -> None:
        """Record into ``recorder``.

        Args:
            recorder: What writes the events down.
            tag_ops: Called when recording starts, with what sets the calling thread's metadata,
                and what returns it where the program may have set it.
        """
        self._recorder = recorder
        self._tag_ops = tag_ops
        self._is_started = False
        self._is_ours = False
        self._newest: dict[int, dict[str, Any]] = {}
        """Per device, the last event that was moved to the recorder."""
        self.info: dict[str, Any] = {}
        """What run.json says under ``allocator``; empty if CUDA was not used."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the history on for the time being, and the user's own as it was."""
        if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # not annotated
            yield
            return
        queued: list[Any] = torch.cuda._queued_calls
        # Recording would create a CUDA context, hundreds of MiB that the program may never need.
        # Where it uses CUDA later, torch calls this before anything is allocated.
        torch.cuda._lazy_call(self._start)  # type: ignore[no-untyped-call]  # not annotated
        self._recorder.before_commit.append(self.collect)
        try:
            yield
        finally:
            queued[:] = [each for each in queued if each[0] != self._start]
            self._recorder.before_commit.remove(self.collect)
            if self._is_started:
                self._read_counters("end")
                self._read_process()
                if self._is_ours:
                    torch.cuda.memory._record_memory_history(enabled=None)

    def collect(self) -> None:
        """Move events that are new since the last call to the recorder."""
        if not self._is_started:
            return
        snapshot = torch.cuda.memory._snapshot()
        for device, trace in enumerate(snapshot["device_traces"]):
            if not trace:
                continue
            new = trace[self._find_new(device, trace) :]
            self._newest[device] = trace[-1]
            self._add(device, (_read_event(event) for event in new))
        if self._is_ours:
            torch.cuda.memory._record_memory_history(**_cheapest_settings())
            self._newest.clear()

    def _find_new(self, device: int, trace: list[dict[str, Any]]) -> int:
        """Return the position of the first event that is new; note it if some were dropped."""
        newest = self._newest.get(device)
        if newest is None:
            if self._is_ours and len(trace) >= RING_EVENTS:
                self.info["lost_events"] = True
            return 0
        known = _identify(newest)
        for position in range(len(trace) - 1, -1, -1):
            if _identify(trace[position]) == known:
                return position + 1
        self.info["lost_events"] = True  # the ring went round, or someone cleared it
        return 0

    def _start(self) -> None:
        backend = torch.cuda.get_allocator_backend()
        self.info = {"backend": backend}
        if backend != "native" or not _has("_record_memory_history"):
            return
        self._is_started = True
        self._is_ours = not torch._C._cuda_isHistoryEnabled()
        if self._is_ours:
            torch.cuda.memory._record_memory_history(**_cheapest_settings())
        snapshot = torch.cuda.memory._snapshot()
        self.info |= {"settings": snapshot.get("allocator_settings", {}), "lost_events": False}
        traces = enumerate(snapshot["device_traces"])
        self._newest = {} if self._is_ours else {d: trace[-1] for d, trace in traces if trace}
        for segment in snapshot["segments"]:
            self._add(segment["device"], _list_seeds(segment))
        self._read_counters("begin")
        if _has("_set_memory_metadata"):
            get_tag = getattr(torch.cuda.memory, "_get_memory_metadata", None)
            get_tag = None if self._is_ours else get_tag
            self._tag_ops(torch.cuda.memory._set_memory_metadata, get_tag)

    def _add(self, device: int, rows: Iterator[tuple[Any, ...]]) -> None:
        number = self._recorder.find_device(torch.device("cuda", device))
        self._recorder.allocator_events.extend((number, *row) for row in rows)

    def _read_counters(self, when: str) -> None:
        """Note torch's own counters of every device; a device without any has zeros."""
        devices = self.info.setdefault("devices", {})
        for device in range(torch.cuda.device_count()):
            stats = torch.cuda.memory_stats(device)
            counted = {
                f"{name}_{which}": stats.get(f"{name}.all.{which}", 0)
                for name in COUNTERS
                for which in ("current", "peak")
            }
            devices.setdefault(f"cuda:{device}", {})[when] = counted

    def _read_process(self) -> None:
        """Note what NVML counts for the whole process, the CUDA context and libraries included."""
        gpus = GpuReader()
        for device, own_bytes, *_ in gpus.read():
            if device in self.info["devices"] and own_bytes:
                self.info["devices"][device]["end"]["process_bytes"] = own_bytes
        gpus.close()


def _identify(event: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(event.get(key) for key in ("action", "addr", "size", "stream", "time_us"))


def _read_event(event: dict[str, Any]) -> tuple[Any, ...]:
    """Return an event as a row of the table ``allocator_events``, but for the device."""
    metadata = event.get("user_metadata") or ""
    number = metadata.removeprefix(OP_PREFIX)
    return (
        event["action"],
        # An out-of-memory event has no address; it says how much was free instead.
        event.get("addr", event.get("device_free", 0)),
        event["size"],
        event.get("stream", 0),
        1000 * event.get("time_us", 0),
        int(number) if number != metadata and number.isdigit() else -1,
    )


def _list_seeds(segment: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield a segment that was reserved before the history began, and the blocks in it."""
    address, stream = segment["address"], segment["stream"]
    yield SEGMENT_SEED, address, segment["total_size"], stream, 0, -1
    for block in segment["blocks"]:
        address = block.get("address", address)
        if block["state"] == "active_allocated":
            yield SEED, address, block.get("requested_size", block["size"]), stream, 0, -1
        address += block["size"]


def _cheapest_settings() -> dict[str, Any]:
    """Return the arguments that record events without stacks, in this version of torch."""
    wanted: dict[str, Any] = {
        "enabled": "all",
        "context": None,
        "stacks": "python",
        "max_entries": RING_EVENTS,
        "clear_history": True,
        # Halves the events of frees; those that are left are when the counters fall.
        "skip_actions": ["free_completed"],
    }
    signature = inspect.signature(torch.cuda.memory._record_memory_history_impl)
    return {name: value for name, value in wanted.items() if name in signature.parameters}


def _has(name: str) -> bool:
    return hasattr(torch.cuda.memory, name)
