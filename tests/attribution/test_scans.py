"""States that a loop carries from token to token, and loops that carry none."""

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import attnprof

BATCH, TOKENS, WIDTH, FLOAT = 2, 12, 16, 4

Mix = Callable[["Mixer", Tensor], Tensor]


class Mixer(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix = mix
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.recur = nn.Linear(WIDTH, WIDTH)
        self.decay = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self, x)


class Model(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.mixer = Mixer(mix)
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mixer(self.embed(tokens)))


def trace(mix: Mix) -> attnprof.Run:
    model, tokens = Model(mix), torch.randint(0, 32, (BATCH, TOKENS))
    with attnprof.trace() as tracer:
        model(tokens).sum().backward()
    return tracer.run


def decay_channels(mixer: Mixer, x: Tensor) -> Tensor:
    """One number per channel, kept by autograd for every token."""
    state, outputs = torch.zeros(BATCH, WIDTH), []
    for token in mixer.project(x)[..., :WIDTH].unbind(1):
        state = mixer.decay * state + token
        outputs.append(state)
    return torch.stack(outputs, 1)


def write_into_state(mixer: Mixer, x: Tensor) -> Tensor:
    """The same, in one tensor that every token overwrites."""
    state, outputs = torch.zeros(BATCH, WIDTH), []
    for token in mixer.project(x)[..., :WIDTH].unbind(1):
        state.mul_(0.9).add_(token)
        outputs.append(state.sum(-1, keepdim=True) * token)
    return torch.stack(outputs, 1)


def remember_products(mixer: Mixer, x: Tensor) -> Tensor:
    """A matrix per sequence, written by keys and values, read by queries."""
    q, k, v = mixer.project(x).chunk(3, -1)
    state, outputs = torch.zeros(BATCH, WIDTH, WIDTH), []
    for query, key, value in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        state = 0.9 * state + key.unsqueeze(-1) * value.unsqueeze(-2)
        outputs.append((query.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1)


def run_cell(mixer: Mixer, x: Tensor) -> Tensor:
    """A recurrent cell: its state passes a product with a parameter."""
    state, outputs = torch.zeros(BATCH, WIDTH), []
    for token in mixer.project(x)[..., :WIDTH].unbind(1):
        state = torch.tanh(mixer.recur(state) + token)
        outputs.append(state)
    return torch.stack(outputs, 1)


def run_gated_cell(mixer: Mixer, x: Tensor) -> Tensor:
    """A GRU: its state comes back through a product, and past it through a gate."""
    state, outputs = torch.zeros(BATCH, WIDTH), []
    for token, gate in zip(
        mixer.project(x)[..., :WIDTH].unbind(1), x.sigmoid().unbind(1), strict=True
    ):
        state = gate * state + (1 - gate) * torch.tanh(mixer.recur(state) + token)
        outputs.append(state)
    return torch.stack(outputs, 1)


def run_two_states(mixer: Mixer, x: Tensor) -> Tensor:
    """An LSTM: what its cell keeps comes back through gates made from its output."""
    output, cell, outputs = torch.zeros(BATCH, WIDTH), torch.zeros(BATCH, WIDTH), []
    for token in mixer.project(x)[..., :WIDTH].unbind(1):
        gate = torch.sigmoid(mixer.recur(output) + token)
        cell = gate * cell + (1 - gate) * token.tanh()
        output = gate * cell.tanh()
        outputs.append(output)
    return torch.stack(outputs, 1)


def loop_without_state(mixer: Mixer, x: Tensor) -> Tensor:
    """Every token by itself, written into one tensor."""
    projected = mixer.project(x)[..., :WIDTH]
    output = torch.zeros(BATCH, TOKENS, WIDTH)
    for n in range(TOKENS):
        output[:, n] = torch.tanh(projected[:, n]) * mixer.decay
    return output


def sum_over_past(mixer: Mixer, x: Tensor) -> Tensor:
    """Linear attention, all tokens at once."""
    q, k, v = mixer.project(x).chunk(3, -1)
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
    return (q.unsqueeze(-2) @ states).squeeze(-2)


def multiply_features(mixer: Mixer, x: Tensor) -> Tensor:
    """Features of a token times features of the same token: no token meets another."""
    q, k, v = mixer.project(x).chunk(3, -1)
    return (q.unsqueeze(-2) @ (k.unsqueeze(-1) * v.unsqueeze(-2))).squeeze(-2)


@pytest.mark.parametrize(
    ("mix", "kind"),
    [
        (decay_channels, "recurrent"),
        (write_into_state, "recurrent"),
        (remember_products, "recurrent"),
        (sum_over_past, "linear"),
        (run_cell, None),
        (run_gated_cell, None),
        (run_two_states, None),
        (loop_without_state, None),
        (multiply_features, None),
    ],
)
def test_kind(mix: Mix, kind: str | None) -> None:
    layers = trace(mix).layers()
    assert layers.select("layer", "kind").rows() == ([("mixer", kind)] if kind else [])


@pytest.mark.parametrize(
    ("mix", "state"),
    [
        (decay_channels, BATCH * WIDTH * FLOAT),
        (remember_products, BATCH * WIDTH * WIDTH * FLOAT),
    ],
)
def test_autograd_keeps_the_state_of_every_token(mix: Mix, state: int) -> None:
    run = trace(mix)
    kept = run.allocations.filter(
        pl.col("category") == "recurrent_state", pl.col("saved"), pl.col("layer") == "mixer"
    )
    assert kept["requested_bytes"].sum() == pytest.approx(TOKENS * state, abs=state)


class Streaming(nn.Module):
    """A recurrent cell that is fed one token at a time."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(31, WIDTH), cell, nn.Linear(WIDTH, 31)

    def forward(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self.cell(self.embed(token), state)
        output = state[0] if isinstance(state, tuple) else state
        return self.head(output).argmax(-1), state


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_state_of_an_ordinary_cell_is_kept_but_makes_no_attention_layer(cell: Any) -> None:
    model, state = Streaming(cell(WIDTH, WIDTH)), None
    token = torch.zeros(BATCH, dtype=torch.long)
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        for _ in range(5):
            token, state = model(token, state)
    run = tracer.run
    assert run.layers().is_empty()
    assert "recurrent_state" in run.peak().by_category()
