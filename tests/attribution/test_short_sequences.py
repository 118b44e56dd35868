"""Sequences no longer than a head is wide: sizes alone do not tell scores from values."""

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import attnprof

BATCH, HEADS, HEAD_DIM, FLOAT = 3, 2, 8, 4
WIDTH = HEADS * HEAD_DIM


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("length", [HEAD_DIM - 1, HEAD_DIM, HEAD_DIM + 1])
def test_gradient_of_values_is_no_softmax(length: int) -> None:
    model, x = nn.Sequential(Attention(), Attention()), torch.randn(BATCH, length, WIDTH)
    with attnprof.trace() as tracer:
        model(x).sum().backward()
    scores = BATCH * HEADS * length * length * FLOAT
    made = tracer.run.allocations.filter(pl.col("category") == "softmax")
    by_phase = made.group_by("layer", "phase").agg(pl.col("requested_bytes").sum())
    # A result in forward, and its gradient in backward.
    assert set(by_phase["requested_bytes"]) == {scores}
    assert by_phase.height == 2 * 2
