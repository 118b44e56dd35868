"""A dry run takes the bytes that the real program takes, op by op, also where torch's fakes err."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from attnprof.capture.dry_run import dry_run
from attnprof.capture.workload import record_workload
from attnprof.errors import DryRunError

Step = Callable[[], Any]
MakeStep = Callable[[int, str], Step]
N = 24

TABLE = torch.arange(600, dtype=torch.float32).reshape(60, 10)


def check_same(make_step: MakeStep, seq_len: int = N) -> None:
    """Compare the peak, and what was allocated by which op."""
    real, dry = record_workload(make_step, seq_len), dry_run(make_step, seq_len)
    columns = ["size_bytes", "op", "phase", "category"]
    tables = [run.allocations.select(columns).sort(columns).rows() for run in (dry, real)]
    assert tables[0] == tables[1]
    assert dry.peak().total_bytes == real.peak().total_bytes


def use_slices(seq_len: int, device: str) -> Step:
    model = nn.Linear(10, 10)

    def step() -> None:
        for _ in range(3):
            (model(TABLE[:seq_len]) * TABLE[:seq_len]).sum().backward()

    return step


def use_buffer(seq_len: int, device: str) -> Step:
    model = nn.Linear(10, 10)
    model.register_buffer("table", TABLE[:seq_len])
    return lambda: [(model(model.table) + model.table).sum().backward() for _ in range(2)]


def use_arrays(seq_len: int, device: str) -> Step:
    array = TABLE.numpy()
    model = nn.Linear(10, 10)
    return lambda: [model(torch.from_numpy(array[i : i + 9])).sum().backward() for i in range(3)]


@pytest.mark.parametrize("make_step", [use_slices, use_buffer, use_arrays])
def test_real_tensors_count_once(make_step: MakeStep) -> None:
    check_same(make_step)


def use_arrays_of_results(seq_len: int, device: str) -> Step:
    model = nn.Linear(10, 10)

    def step() -> None:
        kept = [model(torch.ones(seq_len, 10)).detach().numpy() for _ in range(3)]
        assert torch.from_numpy(kept[0] * 0).sum() == 0

    return step


def test_arrays_hold_the_memory_of_their_tensors() -> None:
    check_same(use_arrays_of_results)


def test_arrays_have_the_values_that_are_known() -> None:
    known = TABLE.clone()

    def make_step(seq_len: int, device: str) -> Step:
        assert known.numpy()[1, 2] == 12
        assert torch.arange(5).numpy().tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(RuntimeError, match="requires grad"):
            nn.Linear(2, 2).weight.numpy()
        with pytest.raises(DryRunError, match="value of a int64 tensor at"):
            nn.Linear(2, 2).weight.argmax().numpy()
        return lambda: torch.randn(seq_len, seq_len).numpy().tolist()

    run = dry_run(make_step, 64)
    assert "read as 1.0 at" in run.info["dry_run"]["assumptions"][0]


def test_real_tensors_stay_as_they_are_when_a_dry_run_writes_into_them() -> None:
    outside = torch.zeros(8)

    def make_step(seq_len: int, device: str) -> Step:
        def step() -> None:
            outside.add_(1)
            assert outside.sum().item() == 8

        return step

    dry_run(make_step, N, steps=1)
    assert outside.sum() == 0
