"""Recurrent encoders, and decoders that attend to them at every step, in the usual ways."""

from collections.abc import Callable

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import attnprof
from attnprof.run import Run

BATCH, KEYS, STEPS, HIDDEN, WIDTH, FLOAT = 3, 23, 5, 18, 7, 4
SCORES = STEPS * BATCH * KEYS
"""Of all steps."""

Row = tuple[object, ...]


class Decoder(nn.Module):
    """Attends with its state to what a recurrent network made of the inputs."""

    def __init__(self, score: "Score", *, batch_first: bool = True) -> None:
        super().__init__()
        self.score, self.batch_first = score, batch_first
        self.encoder = nn.GRU(WIDTH, HIDDEN, batch_first=batch_first)
        self.cell = nn.GRUCell(2 * HIDDEN, HIDDEN)
        self.query, self.key = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.both, self.sum = nn.Linear(2 * HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        keys, (state,) = self.encoder(x if self.batch_first else x.transpose(0, 1))
        keys = keys if self.batch_first else keys.transpose(0, 1)
        context, contexts = torch.zeros_like(state), []
        for _ in range(STEPS):
            state = self.cell(torch.cat((state, context), 1), state)
            weights = self.score(self, state, keys).softmax(-1)
            context = (weights[:, None] @ keys)[:, 0]
            contexts.append(context)
        return torch.stack(contexts, 1)


Score = Callable[[Decoder, Tensor, Tensor], Tensor]


def add(layer: Decoder, state: Tensor, keys: Tensor) -> Tensor:
    return layer.sum((layer.query(state)[:, None] + layer.key(keys)).tanh())[..., 0]


def concatenate(layer: Decoder, state: Tensor, keys: Tensor) -> Tensor:
    """Repeat the state for every key, as tutorials of attention do."""
    repeated = state.unsqueeze(1).repeat(1, KEYS, 1)
    return layer.sum(layer.both(torch.cat((repeated, keys), 2)).tanh()).squeeze(2)


def multiply(layer: Decoder, state: Tensor, keys: Tensor) -> Tensor:
    return (keys @ layer.query(state)[..., None])[..., 0]


def multiply_and_sum(layer: Decoder, state: Tensor, keys: Tensor) -> Tensor:
    return torch.sum(state.unsqueeze(1) * keys, dim=2)


def train(model: nn.Module, *inputs: Tensor) -> Run:
    with attnprof.trace(samples_per_second=0) as tracer:
        model(*inputs).square().mean().backward()
    return tracer.run


def list_rows(run: Run) -> list[Row]:
    columns = ("kind", "batch", "heads", "q_len", "k_len", "softmax_bytes")
    return run.layers().select(columns).rows()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("score", [add, concatenate, multiply, multiply_and_sum])
def test_every_step_meets_all_that_was_encoded(score: Score, batch_first: bool) -> None:
    run = train(Decoder(score, batch_first=batch_first), torch.randn(BATCH, KEYS, WIDTH))
    assert list_rows(run) == [("materialised", BATCH, 1, 1, KEYS, SCORES * FLOAT)]
    encoder = run.allocations.filter(pl.col("layer").cast(pl.String) == "encoder")
    assert "attention_scores" not in encoder["category"].to_list()  # keys are no copies of queries


def test_what_is_saved_of_concatenated_states() -> None:
    run = train(Decoder(concatenate), torch.randn(BATCH, KEYS, WIDTH))
    saved = (2 + 1) * HIDDEN + 1  # both, their projection, the result
    assert run.layers()["saved_softmax_bytes"].to_list() == [saved * SCORES * FLOAT]


class Hops(nn.Module):
    """A memory network: a question reads all sentences, and what it read is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.ModuleList([nn.Embedding(31, HIDDEN) for _ in range(3)])

    def forward(self, story: Tensor, question: Tensor) -> Tensor:
        state = self.words[0](question).sum(1)
        for before, after in ((0, 1), (1, 2)):
            keys, values = (self.words[at](story).sum(2) for at in (before, after))
            weights = (keys * state.unsqueeze(1)).sum(2).softmax(-1)
            state = state + (weights.unsqueeze(-1) * values).sum(1)
        return state


def test_a_question_reads_all_sentences() -> None:
    story, question = torch.randint(31, (BATCH, KEYS, 6)), torch.randint(31, (BATCH, 4))
    rows = list_rows(train(Hops(), story, question))
    assert rows == [("materialised", BATCH, 1, 1, KEYS, 2 * BATCH * KEYS * FLOAT)]


class BothWays(nn.Module):
    """Scores of a projection of queries, keys and their products, as BiDAF's."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = nn.Linear(3 * WIDTH, 1)

    def forward(self, context: Tensor, question: Tensor) -> Tensor:
        sizes = (-1, context.shape[1], question.shape[1], -1)
        left, right = context.unsqueeze(2).expand(sizes), question.unsqueeze(1).expand(sizes)
        scores = self.sum(torch.cat((left, right, left * right), -1))[..., 0]
        return scores.softmax(2) @ question


def test_scores_of_queries_keys_and_their_products() -> None:
    words = nn.Embedding(31, WIDTH)
    context, question = torch.randint(31, (BATCH, KEYS)), torch.randint(31, (BATCH, 9))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = words, BothWays()

        def forward(self, context: Tensor, question: Tensor) -> Tensor:
            return self.layer(self.words(context), self.words(question))

    run = train(Model(), context, question)
    scores = BATCH * KEYS * 9
    assert list_rows(run) == [("materialised", BATCH, 1, KEYS, 9, scores * FLOAT)]
    assert run.layers()["head_dim"].to_list() == [WIDTH]
    assert run.layers()["saved_softmax_bytes"].to_list() == [(3 * WIDTH + 1) * scores * FLOAT]


class Addressed(nn.Module):
    """A cell whose first state is empty; a softmax reads a memory of slots by another measure."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.key = nn.LSTMCell(WIDTH + 9, HIDDEN), nn.Linear(HIDDEN, 9)
        self.strength = nn.Linear(HIDDEN, 1)
        self.slots = nn.Parameter(torch.randn(13, 9))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.slots.repeat(BATCH, 1, 1)
        state = [x.new_zeros(BATCH, HIDDEN), x.new_zeros(BATCH, HIDDEN)]
        read, out = x.new_zeros(BATCH, 9), []
        for step in x.unbind(1):
            state = self.cell(torch.cat((step, read), 1), state)
            key = self.key(state[0])
            alike = torch.cosine_similarity(memory + 1e-16, key.unsqueeze(1) + 1e-16, -1)
            weights = (self.strength(state[0]) * alike).softmax(1)
            read = (weights.unsqueeze(1) @ memory)[:, 0]
            memory = memory + weights.unsqueeze(2) @ key.unsqueeze(1)
            out.append(read)
        return torch.stack(out, 1)


def test_an_empty_state_is_no_query() -> None:
    run = train(Addressed(), torch.randn(BATCH, STEPS, WIDTH))
    frame = run.allocations
    inputs = frame.filter(frame["shape"] == [BATCH, STEPS, WIDTH])
    assert "softmax" not in inputs["category"].to_list()
    cell = frame.filter(pl.col("layer").cast(pl.String) == "cell")
    assert not {"attention_scores", "softmax"} & {*cell["category"]}
