"""What only a GPU can show: the allocator's history beside the ledger. Run with ``make gpu``."""

import pytest
import torch
from torch import nn

import attnprof

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

B, H, T, D = 2, 4, 256, 32


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


def run_step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(x).pow(2).mean().backward()


def measure_peak(model: nn.Module, x: torch.Tensor) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run_step(model, x)
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["allocated_bytes.all.peak"]


def test_cuda_softmax_is_saved_once_per_layer() -> None:
    model, x = Attention().cuda(), torch.randn(B, T, H * D, device="cuda")
    run_step(model, x)
    with attnprof.trace() as tracer:
        run_step(model, x)
    row = tracer.run.layers().row(0, named=True)
    assert row["softmax_bytes"] == 4 * B * H * T * T
    assert row["saved_softmax_bytes"] == 4 * B * H * T * T


def test_cuda_tracing_moves_no_peak() -> None:
    model, x = Attention().cuda(), torch.randn(B, T, H * D, device="cuda")
    run_step(model, x)
    untraced = measure_peak(model, x)
    with attnprof.trace():
        traced = measure_peak(model, x)
    assert traced == untraced


def test_cuda_allocator_history_is_recorded_with_ops() -> None:
    model, x = Attention().cuda(), torch.randn(B, T, H * D, device="cuda")
    run_step(model, x)
    with attnprof.trace() as tracer:
        run_step(model, x)
    events = tracer.run.attribution.facts.stored.table("allocator_events").to_pylist()
    assert any(event["action"] == "seed" for event in events)
    assert any(event["action"] == "alloc" and event["op"] >= 0 for event in events)


def test_cuda_history_of_the_user_is_left_as_it_was() -> None:
    with attnprof.trace():
        torch.ones(8, device="cuda")
    assert not torch._C._cuda_isHistoryEnabled()
