"""The CUDA caching allocator's own history, through the private part of ``torch.cuda``.

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

from attnprof.capture.cuda_counters import (
    Counters,
    count_devices,
    note_process,
    read_counters,
    read_pinned,
)
from attnprof.capture.endings import text_of
from attnprof.capture.recorder import Recorder
from attnprof.store.schema import RESUMED, SEED, SEGMENT_SEED, SHARED_POOL

RING_EVENTS = 1_000_000
"""Events the allocator keeps between two commits; a step of a large model makes some 10 000."""

OP_PREFIX = "attnprof:"
"""An allocation's metadata is this and the number of the op that made it."""

_TAKES_SEGMENTS = {"segment_alloc", "segment_map"}
_GIVES_SEGMENTS = {"segment_free", "segment_unmap"}
IDLE_EVENTS = 1000
"""Events the allocator keeps while steps are only counted: enough to hold a failed request."""


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
        ("allocations tagged with ops", _has("_set_memory_metadata"), "torch 2.10 and newer"),
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
        self._is_paused = False
        self._newest: dict[int, dict[str, Any]] = {}
        """Per device, the last event that was moved to the recorder."""
        self._moved_events = 0
        """How many events the recorder was given."""
        self._pools: dict[tuple[int, int], int] = {}
        """Numbers of private pools by what torch calls them."""
        self._private: set[tuple[int, ...]] = set()
        """The private segments that the recorder knows of."""
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
            self._leave_failures()
            queued[:] = [each for each in queued if each[0] != self._start]
            self._recorder.before_commit.remove(self.collect)
            if self._is_started:
                self._end()

    def _end(self) -> None:
        """Switch the history off and note what torch counts; raise nothing.

        Once a kernel failed, calls into CUDA raise, and what the program raised is to pass on.
        """
        try:
            if self._is_ours:  # first: recording does not stay on, whatever cannot be read
                torch.cuda.memory._record_memory_history(enabled=None)
            self._note_counters("end")
            note_process(self.info["devices"])
            self._read_pools()
            if pinned := read_pinned():
                self.info["pinned"] = pinned
        except Exception as error:
            first_line = text_of(error).partition("\n")[0]
            self.info["unread"] = f"{type(error).__name__}: {first_line}"

    def collect(self) -> None:
        """Move events that are new since the last call to the recorder."""
        if not self._is_started or self._is_paused:
            return
        snapshot = torch.cuda.memory._snapshot()
        actions: set[str] = set()
        for device, trace in enumerate(snapshot["device_traces"]):
            if not trace:
                continue
            new = trace[self._find_new(device, trace) :]
            self._newest[device] = trace[-1]
            self._add(device, (_read_event(event) for event in new))
            actions.update(event["action"] for event in new)
        if not actions.isdisjoint(_TAKES_SEGMENTS | _GIVES_SEGMENTS):
            self._add_private(snapshot, anew=not actions.isdisjoint(_GIVES_SEGMENTS))
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
            self._add(segment["device"], _list_seeds(segment, -1))
        self._add_private(snapshot, anew=True)
        self._note_counters("begin")
        self.info["notes_ops"] = _has("_set_memory_metadata")
        if self.info["notes_ops"]:
            get_tag = getattr(torch.cuda.memory, "_get_memory_metadata", None)
            get_tag = None if self._is_ours else get_tag
            self._tag_ops(torch.cuda.memory._set_memory_metadata, get_tag)

    def count(self) -> dict[int, Counters]:
        """Return torch's counters of every device that has memory; none before CUDA is used."""
        if not self._is_started:
            return {}
        return count_devices()

    def pause(self) -> None:
        """Record no events for a while; all up to now have been collected."""
        global _paused
        self._is_paused = True
        _paused = self
        _watch_failures()
        if self._is_ours:
            torch.cuda.memory._record_memory_history(
                **_cheapest_settings() | {"max_entries": IDLE_EVENTS}
            )

    def resume(self) -> None:
        """Record events again, after what is there by now."""
        self._is_paused = False
        self._leave_failures()
        if self._is_ours:
            torch.cuda.memory._record_memory_history(**_cheapest_settings())
        self._seed_again()

    def _leave_failures(self) -> None:
        global _paused
        if _paused is self:
            _paused = None

    def note_failure(self, device: int) -> None:
        """Note a request that failed while events are not recorded, and what was there then."""
        snapshot = self._seed_again()
        failed = [e for e in snapshot["device_traces"][device] if e["action"] == "oom"]
        self._add(device, (_read_event(event) for event in failed[-1:]))

    def _seed_again(self) -> dict[str, Any]:
        snapshot: dict[str, Any] = torch.cuda.memory._snapshot()
        op = self._recorder.count_ops()
        for device, trace in enumerate(snapshot["device_traces"]):
            if torch.cuda.memory_stats_as_nested_dict(device):
                self._add(device, iter([(RESUMED, 0, 0, 0, 0, op)]))
            if trace and not self._is_ours:
                self._newest[device] = trace[-1]
        for segment in snapshot["segments"]:
            self._add(segment["device"], _list_seeds(segment, op))
        self._add_private(snapshot, anew=True)
        return snapshot

    def _add(self, device: int, rows: Iterator[tuple[Any, ...]]) -> None:
        number = self._recorder.find_device(torch.device("cuda", device))
        events = [(number, *row) for row in rows]
        self._recorder.allocator_events.extend(events)
        self._moved_events += len(events)

    def _add_private(self, snapshot: dict[str, Any], *, anew: bool) -> None:
        """Note which segments belong to private pools; of most releases the events do not say it.

        Args:
            snapshot: The allocator's.
            anew: Whether to note those too that were noted before: others may have had their place.
        """
        found: set[tuple[int, ...]] = set()
        for segment in snapshot["segments"]:
            pool = _find_pool(segment)
            if pool != SHARED_POOL:
                number = self._pools.setdefault(pool, len(self._pools) + 1)
                device = self._recorder.find_device(torch.device("cuda", segment["device"]))
                found.add((device, segment["address"], segment["total_size"], number))
        new = sorted(found if anew else found - self._private)
        self._recorder.private_segments.extend((self._moved_events, *each) for each in new)
        self._private = found

    def _note_counters(self, when: str) -> None:
        devices = self.info.setdefault("devices", {})
        for device, counted in read_counters().items():
            devices.setdefault(device, {})[when] = counted

    def _read_pools(self) -> None:
        """Note what private pools (of CUDA graphs, ``torch.cuda.MemPool``) hold in the end."""
        for segment in torch.cuda.memory._snapshot()["segments"]:
            if _find_pool(segment) != SHARED_POOL:
                counted = self.info["devices"][f"cuda:{segment['device']}"]["end"]
                counted["private_bytes"] = counted.get("private_bytes", 0) + segment["total_size"]


def _find_pool(segment: dict[str, Any]) -> tuple[int, int]:
    first, second = segment.get("segment_pool_id", SHARED_POOL)
    return first, second


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


def _list_seeds(segment: dict[str, Any], op: int) -> Iterator[tuple[Any, ...]]:
    """Yield a segment that is there when recording begins, and the blocks in it.

    Args:
        segment: Of a snapshot.
        op: How many ops had finished when recording went on; -1 where it begins.
    """
    address, stream = segment["address"], segment["stream"]
    yield SEGMENT_SEED, address, segment["total_size"], stream, 0, op
    for block in segment["blocks"]:
        address = block.get("address", address)
        if block["state"] == "active_allocated":
            yield SEED, address, block.get("requested_size", block["size"]), stream, 0, op
        address += block["size"]


_paused: AllocatorHistory | None = None
"""The history that is off while steps are only counted."""
_is_watching_failures = False


def _watch_failures() -> None:
    """Hear of requests that fail while events are not recorded.

    torch has no way to take such an observer away again, so there is one per process; it does
    nothing unless a trace counts steps.
    """
    global _is_watching_failures
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if _is_watching_failures or attach is None:
        return

    def hear(device: int, requested: int, total: int, free: int) -> None:
        if _paused is not None:
            _paused.note_failure(device)

    attach(hear)
    _is_watching_failures = True


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
