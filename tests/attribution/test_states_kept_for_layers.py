"""States that a model or a program keeps for layers: whose they are, and since when."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import attnprof
from attnprof.run import Run
from tests.attribution.cache_programs import BATCH, FLOAT, NEW, PROMPT, held_by_forward

WIDTH, KERNEL, LAYERS = 18, 4, 3


def leave(state: Any) -> Any:
    return state


def decode(model: nn.Module, between: Callable[[Any], Any] = leave) -> Run:
    """Trace a prompt and single tokens; ``between`` says what of a state is kept."""
    state = None
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        for tokens in [PROMPT] + [1] * (NEW - 1):
            state = model(torch.randn(BATCH, tokens, WIDTH), state)
            state = between(state)
    return tracer.run


class Decaying(nn.Module):
    """Reads a state and returns the one to go on with."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state * 0.9 + self.project(x).sum(1)
        return x + state[:, None], state


class Stack(nn.Module):
    """Copies what its layers return into the states that it gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Decaying() for _ in range(LAYERS))

    def forward(self, x: Tensor, states: list[Tensor] | None) -> list[Tensor]:
        states = states or [torch.zeros(BATCH, WIDTH) for _ in self.blocks]
        for block, state in zip(self.blocks, states, strict=True):
            x, new = block(x, state)
            state.copy_(new)
        return states


def test_states_that_a_model_keeps_for_its_layers_are_the_layers() -> None:
    rows = decode(Stack()).kv_cache()
    assert set(rows["layer"]) == {f"blocks.{n}" for n in range(LAYERS)}
    assert set(rows["held_bytes"]) == {BATCH * WIDTH * FLOAT}


class Convolving(nn.Module):
    """Returns all that its convolution has seen, for the program to choose what to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv1d(WIDTH, WIDTH, KERNEL)

    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:
        x = x.transpose(1, 2)
        if state is None:
            state = x.new_zeros(BATCH, WIDTH, KERNEL - 1)
        seen = torch.cat([state, x], -1)
        self.convolve(seen)
        return seen


def test_what_a_program_keeps_of_a_convolutions_inputs_is_a_state() -> None:
    run = decode(Convolving(), lambda seen: seen[..., -(KERNEL - 1) :])
    assert set(run.kv_cache()["category"]) == {"recurrent_state"}


class Waiting(nn.Module):
    """Keeps what it projected until a window of it is full."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, waiting: Tensor | None) -> Tensor:
        new = self.project(x)
        if waiting is not None:
            new = torch.cat([waiting, new], 1)
        full = new.shape[1] // KERNEL * KERNEL
        new[:, :full].unflatten(1, (-1, KERNEL)).mean(2)
        return new[:, full:]


def test_what_waits_is_a_state_since_the_prompt_where_beams_are_reordered() -> None:
    def reorder(waiting: Tensor) -> Tensor:
        return waiting.index_select(0, torch.tensor([1, 0]))

    run = decode(Waiting(), reorder)
    assert set(run.kv_cache()["category"]) == {"recurrent_state"}
    assert held_by_forward(run)[0] == BATCH * PROMPT * WIDTH * FLOAT  # a view keeps all of it
