"""Softmaxes whose results weigh something, and that are no attention: no row, and no scores.

What they weigh are experts, layers, streams, entries of a table, classes, neighbours of one token,
or the positions of a sequence that is pooled without a query.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.run import Run

BATCH, TOKENS, WIDTH, HEADS = 2, 14, 24, 4
KERNEL, EXPERTS, ENTRIES = 5, 3, 9


class Layer(nn.Module):
    """A layer that computes ``mix(self, x)``, with parameters to choose from."""

    def __init__(self, mix: Callable[["Layer", Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.one, self.score = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.two, self.three = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.to_tokens = nn.Linear(WIDTH, TOKENS)
        self.to_entries, self.from_entries = nn.Linear(WIDTH, ENTRIES), nn.Linear(ENTRIES, WIDTH)
        self.to_experts, self.to_kernel = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, KERNEL)
        self.table = nn.Parameter(torch.randn(ENTRIES, WIDTH))
        self.weights = nn.Parameter(torch.randn(EXPERTS))
        self.resampling = nn.Parameter(torch.randn(ENTRIES, TOKENS))
        self.register_buffer("codes", torch.randn(ENTRIES, WIDTH))
        self.slots = nn.Parameter(torch.randn(WIDTH, ENTRIES))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self, x)


def train(mix: Callable[[Layer, Tensor], Tensor]) -> Run:
    model = nn.Sequential(nn.Embedding(50, WIDTH), Layer(mix), nn.Linear(WIDTH, WIDTH))
    with attnprof.trace() as tracer:
        model(torch.randint(0, 50, (BATCH, TOKENS))).square().mean().backward()
    return tracer.run


def pool(layer: Layer, x: Tensor) -> Tensor:
    """Attention pooling: a weight per position from the position alone."""
    weights = layer.score(layer.one(x).tanh()).softmax(1)
    return weights.mT @ x


def pool_by_hand(layer: Layer, x: Tensor) -> Tensor:
    scores = layer.score(layer.one(x).tanh())
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    return (weights / weights.sum(1, keepdim=True)).mT @ x


def pool_conditioned(layer: Layer, x: Tensor) -> Tensor:
    """A sequence that something was added to is pooled; that is not its query."""
    x = x + layer.one(x[:, 0]).unsqueeze(1)
    return layer.score(x.tanh()).softmax(1).mT @ layer.two(x)


def pool_centred(layer: Layer, x: Tensor) -> Tensor:
    """What is subtracted from every token is no query, but the sequence's own mean."""
    return layer.score((x - x.mean(1, keepdim=True)).tanh()).softmax(1).mT @ layer.one(x)


def pool_above_threshold(layer: Layer, x: Tensor) -> Tensor:
    """A number per sequence that is subtracted from its scores is no query."""
    scores = layer.score(layer.one(x).tanh()) - layer.score(x[:, 0]).unsqueeze(1)
    return scores.softmax(1).mT @ x


def pool_pairs(layer: Layer, x: Tensor) -> Tensor:
    """Sums of pairs are pooled, and no values."""
    pairs = (layer.one(x).unsqueeze(1) + layer.two(x).unsqueeze(2)).tanh()
    return (layer.score(pairs).softmax(2).mT @ pairs).squeeze(2)


def pool_into_slots(layer: Layer, x: Tensor) -> Tensor:
    """A few learned sums of all tokens, as TokenLearner makes them."""
    return layer.to_entries(x).softmax(1).mT @ x


def dispatch_and_combine(layer: Layer, x: Tensor) -> Tensor:
    """Soft mixture of experts: tokens to slots, an expert per slot, slots back to tokens."""
    logits = x @ layer.slots
    slots = logits.softmax(1).mT @ x
    return logits.softmax(2) @ layer.two(layer.one(slots).relu())


def weigh_experts(layer: Layer, x: Tensor) -> Tensor:
    outputs = torch.stack([layer.one(x), layer.two(x), layer.three(x)], 2)
    return torch.einsum("bte,bted->btd", layer.to_experts(x).softmax(-1), outputs)


def weigh_chosen_experts(layer: Layer, x: Tensor) -> Tensor:
    weights, chosen = layer.to_experts(x).softmax(-1).topk(2, -1)
    outputs = torch.stack([layer.one(x), layer.two(x), layer.three(x)], 2)
    outputs = outputs.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, WIDTH))
    return (weights.unsqueeze(-2) @ outputs).squeeze(-2)


def weigh_layers(layer: Layer, x: Tensor) -> Tensor:
    """ELMo's scalar mix, as a product."""
    outputs = torch.stack([layer.one(x), layer.two(x), layer.three(x)])
    return torch.einsum("l,lbtd->btd", layer.weights.softmax(0), outputs)


def mix_softmaxes(layer: Layer, x: Tensor) -> Tensor:
    heads = torch.stack([layer.one(x), layer.two(x), layer.three(x)], 2).softmax(-1)
    return (layer.to_experts(x).softmax(-1).unsqueeze(-2) @ heads).squeeze(-2)


def look_up_softly(layer: Layer, x: Tensor) -> Tensor:
    return layer.to_entries(x).softmax(-1) @ layer.table


def look_up_in_buffer(layer: Layer, x: Tensor) -> Tensor:
    """A codebook that moving averages keep."""
    return layer.to_entries(x).softmax(-1) @ layer.codes


def resample(layer: Layer, x: Tensor) -> Tensor:
    """A learned matrix that makes fewer tokens."""
    return layer.resampling.softmax(-1) @ layer.one(x)


def look_up_by_gumbel(layer: Layer, x: Tensor) -> Tensor:
    return functional.gumbel_softmax(layer.to_entries(x), hard=True) @ layer.table


def condition_on_classes(layer: Layer, x: Tensor) -> Tensor:
    """Self-conditioned CTC: probabilities of classes are projected back."""
    return x + layer.from_entries(layer.to_entries(x).softmax(-1))


def gate_channels(layer: Layer, x: Tensor) -> Tensor:
    return x * layer.two(layer.one(x.mean(1)).relu()).softmax(-1).unsqueeze(1)


def convolve_dynamically(layer: Layer, x: Tensor) -> Tensor:
    """A kernel per token, over its own neighbours."""
    around = functional.pad(layer.one(x), (0, 0, KERNEL - 1, 0)).unfold(1, KERNEL, 1)
    return (around @ layer.to_kernel(x).softmax(-1).unsqueeze(-1)).squeeze(-1)


def convolve_in_a_band(layer: Layer, x: Tensor) -> Tensor:
    """The same kernels, written into a band of a matrix of all tokens."""
    kernels = layer.to_kernel(x).softmax(-1)
    band = x.new_zeros(BATCH, TOKENS, TOKENS + KERNEL - 1)
    size = TOKENS + KERNEL
    band.as_strided(kernels.shape, (TOKENS * (size - 1), size, 1)).copy_(kernels)
    return band[:, :, KERNEL - 1 :] @ layer.one(x)


def relate(layer: Layer, x: Tensor) -> Tensor:
    """A relation network: sums of all pairs, summed up without weights."""
    pairs = layer.one(x).unsqueeze(1) + layer.two(x).unsqueeze(2)
    return layer.three(pairs.relu()).sum(2)


def gate_pairs(layer: Layer, x: Tensor) -> Tensor:
    pairs = layer.one(x).unsqueeze(1) + layer.two(x).unsqueeze(2)
    return layer.three(pairs.softmax(-1)).mean(2)


def pass_states_on(layer: Layer, x: Tensor) -> Tensor:
    """Decays between tokens are differences of sums, and nothing normalises them (Mamba-2)."""
    sums = layer.score(x).sigmoid().cumsum(1)
    decays = (sums - sums.mT).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -1e9)
    return (-decays.abs()).exp() @ layer.one(x)


def pool_a_grid(layer: Layer, x: Tensor) -> Tensor:
    """Rows and columns of a grid are added for a number per place, which stems from both."""
    grid = x.unflatten(1, (2, TOKENS // 2))
    places = layer.one(grid.mean(2)).unsqueeze(2) + layer.two(grid.mean(1)).unsqueeze(1)
    return layer.score(places.tanh()).flatten(1).softmax(-1).unsqueeze(1) @ x


@pytest.mark.parametrize(
    "mix",
    [
        pool,
        pool_by_hand,
        pool_conditioned,
        pool_centred,
        pool_above_threshold,
        pool_pairs,
        pool_into_slots,
        dispatch_and_combine,
        weigh_experts,
        weigh_chosen_experts,
        weigh_layers,
        mix_softmaxes,
        look_up_softly,
        look_up_in_buffer,
        resample,
        look_up_by_gumbel,
        condition_on_classes,
        gate_channels,
        convolve_dynamically,
        convolve_in_a_band,
        relate,
        gate_pairs,
        pass_states_on,
        pool_a_grid,
    ],
)
def test_softmaxes_that_are_no_attention(mix: Callable[[Layer, Tensor], Tensor]) -> None:
    run = train(mix)
    assert run.layers().is_empty(), run.layers()
    categories = set(run.allocations["category"].cast(str))
    assert not categories & {"attention_scores", "softmax", "attention_mask"}


class TriangleUpdate(nn.Module):
    """Every pair of residues from the pairs that either has with a third, as in AlphaFold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, KERNEL)
        self.left, self.right = nn.Linear(WIDTH, KERNEL), nn.Linear(WIDTH, KERNEL)
        self.middle, self.out = nn.LayerNorm(KERNEL), nn.Linear(KERNEL, WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(z)
        left, right = self.left(x) * self.gate(x).sigmoid(), self.right(x)
        return z + self.out(self.middle(torch.einsum("bikc,bjkc->bijc", left, right)))


def test_updates_of_pairs_of_tokens_are_no_attention() -> None:
    """What one multiplies goes through projections before the next one multiplies it again."""
    model = nn.Sequential(nn.Linear(3, WIDTH), TriangleUpdate(), TriangleUpdate())
    with attnprof.trace() as tracer:
        model(torch.randn(BATCH, TOKENS, TOKENS, 3)).square().mean().backward()
    run = tracer.run
    assert run.layers().is_empty()
    assert "attention_scores" not in run.peak().by_category()


class GraphAutoEncoder(nn.Module):
    """Features of nodes, mixed by a matrix of neighbours; every pair of nodes gets a number."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        nodes = neighbours @ self.project(x)
        return (nodes @ nodes.mT).sigmoid()


def test_features_mixed_by_neighbours_are_no_scores() -> None:
    model = GraphAutoEncoder()
    with attnprof.trace() as tracer:
        model(torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, TOKENS)).square().mean().backward()
    assert tracer.run.layers().is_empty()
