"""Attention in a `torch.autograd.Function`, whose backward is written by hand."""

from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import attnprof

BATCH, TOKENS, HEADS, HEAD_DIM, LAYERS = 2, 23, 4, 6, 2
WIDTH = HEADS * HEAD_DIM
SCORES = BATCH * HEADS * TOKENS * TOKENS * 4
"""Bytes of a matrix of scores."""


def go_back(query: Tensor, key: Tensor, value: Tensor, weights: Tensor, change: Tensor) -> Any:
    """Return the gradients of Q, K and V; makes four matrices as large as the scores."""
    to_weights = change @ value.mT
    inner = to_weights - (to_weights * weights).sum(-1, keepdim=True)
    to_scores = weights * inner
    return to_scores @ key, to_scores.mT @ query, weights.mT @ change


class Saving(torch.autograd.Function):
    """Attention that keeps its softmax results."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        return weights @ value

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> Any:
        return go_back(*ctx.saved_tensors, change)


class Repeating(torch.autograd.Function):
    """Attention that computes them once more, as FlashAttention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return (query @ key.mT).softmax(-1) @ value

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        return go_back(query, key, value, (query @ key.mT).softmax(-1), change)


class Layer(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function, self.project = function, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return x + self.function.apply(*parts).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("function", "again"), [(Saving, 0), (Repeating, 2)])
def test_what_a_functions_backward_makes_of_scores_are_scores(
    function: type[torch.autograd.Function], again: int
) -> None:
    model = nn.Sequential(*(Layer(function) for _ in range(LAYERS)))
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    frame = tracer.run.allocations.with_columns(pl.col("layer", "category").cast(pl.String))
    large = frame.filter(pl.col("requested_bytes") == SCORES, pl.col("phase") == "backward")
    assert large.group_by("layer").len().sort("layer").rows() == [
        (str(layer), 4 + again) for layer in range(LAYERS)
    ]
    assert set(large["category"]) == {"attention_scores", "softmax"}
    kept = tracer.run.layers()["saved_softmax_bytes"].to_list()
    assert kept == [0 if again else SCORES] * LAYERS
    gradients = frame.filter(pl.col("phase") == "backward", pl.col("layer") == "0")
    size = BATCH * TOKENS * WIDTH * 4
    io = gradients.filter(pl.col("requested_bytes") == size, pl.col("category") == "attention_io")
    assert len(io) == 3  # of Q, K and V
