"""How the allocator's history is read, with a made-up ``torch.cuda.memory``: no GPU needed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnprof.capture import cuda
from attnprof.capture.cuda import (
    IDLE_EVENTS,
    OP_PREFIX,
    RING_EVENTS,
    AllocatorHistory,
)
from attnprof.capture.cuda_counters import Counters, describe_pinned
from attnprof.store.schema import RESUMED, SEED, SEGMENT_SEED


def make_event(number: int, action: str = "alloc", metadata: str = "") -> dict[str, Any]:
    return {
        "action": action,
        "addr": 4096 * number,
        "size": 100 + number,
        "stream": 0,
        "time_us": number,
        "user_metadata": metadata,
    }


class Allocator:
    """A history that a test writes, in place of the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, users_own: bool) -> None:
        self.observers: list[Any] = []
        self.trace: list[dict[str, Any]] = []
        self.segments: list[dict[str, Any]] = []
        self.switched: list[Any] = []
        self.rows: list[tuple[Any, ...]] = []
        self.private: list[tuple[int, ...]] = []
        self.tags: list[Any] = []
        self.rings: list[Any] = []
        stats = {"allocated_bytes.all.peak": 7}
        nested = {
            "allocated_bytes": {"all": {"current": 5, "peak": 7}},
            "reserved_bytes": {"all": {"current": 20, "peak": 22}},
        }

        def record(
            enabled: Any, clear_history: bool = False, max_entries: Any = None, **_: Any
        ) -> None:
            self.switched.append(enabled)
            self.rings.append(max_entries)
            if clear_history:
                self.trace.clear()

        memory = torch.cuda.memory
        monkeypatch.setattr(memory, "_snapshot", self.snapshot)
        monkeypatch.setattr(memory, "_record_memory_history", record)
        monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: users_own, raising=False)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: nested)
        monkeypatch.setattr(
            torch._C, "_cuda_attach_out_of_memory_observer", self.observers.append, raising=False
        )
        monkeypatch.setattr(cuda, "_is_watching_failures", False)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "_lazy_call", lambda start: start())

    def snapshot(self) -> dict[str, Any]:
        traces = [list(self.trace)]
        return {"segments": self.segments, "device_traces": traces, "allocator_settings": {}}

    def make_history(self) -> AllocatorHistory:
        recorder: Any = SimpleNamespace(
            allocator_events=self.rows,
            private_segments=self.private,
            before_commit=[],
            find_device=lambda device: 3,
            count_ops=lambda: 40,
        )
        return AllocatorHistory(recorder, lambda *tags: self.tags.append(tags))

    def numbers(self) -> list[int]:
        return [row[2] // 4096 for row in self.rows]


def test_own_history_is_cleared_at_each_commit_and_switched_off_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = Allocator(monkeypatch, users_own=False)
    history = allocator.make_history()
    with history.recording():
        allocator.trace += [make_event(1, metadata=f"{OP_PREFIX}5"), make_event(2, metadata="17")]
        history.collect()
        assert allocator.trace == []
        allocator.trace += [make_event(3)]
        history.collect()
    assert allocator.numbers() == [1, 2, 3]
    assert [row[-1] for row in allocator.rows] == [5, -1, -1]  # "17" is the program's own
    assert allocator.rows[0][:2] == (3, "alloc")
    assert allocator.switched == ["all", "all", "all", None]
    assert history.info["lost_events"] is False
    assert history.info["devices"]["cuda:0"]["end"]["allocated_bytes_peak"] == 7


@pytest.mark.parametrize("read", ["memory_stats", "device_count", "host_memory_stats"])
@pytest.mark.parametrize("users_own", [False, True])
def test_counters_that_cannot_be_read_at_the_end_take_no_exceptions_place(
    monkeypatch: pytest.MonkeyPatch, read: str, users_own: bool
) -> None:
    allocator = Allocator(monkeypatch, users_own=users_own)
    history = allocator.make_history()

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with …")

    def run() -> None:
        with history.recording():
            monkeypatch.setattr(torch.cuda, read, fail, raising=False)
            raise ValueError("the program's own")

    with pytest.raises(ValueError, match="the program's own"):
        run()
    assert allocator.switched == ([] if users_own else ["all", None])
    assert history.info["unread"] == "RuntimeError: CUDA error: device-side assert triggered"


def test_history_of_the_user_is_read_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, users_own=True)
    allocator.trace += [make_event(1)]
    history = allocator.make_history()
    with history.recording():
        allocator.trace += [make_event(2), make_event(3)]
        history.collect()
        history.collect()
        allocator.trace += [make_event(4)]
        history.collect()
    assert allocator.numbers() == [2, 3, 4]  # not what was before the trace
    assert len(allocator.trace) == 4
    assert allocator.switched == []
    assert history.info["lost_events"] is False


def test_events_that_fell_out_of_a_ring_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, users_own=True)
    allocator.trace += [make_event(1), make_event(2)]
    history = allocator.make_history()
    with history.recording():
        allocator.trace[:] = [make_event(2), make_event(3)]  # the ring went on by one
        history.collect()
        assert history.info["lost_events"] is False
        allocator.trace[:] = [make_event(8), make_event(9)]
        history.collect()
    assert allocator.numbers() == [3, 8, 9]
    assert history.info["lost_events"] is True


def test_own_ring_that_is_full_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "RING_EVENTS", 3)
    allocator = Allocator(monkeypatch, users_own=False)
    history = allocator.make_history()
    with history.recording():
        allocator.trace += [make_event(n) for n in range(3)]
        history.collect()
    assert history.info["lost_events"] is True


def test_what_was_there_before_is_listed_with_its_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, users_own=False)
    blocks = [
        {"size": 512, "requested_size": 500, "state": "active_allocated"},
        {"size": 1024, "requested_size": 0, "state": "inactive"},
        {"size": 512, "requested_size": 512, "state": "active_awaiting_free"},
        {"size": 2048, "requested_size": 2000, "state": "active_allocated"},
    ]
    allocator.segments = [
        {"device": 0, "address": 8192, "total_size": 4096, "stream": 9, "blocks": blocks}
    ]
    with allocator.make_history().recording():
        pass
    # A block that other streams still use is not allocated any more, as torch counts.
    assert [row[1:5] for row in allocator.rows] == [
        (SEGMENT_SEED, 8192, 4096, 9),
        (SEED, 8192, 500, 9),
        (SEED, 8192 + 512 + 1024 + 512, 2000, 9),
    ]


def make_private(address: int) -> dict[str, Any]:
    place = {"device": 0, "address": address, "total_size": 4096, "stream": 0}
    return {**place, "segment_pool_id": (0, 5), "blocks": []}


def test_segments_of_private_pools_are_listed_when_segments_have_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = Allocator(monkeypatch, users_own=False)
    first, second, third = (make_private(4096 * n) for n in (10, 20, 30))
    allocator.segments = [first, SEGMENT]
    history = allocator.make_history()
    with history.recording():
        # One by one: how many events there were, device, address, size, pool.
        assert allocator.private == [(3, 3, 4096 * 10, 4096, 1)]
        allocator.segments += [second]
        allocator.trace += [make_event(20, "segment_alloc"), make_event(20)]
        history.collect()
        assert allocator.private[1:] == [(5, 3, 4096 * 20, 4096, 1)]
        allocator.trace += [make_event(21)]
        history.collect()
        assert len(allocator.private) == 2
        allocator.segments = [third | {"segment_pool_id": (7, 0)}, second]
        allocator.trace += [make_event(10, "segment_free"), make_event(30, "segment_alloc")]
        history.collect()
        assert allocator.private[2:] == [
            (8, 3, 4096 * 20, 4096, 1),  # again: another could have had its place in between
            (8, 3, 4096 * 30, 4096, 2),
        ]
        history.pause()
        history.resume()
        assert len(allocator.private) == 6


def test_allocator_without_a_history_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, users_own=False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    history = allocator.make_history()
    with history.recording():
        history.collect()
    assert history.info == {"backend": "cudaMallocAsync"}
    assert allocator.switched == []
    assert allocator.rows == []


SEGMENT = {
    "device": 0,
    "address": 8192,
    "total_size": 4096,
    "stream": 9,
    "blocks": [{"size": 512, "requested_size": 500, "state": "active_allocated"}],
}
SEEDED = [(RESUMED, 0, 0, 0), (SEGMENT_SEED, 8192, 4096, 9), (SEED, 8192, 500, 9)]


def test_counters_are_those_of_devices_that_have_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    history = Allocator(monkeypatch, users_own=False).make_history()
    assert history.count() == {}  # CUDA was not used yet
    with history.recording():
        assert history.count() == {0: Counters(5, 7, 20, 22)}


def test_history_that_pauses_goes_on_with_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, users_own=False)
    history = allocator.make_history()
    with history.recording():
        history.pause()
        allocator.trace += [make_event(1)]
        history.collect()
        assert allocator.rows == []
        allocator.segments = [SEGMENT]
        history.resume()
        allocator.trace += [make_event(2)]
        history.collect()
    assert [row[1:5] for row in allocator.rows[:3]] == SEEDED
    assert {row[-1] for row in allocator.rows[:3]} == {40}  # so many ops had finished
    assert allocator.numbers()[3:] == [2]
    assert allocator.rings[1:3] == [IDLE_EVENTS, RING_EVENTS]


def test_history_of_the_user_pauses_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, users_own=True)
    history = allocator.make_history()
    with history.recording():
        allocator.trace += [make_event(1)]
        history.collect()
        history.pause()
        allocator.trace += [make_event(2)]
        history.resume()
        allocator.trace += [make_event(3)]
        history.collect()
    told = [row for row in allocator.rows if row[1] == "alloc"]
    assert [row[2] // 4096 for row in told] == [1, 3]
    assert allocator.switched == []


def test_request_that_fails_meanwhile_is_noted_with_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = Allocator(monkeypatch, users_own=False)
    history = allocator.make_history()
    with history.recording():
        history.pause()
        (hear,) = allocator.observers
        allocator.segments = [SEGMENT]
        failed = {"action": "oom", "device_free": 64, "size": 512, "stream": 0, "time_us": 3}
        allocator.trace += [make_event(1), failed]
        hear(0, 2 << 20, 1 << 30, 64)
        rows = [row[1:5] for row in allocator.rows]
        assert rows == [*SEEDED, ("oom", 64, 512, 0)]
        history.resume()
        hear(0, 2 << 20, 1 << 30, 64)  # recorded by the history itself from now on
        assert len(allocator.rows) == 4 + len(SEEDED)
    hear(0, 2 << 20, 1 << 30, 64)
    assert len(allocator.rows) == 4 + len(SEEDED)


def test_failures_are_watched_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch, users_own=False)
    for _ in range(2):
        history = allocator.make_history()
        with history.recording():
            history.pause()
            history.resume()
    assert len(allocator.observers) == 1


@pytest.mark.parametrize(
    ("held", "used"),
    [("allocated_bytes", "active_bytes"), ("reserved_bytes", "allocated_bytes")],  # since 2.10
)
def test_pinned_memory_is_read_by_the_names_of_every_torch(held: str, used: str) -> None:
    stats = {f"{held}.current": 4, f"{held}.peak": 8, f"{used}.current": 1, f"{used}.peak": 2}
    assert describe_pinned(stats) == {
        "allocated_bytes_current": 4,
        "allocated_bytes_peak": 8,
        "active_bytes_current": 1,
        "active_bytes_peak": 2,
    }


def test_nothing_is_said_of_pinned_memory_where_there_is_none() -> None:
    assert describe_pinned({}) == {}
    assert describe_pinned({"allocated_bytes.peak": 0, "active_bytes.peak": 0}) == {}
