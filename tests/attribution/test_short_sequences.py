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


class Pooled(nn.Module):
    """Attends to what a convolution leaves of the image, as PVT does: here a single key."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.reduce = nn.Conv2d(WIDTH, WIDTH, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        fewer = self.reduce(x.mT.unflatten(-1, (5, 5))).flatten(2).mT
        k, v = self.key_value(fewer).unflatten(-1, (2, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Asked(nn.Module):
    """Learned queries ask all tokens of a sequence, of which there may be one."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(10, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        mixed: Tensor = self.attention(queries, x, x)[0]
        return mixed


@pytest.mark.parametrize(("model", "tokens", "q_len"), [(Pooled(), 25, 25), (Asked(), 1, 10)])
def test_single_key_is_a_key(model: nn.Module, tokens: int, q_len: int) -> None:
    with attnprof.trace() as tracer:
        model(torch.randn(BATCH, tokens, WIDTH)).sum().backward()
    row = tracer.run.layers().row(0, named=True)
    sizes = tuple(row[name] for name in ("batch", "heads", "kv_heads", "q_len", "k_len"))
    assert (row["kind"], sizes) == ("materialised", (BATCH, HEADS, HEADS, q_len, 1))
