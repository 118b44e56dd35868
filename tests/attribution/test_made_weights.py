"""Weights that a forward makes of parameters by products: they project, and are no data."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrizations

import attnprof
from attnprof.run import Run

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 23, 4, 6
WIDTH = HEADS * HEAD_DIM
SCORES = BATCH * HEADS * TOKENS * TOKENS * 4
"""Bytes of a matrix of scores."""

Make = Callable[[], nn.Module]


class Merged(nn.Module):
    """A layer whose low-rank update is added to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 5)
        self.down = nn.Parameter(torch.randn(3, WIDTH) / 5)
        self.up = nn.Parameter(torch.randn(WIDTH, 3) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight + self.up @ self.down)


def make_spectral() -> nn.Module:
    module: nn.Module = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
    return module


def make_orthogonal() -> nn.Module:
    module: nn.Module = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))
    return module


class Attention(nn.Module):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.query, self.key, self.value = make(), make(), make()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return x + ((query @ key.mT).softmax(-1) @ value).transpose(1, 2).flatten(2)


class Bilinear(nn.Module):
    """Attention of one head whose weights of Q and K are multiplied first."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.randn(WIDTH, HEAD_DIM) / 5) for _ in "qk")

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ (self.query @ self.key.mT) @ x.mT).softmax(-1) @ x


class Learned(nn.Module):
    """Attention of learned queries, as in a Perceiver, projected by such a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, WIDTH))
        self.query, self.key, self.value = Merged(), Merged(), Merged()

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(self.latents) @ self.key(x).mT).softmax(-1) @ self.value(x)


def train(model: nn.Module) -> Run:
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    return tracer.run


@pytest.mark.parametrize("make", [Merged, make_spectral, make_orthogonal])
def test_projections_by_weights_that_were_made_are_projections(make: Make) -> None:
    run = train(nn.Sequential(Attention(make), Attention(make)))
    shapes = run.layers().select("layer", "kind", "batch", "heads", "q_len", "k_len", "head_dim")
    assert shapes.rows() == [
        (name, "materialised", BATCH, HEADS, TOKENS, TOKENS, HEAD_DIM) for name in "01"
    ]
    assert run.layers()["softmax_bytes"].to_list() == [SCORES] * 2
    assert run.layers()["saved_softmax_bytes"].to_list() == [SCORES] * 2
    # Two in forward, and the gradients of both.
    large = run.allocations.filter(run.allocations["requested_bytes"] == SCORES)
    assert len(large) == 8
    assert set(large["category"]) == {"attention_scores", "softmax"}


def test_weights_of_q_and_k_may_be_multiplied_first() -> None:
    (row,) = train(nn.Sequential(Bilinear())).layers().rows(named=True)
    assert (row["kind"], row["batch"], row["heads"], row["kv_heads"]) == ("materialised", 2, 1, 1)
    assert row["saved_softmax_bytes"] == SCORES // HEADS


def test_learned_queries_attend_all_the_same() -> None:
    (row,) = train(nn.Sequential(Learned())).layers().rows(named=True)
    assert (row["kind"], row["q_len"], row["k_len"]) == ("materialised", 5, TOKENS)
    assert row["saved_softmax_bytes"] == BATCH * 5 * TOKENS * 4


@pytest.mark.parametrize("make", [Merged, make_spectral, make_orthogonal])
def test_layers_one_after_the_other_are_no_attention(make: Make) -> None:
    run = train(nn.Sequential(make(), nn.ReLU(), make(), nn.GELU(), make()))
    assert run.layers().is_empty()
