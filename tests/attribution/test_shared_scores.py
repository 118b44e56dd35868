"""Scores that are used outside of their layer: in a loss, in the next layer, in a distillation."""

from collections.abc import Callable
from itertools import pairwise

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import attnprof

BATCH, TOKENS, WIDTH, HEADS = 3, 22, 60, 5
SCORES = 4 * BATCH * HEADS * TOKENS * TOKENS


class Attention(nn.Module):
    """Attention that returns its scores and probabilities too, and may be given other scores."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = parts[0] @ parts[1].mT
        if more is not None:
            scores = scores + more
        weights = scores.softmax(-1)
        return self.out((weights @ parts[2]).transpose(1, 2).flatten(2)), scores, weights


class Layers(nn.Module):
    """Layers of attention, whose scores or probabilities go into the loss or the next layer."""

    def __init__(self, use: Callable[[list[Tensor]], Tensor], *, pass_on: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(3)])
        self.use, self.pass_on = use, pass_on

    def forward(self, x: Tensor) -> Tensor:
        maps, scores = [], None
        for layer in self.layers:
            mixed, scores, weights = layer(x, scores if self.pass_on else None)
            x = x + mixed
            maps.append(weights)
        return x.square().mean() + self.use(maps)


def pull_together(maps: list[Tensor]) -> Tensor:
    """The loss of a student whose maps should be those of its teacher."""
    return torch.stack([(a - b).square().mean() for a, b in pairwise(maps)]).sum()


def measure_entropy(maps: list[Tensor]) -> Tensor:
    return -sum((m * (m + 1e-9).log()).sum(-1).mean() for m in maps)


def stack(maps: list[Tensor]) -> Tensor:
    return torch.stack(maps).square().mean()


def roll_out(maps: list[Tensor]) -> Tensor:
    """How attention adds up over the layers."""
    return (maps[2].mean(1) @ maps[1].mean(1) @ maps[0].mean(1)).square().mean()


@pytest.mark.parametrize("use", [pull_together, measure_entropy, stack, roll_out])
@pytest.mark.parametrize("pass_on", [False, True])
def test_every_layer_keeps_its_own_row(
    use: Callable[[list[Tensor]], Tensor], pass_on: bool
) -> None:
    model = Layers(use, pass_on=pass_on)
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, TOKENS, WIDTH)).backward()
    frame = tracer.run.layers()
    assert frame["layer"].to_list() == [f"layers.{i}" for i in range(3)]
    for column, value in (
        ("kind", "materialised"), ("batch", BATCH), ("heads", HEADS), ("softmax_bytes", SCORES),
    ):  # fmt: skip
        assert frame[column].to_list() == [value] * 3


class Talking(nn.Module):
    """Attention whose heads mix their scores once, and their probabilities twice."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.mixes = nn.ModuleList([nn.Linear(HEADS, HEADS) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = self.mixes[0]((q @ k.mT).permute(0, 2, 3, 1))
        weights = self.mixes[2](self.mixes[1](scores.softmax(-2)))
        return (weights.permute(0, 3, 1, 2) @ v).transpose(1, 2).flatten(2)


def test_heads_may_mix_their_probabilities_more_than_once() -> None:
    with attnprof.trace(samples_per_second=0) as tracer:
        Talking()(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    row = tracer.run.layers().row(0, named=True)
    assert (row["kind"], row["batch"], row["heads"]) == ("materialised", BATCH, HEADS)
    assert row["softmax_bytes"] == SCORES


class Positions(nn.Module):
    """Adds scores of positions to those it is given, as a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, WIDTH // HEADS)
        self.register_buffer("places", torch.randn(TOKENS, 8))

    def forward(self, queries: Tensor, scores: Tensor) -> Tensor:
        return scores + queries @ self.project(self.places).mT


class Relative(nn.Module):
    """Attention whose scores of content are completed by a module inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.positions = nn.Linear(WIDTH, 3 * WIDTH), Positions()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return (self.positions(q, q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_scores_that_a_module_inside_completes_are_scores() -> None:
    with attnprof.trace(samples_per_second=0) as tracer:
        Relative()(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    run = tracer.run
    assert run.layers().select("layer", "heads", "head_dim").rows() == [("", HEADS, WIDTH // HEADS)]
    made = run.allocations.filter(pl.col("category").cast(pl.String) == "attention_scores")
    assert (
        made.filter(pl.col("phase").cast(pl.String) == "forward")["size_bytes"].to_list()
        == [
            SCORES  # of content, of positions, and of both
        ]
        * 3
    )
