"""Attention whose scores are no products of queries and keys: additive, of graphs, synthesised."""

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.run import Run
from tests.attribution.test_models import Inner

BATCH, QUERIES, KEYS, HIDDEN, WIDTH, HEADS, FLOAT = 2, 14, 19, 6, 24, 3, 4
SCORES = BATCH * QUERIES * KEYS
SQUARE = BATCH * QUERIES * QUERIES

Score = Callable[["Additive", Tensor, Tensor], Tensor]


class Additive(nn.Module):
    """Attention that scores projected queries (B, T, 1, D) and keys (B, 1, S, D) by ``score``."""

    def __init__(self, score: Score, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.score, self.dropout = score, dropout
        self.query, self.key = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.join, self.sum = nn.Linear(2 * HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        queries, keys = self.query(x).unsqueeze(2), self.key(context).unsqueeze(1)
        weights = self.score(self, queries, keys).softmax(-1)
        return self.out(functional.dropout(weights, self.dropout) @ self.value(context))


def add(layer: Additive, queries: Tensor, keys: Tensor) -> Tensor:
    scores: Tensor = layer.sum((queries + keys).tanh()).squeeze(-1)
    return scores


def add_weighted(layer: Additive, queries: Tensor, keys: Tensor) -> Tensor:
    return ((queries + keys).tanh() * layer.sum.weight.flatten()).sum(-1)


def add_by_vector(layer: Additive, queries: Tensor, keys: Tensor) -> Tensor:
    return (queries + keys).tanh() @ layer.sum.weight.flatten()


def add_masked(layer: Additive, queries: Tensor, keys: Tensor) -> Tensor:
    mask = torch.ones(QUERIES, KEYS).triu(KEYS - QUERIES + 1).bool()
    return add(layer, queries, keys).masked_fill(mask, -1e9)


def concatenate(layer: Additive, queries: Tensor, keys: Tensor) -> Tensor:
    both = torch.cat([queries.expand(-1, -1, KEYS, -1), keys.expand(-1, QUERIES, -1, -1)], -1)
    scores: Tensor = layer.sum(layer.join(both).tanh()).squeeze(-1)
    return scores


def repeat_and_concatenate(layer: Additive, queries: Tensor, keys: Tensor) -> Tensor:
    return concatenate(layer, queries.repeat(1, 1, KEYS, 1), keys.repeat(1, QUERIES, 1, 1))


def train(model: nn.Module, *inputs: Tensor) -> Run:
    """Trace a forward and backward."""
    root = Inner(model)
    with attnprof.trace() as tracer:
        root(*inputs).square().mean().backward()
    return tracer.run


def measure_saved(model: nn.Module, *inputs: Tensor) -> int:
    """Return the bytes of what autograd itself saves with an element, or more, per score."""
    queries = 1 if isinstance(model, Decoder) else QUERIES
    pairs = queries * inputs[-1].shape[-2]
    given = {t.untyped_storage().data_ptr() for t in (*inputs, *model.parameters())}
    held: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if saved.is_floating_point() and saved.numel() % pairs == 0:
            held[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        output = model(*inputs)
    assert output.requires_grad
    return sum(size for at, size in held.items() if at not in given)


def read_row(run: Run) -> dict[str, Any]:
    assert run.layers()["layer"].to_list() == ["inner"], run.layers()
    return run.layers().row(0, named=True)


def shape_of(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[n] for n in ("batch", "heads", "kv_heads", "q_len", "k_len", "head_dim"))


def sequences(keys: int = KEYS) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, QUERIES, WIDTH), torch.randn(BATCH, keys, WIDTH)


# Additive attention ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        (add, HIDDEN),  # tanh keeps its result
        (add_weighted, HIDDEN),
        (add_by_vector, HIDDEN),
        (concatenate, 2 * HIDDEN + HIDDEN),  # and the projection what it is given
        (repeat_and_concatenate, 2 * HIDDEN + HIDDEN),
    ],
)
def test_additive_attention_keeps_the_features_of_every_score(score: Score, kept: int) -> None:
    run = train(Additive(score), *sequences())
    row = read_row(run)
    assert row["kind"] == "materialised"
    assert shape_of(row) == (BATCH, 1, 1, QUERIES, KEYS, HIDDEN)
    assert row["softmax_bytes"] == SCORES * FLOAT
    assert row["saved_softmax_bytes"] == (1 + kept) * SCORES * FLOAT
    assert row["predicted_saved_bytes"] == row["saved_softmax_bytes"]


@pytest.mark.parametrize(
    "score", [add, add_weighted, add_by_vector, concatenate, repeat_and_concatenate]
)
def test_everything_as_large_as_additive_scores_is_named_so(score: Score) -> None:
    run = train(Additive(score), *sequences())
    size = pl.col("shape").list.eval(pl.element().product()).list.first()
    large = run.allocations.filter(size >= SCORES * HIDDEN)
    assert set(large["category"].cast(pl.String)) == {"attention_scores"}, large["op", "category"]
    small = run.allocations.filter(pl.col("shape") == [BATCH, QUERIES, 1, HIDDEN])
    assert set(small["category"].cast(pl.String)) <= {"attention_io", "temporaries"}


def test_mask_of_additive_attention_is_neither_queries_nor_weights() -> None:
    run = train(Additive(add_masked), *sequences())
    assert read_row(run)["mask_bytes"] == QUERIES * KEYS  # one bool mask for all


def test_few_keys_are_told_from_features_of_queries() -> None:
    few, least = 5, 3

    def score(layer: Additive, queries: Tensor, keys: Tensor) -> Tensor:
        scores = add_weighted(layer, queries, keys)
        return scores.masked_fill(scores < scores.topk(least, -1).values[..., -1:], -1e9)

    run = train(Additive(score), *sequences(few))
    assert few < HIDDEN  # so that queries and their gradients are larger than all scores
    queries = run.allocations.filter(
        pl.col("shape").is_in([[BATCH * QUERIES, HIDDEN], [BATCH, QUERIES, 1, HIDDEN]])
    )
    assert len(queries) == 2
    assert set(queries["category"].cast(pl.String)) == {"attention_io"}


def test_additive_attention_with_dropout_keeps_its_mask_and_copy() -> None:
    row = read_row(train(Additive(add, dropout=0.1), *sequences()))
    assert row["saved_softmax_bytes"] == (3 + HIDDEN) * SCORES * FLOAT
    assert row["predicted_saved_bytes"] == row["saved_softmax_bytes"]


class Decoder(nn.Module):
    """Bahdanau's: a cell attends with its state at every step."""

    def __init__(self, *, returns_weights: bool) -> None:
        super().__init__()
        self.returns_weights = returns_weights
        self.query, self.key = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.sum, self.cell = nn.Linear(HIDDEN, 1), nn.GRUCell(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        keys, state = self.key(context), context.mean(1)
        states, attended = [], []
        for token in x.unbind(1):
            sums = (self.query(state).unsqueeze(1) + keys).tanh()
            weights = self.sum(sums).squeeze(-1).softmax(-1)
            read = (weights.unsqueeze(1) @ context).squeeze(1)
            state = self.cell(torch.cat([token, read], -1), state)
            states.append(state)
            attended.append(weights)
        out = torch.stack(states, 1)
        return out + torch.stack(attended, 1).mean() if self.returns_weights else out


@pytest.mark.parametrize("returns_weights", [False, True])
def test_decoder_that_attends_step_by_step_keeps_all_steps(returns_weights: bool) -> None:
    row = read_row(train(Decoder(returns_weights=returns_weights), *sequences()))
    assert shape_of(row) == (BATCH, 1, 1, 1, KEYS, HIDDEN)
    assert row["saved_softmax_bytes"] == (1 + HIDDEN) * SCORES * FLOAT
    assert row["predicted_saved_bytes"] == row["saved_softmax_bytes"]


# Graphs ------------------------------------------------------------------------------------------


class GraphAttention(nn.Module):
    """Dense graph attention: a number per node and side, added for every pair of nodes."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.project = heads, nn.Linear(WIDTH, heads * HIDDEN, bias=False)
        self.source = nn.Parameter(torch.randn(heads, HIDDEN))
        self.target = nn.Parameter(torch.randn(heads, HIDDEN))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        h = self.project(nodes).unflatten(-1, (self.heads, HIDDEN))
        sides = (h * self.source).sum(-1).unsqueeze(1) + (h * self.target).sum(-1).unsqueeze(0)
        scores = functional.leaky_relu(sides, 0.2)
        scores = scores.masked_fill(edges.unsqueeze(-1) == 0, -1e9)
        return torch.einsum("ijh,jhf->ihf", scores.softmax(1), h).flatten(1)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_graph_attention_keeps_the_sums_and_the_weights(heads: int) -> None:
    edges = (torch.rand(QUERIES, QUERIES) > 0.5).float() + torch.eye(QUERIES)
    run = train(GraphAttention(heads), torch.randn(QUERIES, WIDTH), edges)
    row = read_row(run)
    assert shape_of(row) == (1, heads, heads, QUERIES, QUERIES, 1)
    assert row["softmax_bytes"] == heads * QUERIES**2 * FLOAT
    assert row["saved_softmax_bytes"] == 2 * heads * QUERIES**2 * FLOAT
    assert row["mask_bytes"] == QUERIES**2  # edges compared with 0


class Heads(nn.Module):
    """Self-attention of several heads by ``mix``, which is given two projections (B, T, H, D)."""

    def __init__(self, mix: Callable[["Heads", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.one, self.two = (nn.Linear(WIDTH, HEADS * HIDDEN) for _ in range(2))
        self.sum = nn.Parameter(torch.randn(HEADS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        left, right = (p(x).unflatten(-1, (HEADS, HIDDEN)) for p in (self.one, self.two))
        weights = self.mix(self, left, right).softmax(2)
        return torch.einsum("bijh,bjhf->bihf", weights, right).flatten(2)


def score_pairs(layer: Heads, left: Tensor, right: Tensor) -> Tensor:
    """Score as GATv2 does: the features of every pair, summed up after a nonlinearity."""
    pairs = functional.leaky_relu(left.unsqueeze(2) + right.unsqueeze(1), 0.2)
    return (pairs * layer.sum).sum(-1)


def score_distances(layer: Heads, left: Tensor, right: Tensor) -> Tensor:
    return -(left.unsqueeze(2) - right.unsqueeze(1)).square().sum(-1)


@pytest.mark.parametrize("mix", [score_pairs, score_distances])
def test_heads_of_sums_are_told_from_their_features(
    mix: Callable[[Heads, Tensor, Tensor], Tensor],
) -> None:
    row = read_row(train(Heads(mix), sequences()[0]))
    assert shape_of(row) == (BATCH, HEADS, HEADS, QUERIES, QUERIES, HIDDEN)
    assert row["softmax_bytes"] == HEADS * SQUARE * FLOAT


def test_sums_that_are_added_to_products_are_a_mask() -> None:
    def mix(layer: Heads, left: Tensor, right: Tensor) -> Tensor:
        bias = (left * layer.sum).sum(-1).unsqueeze(2) + (right * layer.sum).sum(-1).unsqueeze(1)
        return torch.einsum("bihd,bjhd->bijh", left, right) + bias

    row = read_row(train(Heads(mix), sequences()[0]))
    assert row["backend_reason"] == "written out: products around _softmax"
    assert row["mask_bytes"] == HEADS * SQUARE * FLOAT


# Synthesised scores -------------------------------------------------------------------------------


class Synthesizer(nn.Module):
    """Dense: a number per position, projected from the query. Random: a parameter."""

    def __init__(self, *, heads: int, dense: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.hidden, self.scores = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, heads * QUERIES)
        self.learned = None if dense else nn.Parameter(torch.randn(heads, QUERIES, QUERIES))
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        values = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = self.learned
        if scores is None:
            made = self.scores(self.hidden(x).relu())
            scores = made.unflatten(-1, (self.heads, QUERIES)).transpose(1, 2)
        weights = functional.dropout(scores.softmax(-1), self.dropout)
        return self.out((weights @ values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize(("dropout", "copies"), [(0.0, 1), (0.1, 3)])
def test_dense_synthesizer_keeps_its_weights(heads: int, dropout: float, copies: int) -> None:
    run = train(Synthesizer(heads=heads, dense=True, dropout=dropout), sequences()[0])
    row = read_row(run)
    assert row["kind"] == "materialised"
    assert shape_of(row) == (BATCH, heads, heads, QUERIES, QUERIES, WIDTH // heads)
    assert row["softmax_bytes"] == heads * SQUARE * FLOAT
    assert row["saved_softmax_bytes"] == copies * heads * SQUARE * FLOAT
    assert row["predicted_saved_bytes"] == row["saved_softmax_bytes"]
    assert row["mask_bytes"] == 0  # the projection's bias is none


def test_random_synthesizer_has_weights_without_a_batch() -> None:
    run = train(Synthesizer(heads=HEADS, dense=False), sequences()[0])
    row = read_row(run)
    assert shape_of(row) == (1, HEADS, HEADS, QUERIES, QUERIES, WIDTH // HEADS)
    assert row["softmax_bytes"] == HEADS * QUERIES**2 * FLOAT
    # The product with values repeats them for every sequence.
    assert row["saved_softmax_bytes"] == (1 + BATCH) * HEADS * QUERIES**2 * FLOAT
    assert row["mask_bytes"] == 0


# What follows from it -----------------------------------------------------------------------------


GRAPH = (torch.randn(QUERIES, WIDTH), torch.ones(QUERIES, QUERIES).tril())
LAYERS = [
    (Additive(add), sequences()),
    (Additive(concatenate), sequences()),
    (Additive(add_masked, dropout=0.1), sequences()),
    (Decoder(returns_weights=True), sequences()),
    (GraphAttention(HEADS), GRAPH),
    (Synthesizer(heads=HEADS, dense=True), sequences()[:1]),
    (Synthesizer(heads=HEADS, dense=False), sequences()[:1]),
]
NAMES = ["add", "concatenate", "drop", "decoder", "graph", "dense", "random"]


@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=NAMES)
def test_saved_bytes_are_what_autograd_says_it_saves(
    layer: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    row = read_row(train(layer, *inputs))
    assert row["saved_softmax_bytes"] == measure_saved(layer, *inputs) > 0


@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=NAMES)
def test_nobody_is_advised_to_multiply_queries_by_keys(
    layer: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    run = train(layer, *inputs)
    with pytest.raises(ValueError, match=r"sums of queries and keys|made without keys"):
        run.what_if("fused_attention")
    with pytest.raises(ValueError, match="no layer's heads can be shared"):
        run.what_if(kv_heads=1)
    assert "fused_attention" not in {advice.kind for advice in run.advice()}


def test_features_of_every_score_grow_with_both_lengths() -> None:
    layer, (x, context) = Additive(add), sequences()
    predicted = train(layer, x, context).what_if("seq_len", seq_len=2 * KEYS).after
    measured = train(layer, x.repeat(1, 2, 1), context.repeat(1, 2, 1)).peak()
    scores = measured.by_category()["attention_scores"]
    assert predicted.by_category()["attention_scores"] == scores


def test_growth_of_additive_attention_is_quadratic() -> None:
    growth = attnprof.sweep(make_step, seq_lens=[16, 32, 64, 128], dry_run=True)
    assert growth.fit("attention_scores").exponent == pytest.approx(2, abs=0.01)


def make_step(seq_len: int, device: str) -> Callable[[], None]:
    model = Inner(Additive(add)).to(device)
    x = torch.randn(BATCH, seq_len, WIDTH, device=device)

    def step() -> None:
        model(x, x).square().mean().backward()

    return step
