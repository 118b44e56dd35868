"""Graph attention that lists all pairs of nodes, one after the other, before it scores them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

import attnprof

NODES, FEATURES, HEADS, HEAD_DIM = 31, 9, 4, 6
WIDTH = HEADS * HEAD_DIM


class Concatenated(nn.Module):
    """As in the first code for GAT in torch: features of both nodes, side by side."""

    heads = 1

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, HEAD_DIM, bias=False)
        self.score = nn.Parameter(torch.randn(2 * HEAD_DIM, 1))

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        nodes = self.project(x)
        pairs = torch.cat([nodes.repeat_interleave(NODES, 0), nodes.repeat(NODES, 1)], 1)
        scores = leaky_relu(pairs.view(NODES, NODES, -1) @ self.score).squeeze(2)
        scores = torch.where(neighbours > 0, scores, -9e15 * torch.ones_like(scores))
        return scores.softmax(1) @ nodes


class Added(nn.Module):
    """As in GATv2: the sum of both nodes' features, per head."""

    heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(FEATURES, WIDTH), nn.Linear(FEATURES, WIDTH)
        self.score = nn.Linear(HEAD_DIM, 1, bias=False)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        left, right = (p(x).view(NODES, HEADS, HEAD_DIM) for p in (self.left, self.right))
        pairs = self.add(left, right)
        scores = self.score(leaky_relu(pairs)).squeeze(-1)
        scores = scores.masked_fill(neighbours[..., None] == 0, float("-inf"))
        return torch.einsum("ijh,jhf->ihf", scores.softmax(1), right).flatten(1)

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        pairs = left.repeat(NODES, 1, 1) + right.repeat_interleave(NODES, 0)
        return pairs.view(NODES, NODES, HEADS, HEAD_DIM)


class Broadcast(Added):
    """The same, without a list."""

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        return left[None] + right[:, None]


@pytest.mark.parametrize("kind", [Concatenated, Added, Broadcast])
def test_pairs_of_nodes_in_a_list_are_queries_and_keys(kind: type[Concatenated]) -> None:
    model = kind()
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(NODES, FEATURES), torch.ones(NODES, NODES)).square().mean().backward()
    (row,) = tracer.run.layers().rows(named=True)
    names = ("kind", "batch", "heads", "q_len", "k_len", "head_dim")
    assert [row[n] for n in names] == ["materialised", 1, kind.heads, NODES, NODES, HEAD_DIM]
    assert row["softmax_bytes"] == kind.heads * NODES * NODES * 4
    frame = tracer.run.allocations
    # Scores, their softmax and the list of all pairs with their features.
    large = frame.filter(frame["requested_bytes"] >= row["softmax_bytes"])
    assert {*large["category"]} <= {"attention_scores", "softmax", "attention_mask"}
