"""Traced runs with a real history of CUDA's allocator, replayed against torch's own counters.

Recorded on stand-ins for CUDA's libraries, not on a GPU: ``record.py`` says how.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import attnprof
from attnprof.attribution.attribute import attribute
from attnprof.report.html import render_html
from attnprof.report.json import render_json
from attnprof.report.summary import summarise
from attnprof.run import Run
from attnprof.store import open_run
from attnprof.vocabulary import Status
from tests.traced.programs import COMPILED
from tests.traced.recordings import (
    BATCH,
    HEADS,
    LAYERS,
    LENGTH,
    MIB,
    RECORDED,
    SCORES,
    WIDTH,
    Load,
    notes_of,
    rounded,
)

CASES = sorted(path.stem for path in RECORDED.glob("*.zip"))
FAILED = ["out_of_memory", "late_out_of_memory"]
COMPLETED = [case for case in CASES if not case.endswith("out_of_memory")]
GPU = "cuda:0"


def on_gpu(run: Run) -> pl.DataFrame:
    return run.attribution.allocations.filter(pl.col("device").cast(pl.String) == GPU)


def sum_of(frame: pl.DataFrame, category: str) -> int:
    return int(frame.filter(pl.col("category").cast(pl.String) == category)["size_bytes"].sum())


@pytest.mark.parametrize("case", CASES)
def test_every_counter_of_torch_is_met_to_the_byte(load: Load, case: str) -> None:
    compared = load(case).reconciliation()
    counters = {each.counter for each in compared}
    # The peak of the long loop was in a step that was only counted.
    peak = {"allocated_bytes.all.peak"} if case != "long_loop" else set()
    assert peak | {"allocated_bytes.all.current", "reserved_bytes.all.current"} <= counters
    assert {each.counter: each.difference_bytes for each in compared} == dict.fromkeys(counters, 0)


@pytest.mark.parametrize("case", [case for case in COMPLETED if case != "long_loop"])
def test_categories_sum_to_the_peak_of_the_untraced_program(load: Load, case: str) -> None:
    run = load(case)
    peak = run.peak(device=GPU)
    assert sum(peak.by_category().values()) == peak.total_bytes
    assert peak.total_bytes == run.info["untraced_peak_bytes"]


@pytest.mark.parametrize("case", COMPLETED)
def test_less_than_a_thousandth_of_the_peak_is_unattributed(load: Load, case: str) -> None:
    peak = load(case).peak()
    assert 1000 * peak.by_category().get("unattributed", 0) < peak.total_bytes


@pytest.mark.parametrize("case", COMPLETED)
def test_what_storages_are_for_is_what_the_ledger_alone_says(load: Load, case: str) -> None:
    run = load(case)
    blocks, ours = run.attribution.blocks, run.attribution.allocations
    alone = attribute(open_run(run.path))
    words = dict(
        zip(
            alone.blocks.storage.tolist(),
            alone.allocations["category"].cast(pl.String).to_list(),
            strict=True,
        )
    )
    known = np.flatnonzero(blocks.storage >= 0)
    ours_said = ours["category"].cast(pl.String).gather(known).to_list()
    # What a trace begins to see in the middle of is better known from the allocator.
    differing = [
        (said, words[storage])
        for said, storage in zip(ours_said, blocks.storage[known].tolist(), strict=True)
        if said != words[storage]
    ]
    assert differing == []


@pytest.mark.parametrize("case", COMPLETED)
def test_every_storage_lies_in_a_block_of_its_size(load: Load, case: str) -> None:
    run = load(case)
    alone = attribute(open_run(run.path))
    is_gpu = np.array([name.startswith("cuda") for name in alone.facts.devices])
    needed = {
        int(storage): int(size)
        for storage, size, device in zip(
            alone.blocks.storage, alone.blocks.requested_bytes, alone.blocks.device, strict=True
        )
        if size and is_gpu[device]
    }
    blocks = run.attribution.blocks
    found = dict(zip(blocks.storage.tolist(), blocks.size_bytes.tolist(), strict=True))
    if case not in COMPILED:  # where buffers follow each other unseen, or lie in a graph's pool
        assert {storage for storage in needed if storage not in found} == set()
    # A block may be larger by what is not worth splitting off.
    both = needed.keys() & found.keys()
    assert all(rounded(needed[storage]) <= found[storage] for storage in both)
    assert len(both) > 10


@pytest.mark.parametrize("case", CASES)
def test_blocks_do_not_overlap_in_memory(load: Load, case: str) -> None:
    frame = on_gpu(load(case))
    columns = frame.select("address", "size_bytes", "start", "end")
    for first, size, start, end in columns.iter_rows():
        meets = (
            (pl.col("address") < first + size)
            & (pl.col("address") + pl.col("size_bytes") > first)
            & (pl.col("start") < end)
            & (pl.col("end") > start)
        )
        assert frame.filter(meets).height == 1


@pytest.mark.parametrize("case", CASES)
def test_events_of_both_sources_are_in_the_order_of_ops(load: Load, case: str) -> None:
    attribution = load(case).attribution
    assert (np.diff(attribution.facts.events["op"]) >= 0).all()
    frame = on_gpu(load(case))
    assert (frame["end"] > frame["start"]).all()
    devices = np.array(attribution.facts.devices)[attribution.blocks.device]
    made = np.flatnonzero((attribution.blocks.op >= 0) & (devices == GPU))
    # A block that an op made was taken while that op ran.
    assert (attribution.blocks.at_op[made] == attribution.blocks.op[made]).all()


@pytest.mark.parametrize("case", ["gpt2", "gpt2_expandable", "warmed_up", "first_use"])
def test_softmax_of_each_layer_is_saved_with_its_dropout(load: Load, case: str) -> None:
    layers = load(case).layers()
    assert layers["softmax_bytes"].to_list() == [SCORES] * LAYERS
    # The softmax, what dropout left of it, and dropout's mask, a byte per element.
    assert layers["saved_softmax_bytes"].to_list() == [SCORES + SCORES + SCORES // 4] * LAYERS


def test_workspace_is_that_of_cublas_and_of_softmax_backward(load: Load) -> None:
    run = load("gpt2")
    own = on_gpu(run).filter(pl.col("category").cast(pl.String) == "workspace")
    by_op = own.group_by(pl.col("op").cast(pl.String)).agg(pl.col("size_bytes").unique().sort())
    sizes = dict(by_op.iter_rows())
    # cuBLAS has one per thread, from the first product on: the program's, and autograd's.
    cublas = 2 * 4096 * 1024 + 8 * 16 * 1024
    assert run.peak().by_category()["workspace"] >= 2 * cublas
    assert [cublas] in sizes.values()
    assert own["exact"].all()
    assert set(own["phase"].cast(pl.String)) <= {"forward", "backward", "optimizer"}


def test_what_was_there_before_has_its_category(load: Load) -> None:
    run = load("warmed_up")
    seeds = int(run.attribution.facts.allocated[0].blocks.is_seed.sum())
    before = on_gpu(run).filter(pl.col("start") < seeds)
    model = sum_of(before, "parameters")
    assert model == sum_of(on_gpu(load("gpt2")), "parameters")
    assert sum_of(before, "optimizer_state") >= 2 * model
    assert sum_of(before, "gradients") == model


def test_reserved_bytes_are_known_per_step(load: Load) -> None:
    run = load("gpt2")
    counted = {each.counter: each.counted_bytes for each in run.reconciliation()}
    assert run.steps["reserved_bytes"].max() == counted["reserved_bytes.all.peak"]
    state = run.memory_state(run.peak())
    assert state is not None
    assert state.allocated_bytes == run.peak().total_bytes
    assert state.reserved_bytes <= counted["reserved_bytes.all.peak"]


def test_cache_holds_what_its_tokens_need(load: Load) -> None:
    table = load("decoding").kv_cache()
    kv_heads, head_dim = 2, WIDTH // HEADS
    per_token = 2 * BATCH * kv_heads * head_dim * 4  # K and V
    last = table.filter(pl.col("step") == table["step"].max())
    assert last["tokens"].to_list() == [LENGTH + 3] * LAYERS
    assert last["used_bytes"].to_list() == [per_token * (LENGTH + 3)] * LAYERS


def test_recomputed_layers_are_told_from_first_forwards(load: Load) -> None:
    phases = set(on_gpu(load("checkpointed"))["phase"].cast(pl.String))
    assert {"forward", "recompute", "backward", "optimizer"} <= phases


@pytest.mark.parametrize("case", FAILED)
def test_failed_request_is_known_with_what_held_the_memory(load: Load, case: str) -> None:
    run = load(case)
    assert run.status is Status.OUT_OF_MEMORY
    failure = run.out_of_memory()
    assert failure is not None
    assert failure.device == GPU
    assert failure.requested_bytes == 12 * MIB + 512  # 12 MiB and a byte, rounded
    # Where steps are only counted, no op is known.
    assert failure.held.op == ("aten::empty.memory_format" if case == FAILED[0] else None)
    assert failure.state.reserved_bytes + failure.device_free_bytes <= 240 * MIB
    assert sum(failure.held.by_category().values()) == failure.state.allocated_bytes


def test_long_loop_is_recorded_until_steps_repeat_and_after_a_peak_has_risen(load: Load) -> None:
    run = load("long_loop")
    steps = run.steps
    assert steps["step"].to_list() == list(range(10))
    # Three steps; the sixth, which has longer sequences, is counted, and two are recorded after it.
    assert steps["is_detailed"].to_list() == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 2
    counted = steps.filter(~pl.col("is_detailed"))
    untraced = run.info["untraced_peak_bytes"]
    assert counted["peak_bytes"].to_list() == [None, None, untraced, None, None]
    assert counted["reserved_bytes"].null_count() == 0
    assert steps["begin_ns"].is_sorted()
    assert (steps["end_ns"][:-1] <= steps["begin_ns"][1:]).all()
    detailed = steps.filter("is_detailed")
    assert detailed["seq_len"].to_list() == [LENGTH // 2] * 5
    assert detailed["peak_bytes"][1:].n_unique() == 1


def test_blocks_that_live_over_a_gap_are_one_row(load: Load) -> None:
    run = load("long_loop")
    frame = on_gpu(run)
    for category in ("parameters", "optimizer_state"):
        assert sum_of(frame, category) == sum_of(on_gpu(load("gpt2")), category)
    live = frame.filter(pl.col("end_ns").is_null())
    assert set(live["category"].cast(pl.String)) == {
        "parameters",
        "optimizer_state",
        "workspace",  # of cuBLAS
        "unattributed",  # the batch of the last step, made in a gap
    }


def test_counted_steps_are_said_and_have_no_blocks(load: Load) -> None:
    run = load("long_loop")
    (note,) = notes_of(run, "steps")
    assert note.is_warning
    assert note.text.startswith("5 of 10 steps were only counted; step 5 reached 26.9 MiB, more")
    with pytest.raises(ValueError, match="step 5 was only counted"):
        run.peak(step=5)
    assert run.peak(step=6).total_bytes == run.peak().total_bytes


@pytest.mark.parametrize("case", CASES)
def test_reports_say_that_nothing_is_off(load: Load, case: str) -> None:
    summary = summarise(load(case))
    said = {note.subject: note.text for note in summary.notes}
    assert said["allocator"].startswith("0 bytes off torch's own counters: ")
    assert render_html(summary)
    assert render_json(summary)


def test_reports_name_settings_and_streams(load: Load) -> None:
    def said(case: str) -> dict[str, str]:
        return {note.subject: note.text for note in summarise(load(case)).notes}

    assert said("gpt2_expandable")["segments"] == "expandable_segments was on"
    assert said("two_streams")["streams"].startswith("2 streams had blocks on cuda:0")
    assert not {"segments", "streams", "history"} & said("gpt2").keys()


def without_ops(path: Path) -> Path:
    """Rewrite a run as of a torch whose allocator notes no ops with its events."""
    stored = open_run(path)
    table = stored.table("allocator_events")
    nothing = pa.array(np.full(len(table), -1))
    table = table.set_column(table.schema.get_field_index("op"), table.schema.field("op"), nothing)
    file = path / "tables" / "allocator_events.arrows"
    file.unlink()  # the table is mapped from it
    with pa.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table)
    journal = path / "journal.jsonl"
    *lines, last = journal.read_text().splitlines()
    entry = json.loads(last)
    entry["bytes"]["allocator_events"] = file.stat().st_size
    journal.write_text("\n".join([*lines, json.dumps(entry)]) + "\n")
    return path


@pytest.mark.parametrize("case", ["gpt2", "gqa_autocast", "warmed_up"])
def test_without_ops_bytes_stay_right_and_names_are_guesses(
    load: Load, case: str, tmp_path: Path
) -> None:
    whole = load(case)
    shutil.copytree(whole.path, tmp_path / case)
    run = attnprof.load(without_ops(tmp_path / case))
    peak, before = run.peak(), whole.peak()
    assert peak.total_bytes == before.total_bytes
    assert not peak.allocations["exact"].any()
    # Nobody knows what took the workspaces, so that those go without a name.
    named, known = peak.by_category(), before.by_category()
    lost = known.get("workspace", 0)
    assert named.get("unattributed", 0) <= lost + before.total_bytes // 1000
    for category in ("parameters", "optimizer_state", "softmax"):
        assert named.get(category) == known.get(category)


def change_counters(
    source: Path, target: Path, change: Callable[[dict[str, int], dict[str, int]], None]
) -> Run:
    """Copy a run as if other counters had been read in the beginning and in the end."""
    shutil.copytree(source, target)
    info = json.loads((target / "run.json").read_text())
    counters = info["allocator"]["devices"][GPU]
    change(counters["begin"], counters["end"])
    (target / "run.json").write_text(json.dumps(info))
    return attnprof.load(target)


def test_what_does_not_add_up_is_a_warning(load: Load, tmp_path: Path) -> None:
    def change(begin: dict[str, int], end: dict[str, int]) -> None:
        end["allocated_bytes_peak"] += 512

    (note,) = notes_of(change_counters(load("gpt2").path, tmp_path / "run", change), "allocator")
    assert note.is_warning
    assert "+512 bytes off" in note.text


def test_counters_that_could_not_be_read_are_said_with_the_reason(
    load: Load, tmp_path: Path
) -> None:
    run = change_counters(load("gpt2").path, tmp_path / "run", lambda begin, end: None)
    del run.info["allocator"]["devices"][GPU]["end"]
    run.info["allocator"]["unread"] = "RuntimeError: CUDA error: device-side assert triggered"
    (note,) = notes_of(run, "allocator")
    assert "could not be read at the end (RuntimeError: CUDA error: device-side as" in note.text


def test_older_peak_in_the_counter_is_not_compared(load: Load, tmp_path: Path) -> None:
    def change(begin: dict[str, int], end: dict[str, int]) -> None:
        begin["allocated_bytes_peak"] = end["allocated_bytes_peak"] = 2**40

    run = change_counters(load("gpt2").path, tmp_path / "run", change)
    compared = {each.counter for each in run.reconciliation()}
    assert "allocated_bytes.all.peak" not in compared
    assert "allocated_bytes.all.current" in compared


def test_what_the_process_holds_beyond_the_allocator_is_said(load: Load, tmp_path: Path) -> None:
    def change(begin: dict[str, int], end: dict[str, int]) -> None:
        end["process_bytes"] = end["reserved_bytes_current"] + 300 * MIB

    (note,) = notes_of(change_counters(load("gpt2").path, tmp_path / "run", change), "context")
    assert not note.is_warning
    assert "300.0 MiB more than the allocator had reserved" in note.text
    assert notes_of(load("gpt2"), "context") == []  # NVML was not there


def test_pinned_memory_is_said(load: Load, tmp_path: Path) -> None:
    run = change_counters(load("gpt2").path, tmp_path / "run", lambda begin, end: None)
    run.info["allocator"]["pinned"] = {"allocated_bytes_peak": 4 * MIB, "active_bytes_peak": MIB}
    (note,) = notes_of(run, "pinned")
    assert note.text.startswith("at most 4.0 MiB of the host's memory were pinned, and 1.0 MiB of")


def test_steps_left_out_are_counted_in_the_page(load: Load) -> None:
    page = render_html(summarise(load("long_loop")))
    assert page.count("2 more<") == page.count("1 more<") == 1


def test_kernels_are_named_with_what_spoke_against_the_others(load: Load) -> None:
    rows = load("kernels").layers().select("layer", "backend_reason").rows()
    fell_back = "scaled_dot_product_attention fell back to math"
    fused = "fused: _scaled_dot_product"
    heads = "efficient takes no grouped heads, got 4 heads of Q, 2 of K, 2 of V"
    assert dict(rows) == {
        "causal": f"{fused}_flash_attention (flash is tried first on compute capability 8.0)",
        "masked": f"{fused}_efficient_attention (flash takes no mask)",
        "grouped": f"{fused}_flash_attention (flash is tried first on compute capability 8.0)",
        "grouped_masked": f"{fell_back}: flash takes no mask; {heads}",
        "narrow_values": (
            f"{fell_back}: flash takes one head_dim up to 256 for Q, K and V, got 24, 24 and 12; "
            "efficient takes one head_dim for Q and K and multiples of 8 only, got 24, 24 and 12"
        ),
        "flat": (
            f"{fell_back}: flash takes Q, K and V with 4 dimensions only, got 3, 3, 3; "
            "efficient takes Q, K and V with 4 dimensions only, got 3, 3, 3"
        ),
        "in_double": (
            f"{fell_back}: flash takes float16, bfloat16 only, got float64; "
            "efficient takes float16, float32, bfloat16 only, got float64"
        ),
        "off": (
            f"{fell_back}, though the flash kernel could carry it out: it was switched off, as "
            "torch.nn.attention.sdpa_kernel does"
        ),
    }


def test_two_devices_each_have_their_blocks(load: Load) -> None:
    run = load("two_devices")
    for device in ("cuda:0", "cuda:1"):
        peak = run.peak(device=device)
        assert sum(peak.by_category().values()) == peak.total_bytes
        assert peak.by_category()["parameters"] == sum_of(on_gpu(run), "parameters")
    assert run.layers()["layer"].to_list() == ["Attention", "Attention#2"]
