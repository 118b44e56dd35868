"""Normalisers that sort: what autograd keeps of sparsemax and entmax stands for the softmax."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnprof

BATCH, HEADS, HEAD_DIM, TOKENS, FLOAT, INTEGER = 2, 4, 6, 20, 4, 8
WIDTH = HEADS * HEAD_DIM
SCORES = BATCH * HEADS * TOKENS * TOKENS

Normalise = Callable[[Tensor], Tensor]


def sparsemax(scores: Tensor) -> Tensor:
    ordered = scores.sort(-1, descending=True).values
    sums = ordered.cumsum(-1) - 1
    count = (torch.arange(1, TOKENS + 1) * ordered > sums).sum(-1, keepdim=True)
    threshold = sums.gather(-1, count - 1) / count
    return (scores - threshold).clamp(min=0)


def entmax(scores: Tensor) -> Tensor:
    """Entmax with an exponent of 1.5."""
    scores = scores / 2
    ordered = scores.sort(-1, descending=True).values
    ranks = torch.arange(1, TOKENS + 1)
    mean, squares = ordered.cumsum(-1) / ranks, ordered.square().cumsum(-1) / ranks
    delta = (1 - ranks * (squares - mean.square())) / ranks
    thresholds = mean - delta.clamp(min=0).sqrt()
    count = (thresholds <= ordered).sum(-1, keepdim=True)
    return (scores - thresholds.gather(-1, count - 1)).clamp(min=0).square()


class _Sparsemax(torch.autograd.Function):
    """With a backward of its own, which needs the result alone."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = sparsemax(scores)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        is_kept = weights > 0
        mean = (gradient * is_kept).sum(-1, keepdim=True) / is_kept.sum(-1, keepdim=True)
        return (gradient - mean) * is_kept


def sparsemax_at_once(scores: Tensor) -> Tensor:
    weights: Tensor = _Sparsemax.apply(scores)  # type: ignore[no-untyped-call]  # torch's own
    return weights


class Attention(nn.Module):
    def __init__(self, normalise: Normalise) -> None:
        super().__init__()
        self.normalise = normalise
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        weights = self.normalise(query @ key.mT / HEAD_DIM**0.5)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


def measure_saved(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of what autograd itself saves with an element per score."""
    held: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if saved.numel() == SCORES:
            held[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        output = model(x)
    assert output.requires_grad
    return sum(held.values())


@pytest.mark.parametrize(
    ("normalise", "floats", "integers"),
    [
        (sparsemax, 3, 1),  # sums, what clamp is given, its result; and where the sort took from
        (entmax, 8, 1),
        (sparsemax_at_once, 1, 0),
    ],
)
def test_all_that_a_sorting_normaliser_keeps_is_counted(
    normalise: Normalise, floats: int, integers: int
) -> None:
    model, x = nn.Sequential(Attention(normalise)), torch.randn(BATCH, TOKENS, WIDTH)
    with attnprof.trace() as tracer:
        model(x).square().mean().backward()
    (row,) = tracer.run.layers().iter_rows(named=True)
    assert row["kind"] == "materialised"
    assert row["softmax_bytes"] == SCORES * FLOAT
    assert row["saved_softmax_bytes"] == SCORES * (floats * FLOAT + integers * INTEGER)
    assert row["saved_softmax_bytes"] == measure_saved(model, x)
    assert row["predicted_saved_bytes"] == SCORES * FLOAT  # of a softmax


def test_threshold_of_a_normaliser_is_no_mask() -> None:
    model, x = nn.Sequential(Attention(sparsemax)), torch.randn(BATCH, TOKENS, WIDTH)
    with attnprof.trace() as tracer:
        model(x).square().mean().backward()
    (row,) = tracer.run.layers().iter_rows(named=True)
    assert row["mask_bytes"] == TOKENS * INTEGER  # the ranks, which are constant


def test_weights_that_only_a_loss_reads_again_are_not_kept_for_the_values() -> None:
    class Regularised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(self.normalise)
            self.entropy = torch.zeros(())

        def normalise(self, scores: Tensor) -> Tensor:
            weights = scores.softmax(-1)
            self.entropy = (weights * (weights + 1e-9).log()).sum(-1).mean()
            return weights

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    model, x = Regularised(), torch.randn(BATCH, TOKENS, WIDTH)
    with attnprof.trace() as tracer:
        (model(x).square().mean() + model.entropy).backward()
    (row,) = tracer.run.layers().iter_rows(named=True)
    assert row["saved_softmax_bytes"] == SCORES * FLOAT
