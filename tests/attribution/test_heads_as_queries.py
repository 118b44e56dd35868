"""Heads that share a key, given to a fused kernel as queries of a single token."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import attnprof

BATCH, HEADS, KV_HEADS, HEAD_DIM, TOKENS, LEARNED = 3, 8, 2, 12, 11, 5
WIDTH = HEADS * HEAD_DIM


class Grouped(nn.Module):
    """Attends from one token to a sequence, with as many queries per key's head as share it."""

    def __init__(self, *, rotates: bool) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, KV_HEADS * HEAD_DIM) for _ in "kv")
        self.rotates = rotates

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x[:, -1:]).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        if self.rotates:
            query = query * 0.5 + query.flip(-1)
        query = query.reshape(BATCH, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        key, value = (
            project(x).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
            for project in (self.key, self.value)
        )
        return attend(query, key, value)


class Learned(nn.Module):
    """Attends from learned queries, which are no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(LEARNED, WIDTH))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in "qkv")

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for part in (
                self.query(self.queries).expand(BATCH, -1, -1), self.key(x), self.value(x),
            )
        )  # fmt: skip
        return attend(query.contiguous(), key, value)


def read_shapes(model: nn.Module) -> tuple[object, ...]:
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, TOKENS, WIDTH))
    (row,) = tracer.run.layers().iter_rows(named=True)
    return tuple(row[name] for name in ("batch", "heads", "kv_heads", "q_len", "k_len"))


@pytest.mark.parametrize("rotates", [False, True])
def test_heads_that_share_a_key_are_no_queries(rotates: bool) -> None:
    shapes = read_shapes(Grouped(rotates=rotates))
    assert shapes == (BATCH, HEADS, KV_HEADS, 1, TOKENS)


def test_learned_queries_are_no_heads() -> None:
    assert read_shapes(Learned()) == (BATCH, HEADS, HEADS, LEARNED, TOKENS)
