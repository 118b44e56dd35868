"""Features multiplied by each other, token by token: more features, and no state."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnprof

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 23, 4, 6
WIDTH = HEADS * HEAD_DIM
SCORES = BATCH * HEADS * TOKENS * TOKENS * 4
"""Bytes of a matrix of scores."""


def square(x: Tensor) -> Tensor:
    return (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def expand(x: Tensor) -> Tensor:
    """The Taylor series of the exponential up to the second order, as in Based."""
    return torch.cat([torch.ones_like(x[..., :1]), x, square(x) / 2**0.5], -1)


def attend_to_squares(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (square(query) @ square(key).mT).softmax(-1) @ value


def attend_in_parallel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (expand(query) @ expand(key).mT).tril()
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-3)) @ value


def attend_linearly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return expand(query) @ (expand(key).mT @ value)


class Attention(nn.Module):
    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.project = mix, nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.mix(*parts).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("mix", "kind", "width"),
    [
        (attend_to_squares, "materialised", HEAD_DIM**2),
        (attend_in_parallel, "materialised", 1 + HEAD_DIM + HEAD_DIM**2),
        (attend_linearly, "linear", None),
    ],
)
def test_products_of_features_are_features(
    mix: Callable[[Tensor, Tensor, Tensor], Tensor], kind: str, width: int | None
) -> None:
    model = nn.Sequential(Attention(mix), Attention(mix))
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    for row in tracer.run.layers().iter_rows(named=True):
        assert row["kind"] == kind
        if width:
            names = ("batch", "heads", "q_len", "k_len", "head_dim", "softmax_bytes")
            expected = [BATCH, HEADS, TOKENS, TOKENS, width, SCORES]
            assert [row[name] for name in names] == expected
    assert tracer.run.layers()["layer"].to_list() == ["0", "1"]
