"""What only a GPU can show: the allocator's own blocks, beside its own counters. ``make gpu``."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnprof
from attnprof.run import Run
from attnprof.vocabulary import Status
from tests.traced.programs import COMPILED, PROGRAMS, out_of_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What this torch, whichever it is, and Triton deprecate of their own is no failure.
    pytest.mark.filterwarnings("default"),
]

B, H, T, D = 2, 4, 256, 32
MIB = 2**20
EVERY = PROGRAMS | COMPILED
NOTES_OPS = hasattr(torch.cuda.memory, "_set_memory_metadata")
"""Whether the allocator can note which op takes a block: from torch 2.10 on."""
WITHOUT_TRANSFORMERS = {"checkpointed", "two_streams", "private_pool", "kernels", "own_graph"}


class Attention(nn.Module):
    """Attention written out, with one projection in and one out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.out = nn.Linear(H * D, H * D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(B, T, H, D).transpose(1, 2) for t in self.qkv(x).split(H * D, -1))
        weights = (q @ k.transpose(-1, -2) * D**-0.5).softmax(-1)  # (B, H, T, T)
        return self.out((weights @ v).transpose(1, 2).reshape(B, T, H * D))


@pytest.fixture(autouse=True)
def forget_other_tests() -> None:
    forget_programs()


def forget_programs() -> None:
    """Begin without what other programs left, so that the allocator decides the same each time."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(1)


def run_step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(x).pow(2).mean().backward()


def measure_peak(body: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    body()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["allocated_bytes.all.peak"]


def set_allocator(settings: str) -> None:
    """Change the allocator's settings by torch's newer name for it, where there is one."""
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)(settings)


def make_step() -> Callable[[], None]:
    model, x = Attention().cuda(), torch.randn(B, T, H * D, device="cuda")
    run_step(model, x)  # cuBLAS takes its workspace
    return lambda: run_step(model, x)


def assert_nothing_is_off(run: Run) -> None:
    off = {each.counter: each.difference_bytes for each in run.reconciliation()}
    assert "allocated_bytes.all.current" in off
    assert set(off.values()) == {0}
    peak = run.peak()
    assert sum(peak.by_category().values()) == peak.total_bytes


def measure_untraced(program: Callable[[Any], None]) -> int:
    """Return the allocator's peak over what a program would have traced."""
    peaks: list[int] = []
    program(lambda body: peaks.append(measure_peak(body)))
    return peaks[0]


def trace_program(program: Callable[[Any], None]) -> tuple[Run, int]:
    """Return the run of a program, and the allocator's peak over what was traced."""
    tracers, peaks = [], []

    def traced(body: Callable[[], Any]) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with attnprof.trace(samples_per_second=0) as tracer:
            tracers.append(tracer)
            body()
        peaks.append(torch.cuda.memory_stats()["allocated_bytes.all.peak"])

    program(traced)
    return tracers[0].run, peaks[0]


@pytest.mark.parametrize("name", EVERY)
def test_cuda_blocks_add_up_to_torchs_counters(name: str) -> None:
    if name in COMPILED:
        pytest.importorskip("triton")
    if name not in WITHOUT_TRANSFORMERS:
        pytest.importorskip("transformers")
    program = EVERY[name]
    program(lambda body: body())  # libraries take their workspaces
    forget_programs()
    untraced = measure_untraced(program)
    forget_programs()
    run, counted = trace_program(program)
    assert_nothing_is_off(run)
    # The peak of the long loop lies in a step that is counted, and has no blocks.
    is_counted = name == "long_loop"
    known = run.steps["peak_bytes"].max() if is_counted else run.peak(device="cuda:0").total_bytes
    assert known == counted == untraced
    unexplained = run.peak().by_category().get("unattributed", 0)
    assert 1000 * unexplained < counted or not NOTES_OPS


def test_cuda_softmax_is_saved_once_per_layer() -> None:
    step = make_step()
    with attnprof.trace() as tracer:
        step()
    row = tracer.run.layers().row(0, named=True)
    assert row["softmax_bytes"] == 4 * B * H * T * T
    assert row["saved_softmax_bytes"] == 4 * B * H * T * T


def test_cuda_tracing_moves_no_peak() -> None:
    step = make_step()
    untraced = measure_peak(step)
    with attnprof.trace():
        traced = measure_peak(step)
    assert traced == untraced


def test_cuda_blocks_before_the_trace_are_parameters() -> None:
    step = make_step()
    with attnprof.trace() as tracer:
        step()
    events = tracer.run.attribution.facts.stored.table("allocator_events").to_pylist()
    assert any(event["action"] == "seed" for event in events)
    noted = {event["op"] >= 0 for event in events if event["action"] == "alloc"}
    assert (True in noted) is NOTES_OPS
    sizes = tracer.run.peak().by_category()
    parameters = [4 * 3 * H * D * H * D, 4 * 3 * H * D, 4 * H * D * H * D, 4 * H * D]
    assert sizes["parameters"] == sum(-(-size // 512) * 512 for size in parameters)


def test_cuda_expandable_segments_add_up_too() -> None:
    set_allocator("expandable_segments:True")
    try:
        step = make_step()
        with attnprof.trace() as tracer:
            step()
    finally:
        set_allocator("expandable_segments:False")
    assert_nothing_is_off(tracer.run)


@pytest.mark.skipif(not NOTES_OPS, reason="there is no metadata before torch 2.10")
def test_cuda_history_of_the_user_is_left_as_it_was() -> None:
    with attnprof.trace():
        torch.ones(8, device="cuda")
    assert not torch._C._cuda_isHistoryEnabled()
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    torch.cuda.memory._set_memory_metadata("mine")
    try:
        before = torch.ones(1000, device="cuda")
        step = make_step()
        with attnprof.trace() as tracer:
            step()
        after = torch.ones(3000, device="cuda")
        assert torch._C._cuda_isHistoryEnabled()
        assert torch.cuda.memory._get_memory_metadata() == "mine"
        events = torch.cuda.memory._snapshot()["device_traces"][0]
        taken = {e["addr"]: e for e in events if e["action"] == "alloc"}
        for tensor in (before, after):
            assert taken[tensor.data_ptr()]["user_metadata"] == "mine"
    finally:
        torch.cuda.memory._set_memory_metadata("")
        torch.cuda.memory._record_memory_history(enabled=None)
    assert_nothing_is_off(tracer.run)


def test_cuda_first_used_inside_the_trace_is_recorded_from_its_first_block(tmp_path: Path) -> None:
    script = (
        "import sys, torch, attnprof\n"
        "with attnprof.trace(sys.argv[1]):\n"
        "    model = torch.nn.Linear(512, 512).cuda()\n"
        "    model(torch.ones(64, 512).cuda()).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True)
    run = attnprof.load(tmp_path / "run")
    assert_nothing_is_off(run)
    about = json.loads((tmp_path / "run" / "run.json").read_text())["allocator"]
    assert about["devices"]["cuda:0"]["begin"]["allocated_bytes_current"] == 0


def test_cuda_dry_run_says_nothing_of_what_the_device_really_holds() -> None:
    held = torch.ones(MIB, device="cuda")

    def make_step(seq_len: int, device: str) -> Callable[[], None]:
        layer, x = nn.Linear(64, 64, device=device), torch.ones(seq_len, 64, device=device)
        return lambda: layer(x).sum().backward()

    run = attnprof.dry_run(make_step, 16, target="cuda")
    assert run.peak(device="cuda:0").by_category()["parameters"] == 4 * 64 * 64 + 512
    assert "allocator" not in run.info
    del held


def test_cuda_out_of_memory_says_what_was_asked_for_and_who_held_the_rest(tmp_path: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 240 * MIB) / total)

    def traced(body: Callable[[], Any]) -> None:
        with attnprof.trace(tmp_path / "run"):
            body()

    try:
        with pytest.raises(torch.OutOfMemoryError):
            out_of_memory(traced)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    run = attnprof.load(tmp_path / "run")
    assert run.status is Status.OUT_OF_MEMORY
    failure = run.out_of_memory()
    assert failure is not None
    assert failure.requested_bytes == 12 * MIB + 512  # 12 MiB and a byte, rounded
    assert failure.is_capped
    assert failure.held.op == ("aten::empty.memory_format" if NOTES_OPS else None)
    assert sum(failure.held.by_category().values()) == failure.state.allocated_bytes
