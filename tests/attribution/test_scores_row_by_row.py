"""Scores without one product for all: written row by row, or compared by an angle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import attnprof

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 23, 4, 6
WIDTH = HEADS * HEAD_DIM
SCORES = BATCH * HEADS * TOKENS * TOKENS * 4
"""Bytes of a matrix of scores."""


def fill(query: Tensor, key: Tensor) -> Tensor:
    scores = torch.empty(BATCH, HEADS, TOKENS, TOKENS)
    for i in range(TOKENS):
        scores[:, :, i] = (query[:, :, i : i + 1] @ key.mT).squeeze(2)
    return scores


def compare_angles(query: Tensor, key: Tensor) -> Tensor:
    return 10 * cosine_similarity(query.unsqueeze(3), key.unsqueeze(2), dim=-1)


class Attention(nn.Module):
    def __init__(self, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.score, self.project = score, nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        mixed = self.score(parts[0], parts[1]).softmax(-1) @ parts[2]
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("score", [fill, compare_angles])
def test_scores_are_read_off_whatever_made_them(score: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = nn.Sequential(Attention(score), Attention(score))
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    names = ("kind", "batch", "heads", "q_len", "k_len", "head_dim", "softmax_bytes")
    rows = tracer.run.layers().select(names).rows()
    assert rows == [("materialised", BATCH, HEADS, TOKENS, TOKENS, HEAD_DIM, SCORES)] * 2
    frame = tracer.run.allocations.filter(tracer.run.allocations["phase"] == "forward")
    large = frame.filter(frame["requested_bytes"] == SCORES)
    assert {"attention_scores", "softmax"} <= {*large["category"]}
    assert "attention_mask" not in {*frame["category"]}
