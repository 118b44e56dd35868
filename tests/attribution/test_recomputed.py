"""Checkpointing of functions and methods: what backward repeats is what it was in forward."""

from collections.abc import Callable

import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnprof
from attnprof.run import Run

BATCH, TOKENS, HEADS, HEAD_DIM, LAYERS = 2, 23, 4, 6, 2
WIDTH = HEADS * HEAD_DIM
SCORES = BATCH * HEADS * TOKENS * TOKENS * 4
"""Bytes of a matrix of scores."""


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1) @ value


class Attention(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind()


class ByMethod(Attention):
    """As in Swin: a layer that repeats all it does."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.work, x, use_reentrant=self.use_reentrant)
        return x + result

    def work(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.out(attend(*self.split(x)).transpose(1, 2).flatten(2))
        return mixed


class CoreOnly(Attention):
    """As in Megatron's selective recomputation: only what lies between the projections."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = checkpoint(attend, *self.split(x), use_reentrant=self.use_reentrant)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


Step = Callable[[nn.Module, Tensor], None]


def train(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def train_twice_differentiated(model: nn.Module, x: Tensor) -> None:
    (gradient,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    gradient.square().sum().backward()


def record(model: nn.Module, step: Step = train) -> Run:
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    with attnprof.trace(samples_per_second=0) as tracer:
        step(model, x)
    return tracer.run


@pytest.mark.parametrize("kind", [ByMethod, CoreOnly])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_repeated_functions_are_told_as_they_were_in_forward(
    kind: type[Attention], use_reentrant: bool
) -> None:
    run = record(nn.Sequential(*(kind(use_reentrant=use_reentrant) for _ in range(LAYERS))))
    frame = run.allocations.filter(pl.col("requested_bytes") == SCORES)
    found = frame.select(pl.col("layer", "phase", "category").cast(pl.String)).rows()
    assert sorted(found) == sorted(
        (str(layer), phase, category)
        for layer in range(LAYERS)
        for phase in ("forward", "recompute", "backward")
        for category in ("attention_scores", "softmax")
    )
    assert run.layers()["saved_softmax_bytes"].to_list() == [0] * LAYERS
    assert run.layers()["calls"].to_list() == [1] * LAYERS


def test_backward_that_builds_a_graph_repeats_nothing() -> None:
    class Plain(ByMethod):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.work(x)

    model = nn.Sequential(*(Plain(use_reentrant=False) for _ in range(LAYERS)))
    run = record(model, train_twice_differentiated)
    assert "recompute" not in set(run.allocations["phase"].cast(pl.String))
