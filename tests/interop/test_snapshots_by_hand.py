"""Snapshots made by hand: what is read from them, and what is refused."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnprof
from attnprof.errors import CaptureError, SnapshotError
from attnprof.interop.builder import SnapshotBuilder
from attnprof.interop.importing import import_snapshot
from attnprof.interop.snapshot import read_snapshot
from attnprof.report.json import render_json
from attnprof.report.summary import summarise
from attnprof.run import Run
from attnprof.store.schema import RUN_FILE
from attnprof.store.writer import RunWriter
from tests.interop.recordings import write_pickle

KIB, MIB = 2**10, 2**20
SEGMENT = 7 << 40
BLOCK = 512


def run_of(tmp_path: Path, snapshot: object) -> Run:
    """Return the run that a snapshot is imported as."""
    import_snapshot(write_pickle(tmp_path / "by-hand.pickle", snapshot), tmp_path / "run")
    return attnprof.load(tmp_path / "run")


def entry(action: str, address: int, size: int, **more: Any) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, **more}


def segment(blocks: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    size = sum(block["size"] for block in blocks)
    return {
        "device": 0,
        "address": SEGMENT,
        "total_size": size,
        "stream": 0,
        "blocks": blocks,
    } | more


def block(size: int, *, live: bool = True, requested: int | None = None) -> dict[str, Any]:
    state = "active_allocated" if live else "inactive"
    return {"size": size, "requested_size": requested or size, "state": state}


def test_block_live_before_and_after_counts_all_the_time(tmp_path: Path) -> None:
    trace = [entry("alloc", SEGMENT + BLOCK, 100), entry("free_completed", SEGMENT + BLOCK, 100)]
    snapshot = {
        "segments": [segment([block(BLOCK), block(2 * MIB - BLOCK, live=False)])],
        "device_traces": [trace],
    }
    run = run_of(tmp_path, snapshot)
    assert run.peak().total_bytes == 2 * BLOCK
    assert run.peak().by_category() == {"preexisting": BLOCK, "unattributed": BLOCK}


def test_free_memory_of_a_private_pool_helps_no_failed_request(tmp_path: Path) -> None:
    free, private = block(20 * MIB - BLOCK, live=False), SEGMENT + 64 * MIB
    segments = [
        segment([block(BLOCK), free]),
        segment([block(BLOCK), free], address=private, segment_pool_id=(0, 5)),
        segment([free], address=SEGMENT + 128 * MIB, segment_pool_id=(3, 0)),
    ]
    oom = {"action": "oom", "device_free": MIB, "size": 30 * MIB, "stream": 0}
    trace = [entry("alloc", SEGMENT, BLOCK), entry("segment_alloc", private, 20 * MIB)]
    trace += [entry("alloc", private, BLOCK), oom]
    run = run_of(tmp_path, {"segments": segments, "device_traces": [trace]})
    failure = run.out_of_memory()
    assert failure is not None
    assert failure.state.allocated_bytes == 2 * failure.state.private_bytes == 2 * BLOCK
    assert failure.state.free_bytes == 3 * (20 * MIB - BLOCK)
    assert failure.state.private_free_bytes == 2 * (20 * MIB - BLOCK)
    assert failure.missing_bytes == 30 * MIB - (20 * MIB - BLOCK) - MIB
    assert not failure.is_fragmented
    assert failure.fits_with_expandable_segments is False


def test_block_freed_in_the_trace_was_live_before_it(tmp_path: Path) -> None:
    trace = [entry("free_requested", SEGMENT, 700), entry("free_completed", SEGMENT, 700)]
    run = run_of(tmp_path, {"segments": [], "device_traces": [trace]})
    assert run.peak().by_category() == {
        "preexisting": 2 * BLOCK
    }  # 700 bytes take two blocks of 512
    assert run.allocations["end_ns"].null_count() == 0


def test_block_that_another_stream_uses_is_not_allocated_but_not_free(tmp_path: Path) -> None:
    trace = [
        entry("alloc", SEGMENT, 4 * BLOCK),
        entry("free_requested", SEGMENT, 4 * BLOCK),
        entry("alloc", SEGMENT + 4 * BLOCK, BLOCK),
    ]
    blocks = [block(4 * BLOCK), block(BLOCK), block(2 * MIB - 5 * BLOCK, live=False)]
    blocks[0]["state"] = "active_pending_free"
    run = run_of(tmp_path, {"segments": [segment(blocks)], "device_traces": [trace]})
    assert run.peak().total_bytes == 4 * BLOCK
    last = run.allocations.filter(pl.col("requested_bytes") == BLOCK)
    assert run.peak(phase="outside").total_bytes == 4 * BLOCK
    assert last["size_bytes"].to_list() == [BLOCK]


@pytest.mark.parametrize(("segment_mib", "taken_mib"), [(20, 20), (22, 19.5)])
def test_large_block_takes_a_rest_of_up_to_1_mib(
    tmp_path: Path, segment_mib: int, taken_mib: float
) -> None:
    asked = 19 * MIB + 512 * KIB
    trace = [
        entry("segment_alloc", SEGMENT, segment_mib * MIB),
        entry("alloc", SEGMENT, asked),
    ]
    run = run_of(tmp_path, {"segments": [], "device_traces": [trace]})
    assert run.peak().total_bytes == taken_mib * MIB
    assert run.allocations["requested_bytes"].to_list() == [asked]


def test_block_of_expandable_segments_takes_no_rest(tmp_path: Path) -> None:
    asked = 19 * MIB + 512 * KIB
    trace = [entry("segment_map", SEGMENT, 20 * MIB), entry("alloc", SEGMENT, asked)]
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "", "expandable_segments": True}
    snapshot = {"segments": [], "device_traces": [trace], "allocator_settings": settings}
    assert run_of(tmp_path, snapshot).peak().total_bytes == asked


def test_devices_are_told_apart(tmp_path: Path) -> None:
    traces = [[entry("alloc", SEGMENT, BLOCK)], [entry("alloc", SEGMENT, 8 * BLOCK)], []]
    run = run_of(tmp_path, {"segments": [], "device_traces": traces})
    assert run.peak(device="cuda:0").total_bytes == BLOCK
    assert run.peak().device == "cuda:1"
    assert run.peak().total_bytes == 8 * BLOCK


def test_segments_alone_make_a_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, [segment([block(BLOCK), block(2 * MIB - BLOCK, live=False)])])
    assert run.peak().by_category() == {"preexisting": BLOCK}


def test_snapshot_of_torch_1_13_is_read(tmp_path: Path) -> None:
    frames = [{"filename": "train.py", "line": 3, "name": "<module>"}]
    old = {"size": BLOCK, "state": "active_allocated"}
    old["history"] = [{"addr": SEGMENT, "real_size": 400, "frames": frames}]
    rest = {"size": 2 * MIB - BLOCK, "state": "inactive"}
    run = run_of(tmp_path, {"segments": [segment([old, rest])], "device_traces": []})
    assert run.allocations["requested_bytes"].to_list() == [400]
    assert run.allocations["layer"].cast(pl.String).to_list() == ["train.py:3 <module>"]


def test_users_metadata_names_the_layer(tmp_path: Path) -> None:
    trace = [entry("alloc", SEGMENT, BLOCK, user_metadata="encoder.3")]
    run = run_of(tmp_path, {"segments": [], "device_traces": [trace]})
    assert run.allocations["layer"].cast(pl.String).to_list() == ["encoder.3"]


def test_profilers_category_is_taken(tmp_path: Path) -> None:
    trace = [
        entry("alloc", SEGMENT, BLOCK, category="optimizer_state"),
        entry("alloc", SEGMENT + BLOCK, BLOCK, category="parameter"),
        entry("alloc", SEGMENT + 2 * BLOCK, BLOCK, category="unknown"),
    ]
    run = run_of(tmp_path, {"segments": [], "device_traces": [trace]})
    words = ["optimizer_state", "parameters", "unattributed"]
    assert run.allocations["category"].cast(pl.String).to_list() == words


def test_program_that_goes_on_after_running_out_of_memory_completed(tmp_path: Path) -> None:
    failed = {"action": "oom", "device_free": 3 * MIB, "size": 4 * MIB, "stream": 0}
    trace = [entry("alloc", SEGMENT, BLOCK), failed, entry("alloc", SEGMENT + BLOCK, BLOCK)]
    run = run_of(tmp_path, {"segments": [], "device_traces": [trace]})
    failure = run.out_of_memory()
    assert run.status == "completed"
    assert failure is not None
    assert (failure.requested_bytes, failure.device_free_bytes) == (4 * MIB, 3 * MIB)
    assert failure.held.total_bytes == BLOCK
    assert not failure.is_fragmented


def test_fragmented_memory_is_told_from_full_memory(tmp_path: Path) -> None:
    # Two free pieces of 8 MiB on either side of a block: 12 MiB do not fit, though 16 are free.
    middle = SEGMENT + 8 * MIB
    trace = [
        entry("segment_alloc", SEGMENT, 24 * MIB),
        entry("alloc", SEGMENT, 8 * MIB),
        entry("alloc", middle, 8 * MIB),
        entry("alloc", middle + 8 * MIB, 8 * MIB),
        entry("free_completed", SEGMENT, 8 * MIB),
        entry("free_completed", middle + 8 * MIB, 8 * MIB),
        {"action": "oom", "device_free": 0, "size": 12 * MIB, "stream": 0},
    ]
    free = block(8 * MIB, live=False)
    snapshot = {"segments": [segment([free, block(8 * MIB), free])], "device_traces": [trace]}
    failure = run_of(tmp_path, snapshot).out_of_memory()
    assert failure is not None
    assert failure.is_fragmented
    assert failure.state.free_bytes == 16 * MIB
    assert failure.state.free_blocks == 2
    assert failure.state.largest_free_block_bytes == 8 * MIB
    assert failure.held.total_bytes == 8 * MIB


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40 * MIB), st.integers(0, 1)), max_size=60
    ),
    st.integers(0, 20),
)
def test_replay_conserves_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    requests: list[tuple[int, int, int]],
    unrecorded: int,
) -> None:
    """Blocks of any history sum to what the allocator that made it counted, at every event."""
    builder = SnapshotBuilder()
    builder.is_recording = False
    live: list[tuple[int, int]] = []
    counted = [0]
    for number, (choice, size, stream) in enumerate(requests):
        if number == unrecorded:
            builder.is_recording = True
            counted = [builder.count_allocated_bytes()]
        if choice == 0 and live:
            address, of_stream = live.pop(size % len(live))
            builder.free(address, stream=of_stream)
        else:
            live.append((builder.allocate(size, stream=stream), stream))
        counted.append(builder.count_allocated_bytes())
    if not requests:
        return
    folder = tmp_path_factory.mktemp("replay")
    run = run_of(folder, builder.build()) if live or len(requests) > unrecorded else None
    if run is None or run.allocations.is_empty():
        return
    recorded = counted if len(requests) > unrecorded else counted[-1:]
    assert run.peak().total_bytes == max(recorded)
    at_end = run.allocations.filter(pl.col("end_ns").is_null())
    assert at_end["size_bytes"].sum() == recorded[-1]
    state = run.memory_state(run.peak())
    assert state is not None
    assert state.allocated_bytes == max(recorded)
    assert state.allocated_bytes + state.free_bytes == state.reserved_bytes


@pytest.mark.parametrize(
    ("snapshot", "match"),
    [
        ({}, "the pickle holds dict without keys, expected a dict with segments and device_t"),
        ({"a": 1}, "the pickle holds dict with 'a', expected a dict with segments and device_t"),
        (3, "the pickle holds int 3, expected a dict"),
        ("text", "expected a dict"),
        ({"segments": 1, "device_traces": []}, "segments holds int 1, expected a list"),
        ({"segments": [1], "device_traces": []}, r"segments\[0\] holds int 1, expected a dict"),
        ({"segments": [{"address": 1}], "device_traces": []}, "total_size holds NoneType None"),
        (
            {"segments": [segment([], segment_pool_id=7)]},
            "segment_pool_id holds int 7, expected two",
        ),
        ({"segments": [segment([], segment_pool_id=("a", 1))]}, "segment_pool_id holds tuple"),
        ({"device_traces": [{}]}, r"device_traces\[0\] holds dict, expected a list"),
        ({"device_traces": [[7]]}, r"device_traces\[0\] holds int 7, expected dicts"),
        ({"device_traces": [[{}]]}, r"device_traces\[0\] has an entry without 'action'"),
        ({"device_traces": [[{"action": "alloc", "size": 1}]]}, "without 'device_free'"),
        ({"device_traces": [[entry("alloc", "7", 1)]]}, "addr holds str '7', expected int"),
        ({"device_traces": [[entry("alloc", 7, 1.5)]]}, "size holds float 1.5, expected int"),
        ({"device_traces": [[entry("alloc", 7, True)]]}, "size holds bool True, expected int"),
        (
            {"device_traces": [[entry("alloc", 7, -1)]]},
            "size holds int -1, expected numbers from 0",
        ),
        ({"device_traces": [[entry("alloc", 7, 2**60)]]}, "expected numbers from 0 to"),
        ({"device_traces": [[entry("alloc", 2**70, 1)]]}, "addr holds int 11805916207174113"),
        ({"device_traces": [[entry("alloc", 7, 1, time_us=2**60)]]}, "time_us holds int"),
        ({"device_traces": [[entry("alloc", 7, 1, frames={1: 2})]]}, "frames holds dict"),
        ({"device_traces": [[entry("alloc", 7, 1, frames=[1])]]}, "a frame holds int 1"),
        ({"device_traces": [[entry("alloc", 7, 1, frames=[{"name": 1}])]]}, "a filename, a line"),
        ({"device_traces": [[entry("alloc", 7, 1, category=3)]]}, "category holds int 3"),
    ],
)
def test_other_content_is_refused(snapshot: object, match: str) -> None:
    with pytest.raises(SnapshotError, match=match) as caught:
        read_snapshot(snapshot)
    assert "\n" not in str(caught.value)


def test_empty_snapshot_says_how_to_record_one(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "empty.pickle", {"segments": [], "device_traces": [[], []]})
    with pytest.raises(SnapshotError, match="holds no blocks and no events"):
        import_snapshot(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_occupied_directory_is_left_alone(tmp_path: Path) -> None:
    trace = [entry("alloc", SEGMENT, BLOCK)]
    path = write_pickle(tmp_path / "s.pickle", {"segments": [], "device_traces": [trace]})
    with pytest.raises(CaptureError, match="it is not empty"):
        import_snapshot(path, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["commit", "close"])
@pytest.mark.parametrize("is_made", [False, True])
def test_import_that_fails_leaves_room_for_another_attempt(
    failing: str, is_made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = {"device_traces": [[entry("alloc", SEGMENT, 100)]]}
    if is_made:
        (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        write = getattr(RunWriter, failing)
        calls = iter(range(9))

        def fill_disk(*args: Any, **more: Any) -> None:
            if failing == "commit" and not next(calls):
                write(*args, **more)  # the first one
                return
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(RunWriter, failing, fill_disk)
        with pytest.raises(OSError, match="No space left"):
            run_of(tmp_path, snapshot)
    assert (tmp_path / "run").exists() == is_made
    assert run_of(tmp_path, snapshot).peak().total_bytes == BLOCK


def test_import_that_is_killed_was_interrupted(tmp_path: Path) -> None:
    run_of(tmp_path, {"device_traces": [[entry("alloc", SEGMENT, 100)]]})
    file = tmp_path / "run" / RUN_FILE
    info = json.loads(file.read_text())
    assert info["writer"]["pid"] == os.getpid()
    info["writer"]["pid"] = 2**22 + 1
    file.write_text(json.dumps(info | {"status": "recording"}))
    assert attnprof.load(tmp_path / "run").status == "interrupted"


def test_odd_texts_and_settings_do_no_harm(tmp_path: Path) -> None:
    frames = [{"filename": "\ud800.py", "line": -(2**40), "name": "f" * 10**6}]
    trace = [
        entry("alloc", SEGMENT, BLOCK, frames=frames, user_metadata="\udfff"),
        entry("\udc80", SEGMENT, 1),
    ]
    settings = {"a": float("nan"), "b": [1], 3: 4, "PYTORCH_CUDA_ALLOC_CONF": "no:such,option:7"}
    annotations = [{"device": 0, "name": "\ud812", "time_us": 1, "stage": "START"}, 3, {}]
    run = run_of(
        tmp_path,
        {
            "segments": [],
            "device_traces": [trace],
            "allocator_settings": settings,
            "external_annotations": annotations,
        },
    )
    assert run.peak().total_bytes == BLOCK
    assert run.allocations["layer"].cast(pl.String).to_list() == ["?"]
    assert json.loads(render_json(summarise(run)))["peak"]["total_bytes"] == BLOCK


def test_reserved_memory_without_a_block_makes_an_empty_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"segments": [segment([block(2 * MIB, live=False)])]})
    assert run.peak().total_bytes == 0
    assert run.allocations.is_empty()
    assert run.out_of_memory() is None


def test_history_of_frees_alone_is_what_was_there_before(tmp_path: Path) -> None:
    trace = [entry("free_completed", SEGMENT + i * BLOCK, BLOCK) for i in range(4)]
    run = run_of(tmp_path, {"segments": [], "device_traces": [trace]})
    assert run.timeline()["total_bytes"].to_list() == [
        *(BLOCK * i for i in (1, 2, 3, 4)),
        *(BLOCK * i for i in (3, 2, 1, 0)),
    ]


def test_address_taken_twice_was_let_go_unseen(tmp_path: Path) -> None:
    trace = [entry("alloc", SEGMENT, BLOCK), entry("alloc", SEGMENT, 2 * BLOCK)]
    run = run_of(tmp_path, {"segments": [], "device_traces": [trace]})
    assert run.peak().total_bytes == 2 * BLOCK
