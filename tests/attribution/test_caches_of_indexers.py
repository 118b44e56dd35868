"""Keys by which a layer chooses tokens: no second product reads them, and they are a cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnprof
from attnprof.run import Run
from tests.attribution.cache_programs import BATCH, FLOAT, NEW, PROMPT, WIDTH, held_by_forward

INDEX_DIM = 14
CHOSEN = 4
ROOM = PROMPT + NEW + 3
TOKEN = BATCH * (2 * WIDTH + INDEX_DIM) * FLOAT
"""Bytes of K, V and the indexer's key of one token of every sequence."""

Kept = list[Tensor]


class Indexed(nn.Module):
    """Attends with one head to the tokens that an indexer scored highest.

    K and V are (B, 1, T, D), the indexer's keys (B, T, D).
    """

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.project = nn.Linear(WIDTH, 3 * WIDTH + 2 * INDEX_DIM)

    def keep(self, past: Kept | None, new: Kept, start: int) -> Kept:
        past = past or [part[..., :0, :] for part in new]
        if not self.in_place:
            return [torch.cat(pair, -2) for pair in zip(past, new, strict=True)]
        places = torch.arange(start, start + new[-1].shape[1])
        return [old.index_copy_(-2, places, part) for old, part in zip(past, new, strict=True)]

    def forward(self, x: Tensor, past: Kept | None, start: int) -> tuple[Tensor, Kept]:
        sizes = [WIDTH] * 3 + [INDEX_DIM] * 2
        query, key, value, chooser, index = self.project(x).split(sizes, -1)
        kept = self.keep(past, [key[:, None], value[:, None], index], start)
        key, value, index = kept
        chosen = (chooser @ index.transpose(-1, -2)).topk(CHOSEN, -1).indices
        mask = torch.full((x.shape[0], x.shape[1], index.shape[1]), -torch.inf)
        mask = mask.scatter_(-1, chosen, 0)
        weights = (query[:, None] @ key.transpose(-1, -2) + mask[:, None]).softmax(-1)
        return (weights @ value)[:, 0], kept


def leave(kept: Kept) -> Kept:
    return kept


def reorder(kept: Kept) -> Kept:
    """Put beams in another order, as their search does."""
    return [part.index_select(0, torch.tensor([1, 0])) for part in kept]


def decode(model: nn.Module, past: Kept | None, between: Callable[[Kept], Kept]) -> Run:
    x, start = torch.randn(BATCH, PROMPT, WIDTH), 0
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        for _ in range(NEW):
            out, past = model(x, past, start)
            past, start, x = between(past), start + x.shape[1], out[:, -1:] * 1
    return tracer.run


def make_room() -> Kept:
    key, value = torch.zeros(2, BATCH, 1, ROOM, WIDTH).unbind()
    return [key.clone(), value.clone(), torch.zeros(BATCH, ROOM, INDEX_DIM)]


def list_categories(run: Run) -> set[Any]:
    return set(run.kv_cache()["category"])


@pytest.mark.parametrize("between", [leave, reorder])
def test_keys_of_an_indexer_are_a_cache_from_the_prompt_on(between: Callable[..., Any]) -> None:
    run = decode(Indexed(in_place=False), None, between)
    assert list_categories(run) == {"kv_cache"}
    assert held_by_forward(run) == [n * TOKEN for n in range(PROMPT, PROMPT + NEW)]


@pytest.mark.parametrize("between", [leave, reorder])
def test_keys_of_an_indexer_in_a_room_are_a_cache(between: Callable[..., Any]) -> None:
    run = decode(Indexed(in_place=True), make_room(), between)
    assert list_categories(run) == {"kv_cache"}
    rows = run.kv_cache()
    assert set(rows["kind"]) == {"preallocated"}
    assert rows["tokens"].to_list() == list(range(PROMPT, PROMPT + NEW))


def test_keys_of_an_indexer_stay_a_cache_where_tokens_are_taken_back() -> None:
    def crop(kept: Kept) -> Kept:
        return [part[..., :-2, :] for part in kept]

    model, past = Indexed(in_place=False), None
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        for _ in range(NEW):
            _, past = model(torch.randn(BATCH, PROMPT, WIDTH), past, 0)
            past = crop(past)
    run = tracer.run
    assert list_categories(run) == {"kv_cache"}
    lengths = [PROMPT + n * (PROMPT - 2) for n in range(NEW)]  # of what was made, before it is cut
    assert held_by_forward(run) == [n * TOKEN for n in lengths]


class Pool(nn.Module):
    """A state per sequence in slots of one tensor, beside attention without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        state = pool[slots] * 0.9 + value.sum(1)
        pool.index_copy_(0, slots, state)
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value + state[:, None]


def test_slots_of_a_pool_of_states_are_sequences_and_no_tokens() -> None:
    model, pool = Pool(), torch.zeros(5, WIDTH)
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        for tokens in (PROMPT, 1, 1, 1):
            model(torch.randn(BATCH, tokens, WIDTH), pool, torch.tensor([3, 1]))
    assert list_categories(tracer.run) == {"recurrent_state"}


class DeltaRule(nn.Module):
    """Linear attention within a chunk, from which a state is taken that chunks hand on."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        value = value - key @ state  # what the state says of these keys already
        result = query @ state + (query @ key.transpose(-1, -2)).tril() @ value
        state.copy_(state + key.transpose(-1, -2) @ value)
        return result


def test_a_state_that_is_taken_from_values_is_no_cache() -> None:
    model, state = DeltaRule(), torch.zeros(BATCH, WIDTH, WIDTH)
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        for tokens in (PROMPT, PROMPT, 3):
            model(torch.randn(BATCH, tokens, WIDTH), state)
    run = tracer.run
    assert list_categories(run) == {"recurrent_state"}
    assert set(held_by_forward(run)) == {BATCH * WIDTH * WIDTH * FLOAT}
