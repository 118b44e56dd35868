"""Snapshots that torch's own allocator recorded, against torch's own counters.

Recorded on a stand-in for the CUDA runtime, not on a GPU: ``record.py`` says how.
"""

import json
from functools import cache
from pathlib import Path

import polars as pl
import pytest

import attnprof
from attnprof.analysis.imported import ImportedAttribution
from attnprof.analysis.memory_state import describe_state
from attnprof.interop.importing import import_snapshot
from attnprof.report.html import render_html
from attnprof.report.json import render_json
from attnprof.report.summary import summarise
from attnprof.run import Run
from tests.interop.recordings import RECORDED, make_recorded, write_pickle

CASES = list(json.loads(RECORDED.read_text()))
MIB = 2**20
WIDTH, VOCABULARY, HEADS, BATCH = 128, 500, 4, 4
LAYER = 3 * WIDTH * WIDTH + 3 * WIDTH + WIDTH * WIDTH + WIDTH
PARAMETERS = 2 * VOCABULARY * WIDTH + VOCABULARY + LAYER
"""Of the model with one layer."""
FLOAT = 4


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]  # a function
    @cache
    def load_case(case: str) -> Run:
        folder = tmp_path_factory.mktemp(case)
        snapshot, _ = make_recorded(case)
        import_snapshot(write_pickle(folder / f"{case}.pickle", snapshot), folder / "run")
        return attnprof.load(folder / "run")

    return load_case


@pytest.mark.parametrize("case", [c for c in CASES if c != "ring"])
def test_peak_is_torchs_own_to_the_byte(load, case: str) -> None:
    run, stats = load(case), make_recorded(case)[1]
    peak = run.peak()
    assert peak.device == "cuda:0"
    assert peak.total_bytes == stats["allocated_bytes.all.peak"]
    assert sum(peak.by_category().values()) == peak.total_bytes
    assert peak.allocations["size_bytes"].sum() == peak.total_bytes


@pytest.mark.parametrize("case", CASES)
def test_what_is_live_at_the_end_is_torchs_own_to_the_byte(load, case: str) -> None:
    run, stats = load(case), make_recorded(case)[1]
    live = run.allocations.filter(pl.col("end_ns").is_null())
    assert live["size_bytes"].sum() == stats["allocated_bytes.all.current"]


@pytest.mark.parametrize("case", CASES)
def test_reserved_bytes_are_torchs_own(load, case: str) -> None:
    attribution, stats = load(case).attribution, make_recorded(case)[1]
    assert isinstance(attribution, ImportedAttribution)
    history = attribution.histories[0]
    state = describe_state(history, len(history.events.kind) - 1)
    assert state.reserved_bytes == stats["reserved_bytes.all.current"]
    assert state.allocated_bytes == stats["allocated_bytes.all.current"]
    assert state.free_bytes == state.reserved_bytes - state.allocated_bytes
    assert 0 < state.largest_free_block_bytes <= state.free_bytes


@pytest.mark.parametrize("case", CASES)
def test_most_reserved_in_any_step_is_torchs_own(load, case: str) -> None:
    stats = make_recorded(case)[1]
    assert load(case).steps["reserved_bytes"].max() == stats["reserved_bytes.all.peak"]


@pytest.mark.parametrize("case", CASES)
def test_free_pieces_are_those_of_the_snapshot(load, case: str) -> None:
    attribution, snapshot = load(case).attribution, make_recorded(case)[0]
    history = attribution.histories[0]
    state = describe_state(history, len(history.events.kind) - 1)
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    free = [block["size"] for block in blocks if block["state"] == "inactive"]
    assert state.free_blocks == len(free)
    assert state.largest_free_block_bytes == max(free)


@pytest.mark.parametrize("case", [c for c in CASES if c != "without_stacks"])
def test_blocks_from_before_are_preexisting(load, case: str) -> None:
    run, snapshot = load(case), make_recorded(case)[0]
    seeds = run.allocations.filter(pl.col("category") == "preexisting")
    trace = snapshot["device_traces"][0]
    allocated = {e["addr"] for e in trace if e["action"] == "alloc"}
    assert len(seeds) > 5
    assert seeds["exact"].all()
    assert set(seeds["address"]) - allocated
    if case != "ring":  # parameters, and 3 000 001 bytes that were held
        expected = FLOAT * PARAMETERS + 3_000_001
        layers = 2 if case == "default" else 1
        assert seeds["requested_bytes"].sum() == expected + (layers - 1) * FLOAT * LAYER


@pytest.mark.parametrize("case", ["expandable", "rounded", "out_of_memory"])
def test_optimizer_state_is_two_copies_of_the_parameters(load, case: str) -> None:
    own = load(case).allocations.filter(pl.col("category") == "optimizer_state")
    assert own["requested_bytes"].sum() == 2 * FLOAT * PARAMETERS
    assert set(own["phase"].cast(pl.String)) == {"optimizer"}


@pytest.mark.parametrize("case", ["expandable", "operators", "without_requests"])
def test_softmax_of_the_first_step_has_its_size(load, case: str) -> None:
    own = load(case).allocations.filter(pl.col("category") == "softmax")
    first = own.filter(pl.col("step") == 0)
    assert first["requested_bytes"].to_list() == [BATCH * HEADS * 160 * 160 * FLOAT]
    assert first["saved"].all()
    assert first["phase"].cast(pl.String).to_list() == ["forward"]


def test_gradient_of_softmax_input_is_a_score(load) -> None:
    own = load("operators").allocations.filter(pl.col("category") == "attention_scores")
    names = set(own["op"].cast(pl.String))
    assert "aten::_softmax_backward_data" in names
    assert set(own["requested_bytes"]) == {BATCH * HEADS * 160 * 160 * FLOAT}


def test_gradients_of_parameters_are_found_without_a_frame(load) -> None:
    # Autograd's threads run no Python, so that their allocations have empty stacks.
    run = load("expandable")
    own = run.allocations.filter((pl.col("category") == "gradients") & (pl.col("step") == 1))
    assert own["requested_bytes"].sum() == FLOAT * PARAMETERS


def test_workspace_of_cublas_is_told_from_tensors(load) -> None:
    for case in ("operators", "expandable"):
        own = load(case).allocations.filter(pl.col("category") == "workspace")
        assert set(own["requested_bytes"]) == {32 * MIB}
        assert len(own) == 2  # the program's thread and autograd's


def test_steps_end_with_the_optimizer(load) -> None:
    steps = load("default").steps
    assert steps["step"].to_list() == [0, 1, 2]
    assert steps["peak_bytes"].max() == load("default").peak().total_bytes
    assert steps["peak_bytes"].is_sorted()  # sequences grow
    assert steps["begin_ns"].is_sorted()


def test_line_that_asked_stands_for_the_layer(load) -> None:
    layers = load("default").peak().by_layer()["layer"].to_list()
    assert any(layer.startswith("record.py:") and layer.endswith(" forward") for layer in layers)


def test_without_stacks_nothing_is_guessed(load) -> None:
    categories = load("without_stacks").peak().by_category()
    assert set(categories) == {"preexisting", "unattributed"}


def test_everything_but_preexisting_is_inferred(load) -> None:
    allocations = load("default").allocations
    assert not allocations.filter(pl.col("category") != "preexisting")["exact"].any()


def test_timeline_reaches_the_peak(load) -> None:
    run = load("default")
    timeline = run.timeline()
    assert timeline["total_bytes"].max() == run.peak().total_bytes
    parts = timeline.drop("time_ns", "total_bytes")
    assert (parts.sum_horizontal() == timeline["total_bytes"]).all()
    assert timeline["time_ns"].is_sorted()


@pytest.mark.parametrize("case", ["out_of_memory", "out_of_memory_expandable"])
def test_failed_request_says_what_was_asked_for_and_what_there_was(load, case: str) -> None:
    run, (snapshot, stats) = load(case), make_recorded(case)
    entry = next(e for e in snapshot["device_traces"][0] if e["action"] == "oom")
    failure = run.out_of_memory()
    assert run.status == "out_of_memory"
    assert failure is not None
    assert failure.requested_bytes == entry["size"] == 12 * MIB + 512  # rounded when it failed
    assert failure.device_free_bytes == entry["device_free"]
    assert failure.state.allocated_bytes == stats["allocated_bytes.all.current"]
    assert failure.state.reserved_bytes == stats["reserved_bytes.all.current"]
    assert sum(failure.held.by_category().values()) == failure.held.total_bytes
    assert failure.held.total_bytes == failure.state.allocated_bytes
    assert failure.place.startswith("record.py:")


def test_expandable_segments_are_tried_where_they_were_off(load) -> None:
    assert load("out_of_memory").out_of_memory().fits_with_expandable_segments is not None
    assert load("out_of_memory_expandable").out_of_memory().fits_with_expandable_segments is None


def test_replay_with_expandable_segments_agrees_with_the_run_that_had_them(load) -> None:
    # Both programs ask for 12 MiB and a byte until the device has no more: the replay of the one
    # says whether one more fits, and the other shows how many did.
    held = {
        case: load(case).allocations.filter(pl.col("requested_bytes") == 12 * MIB + 1).height
        for case in ("out_of_memory", "out_of_memory_expandable")
    }
    fits = load("out_of_memory").out_of_memory().fits_with_expandable_segments
    assert fits is (held["out_of_memory_expandable"] > held["out_of_memory"])


def test_nothing_failed_in_a_run_that_completed(load) -> None:
    assert load("default").out_of_memory() is None
    assert load("default").status == "completed"


@pytest.mark.parametrize("case", CASES)
def test_reports_are_made_of_it(load, case: str) -> None:
    summary = summarise(load(case))
    values = json.loads(render_json(summary))
    assert sum(values["peak"]["by_category"].values()) == values["peak"]["total_bytes"]
    assert values["memory_state"]["allocated_bytes"] == values["peak"]["total_bytes"]
    assert (values["out_of_memory"] is None) == (not case.startswith("out_of_memory"))
    page = render_html(summary)
    assert "Reserved memory" in page
    assert ("Out of memory" in page) == case.startswith("out_of_memory")


def test_what_needs_ops_is_refused_or_empty(load) -> None:
    run = load("default")
    assert run.advice() == []
    assert run.layers().is_empty()
    with pytest.raises(ValueError, match="has no ops"):
        run.what_if("checkpointing")


def test_recordings_are_small(tmp_path: Path) -> None:
    assert RECORDED.stat().st_size < 500_000
