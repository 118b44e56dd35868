"""One tensor for the caches, or the states, of all of a model's layers."""

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn

import attnprof
from attnprof.run import Run

BATCH, HEADS, HEAD_DIM, LAYERS, ROOM = 2, 3, 8, 3, 32
WIDTH = HEADS * HEAD_DIM
PROMPT = 9
PYRAMID = 4, 2, 2, 1
"""Heads of layers that have not all as many."""


class Layer(nn.Module):
    """Attention that keeps K and V in its part of a tensor (layers, 2, B, H, room, D)."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.project = number, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, cache: Tensor, start: int, keep: nn.Module) -> Tensor:
        end = start + x.shape[1]
        query, *new = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        for part, value in zip(cache[self.number], new, strict=True):
            part[:, :, start:end] = value
        keys, values = cache[self.number, :, :, :, :end]
        mixed: Tensor = ((query @ keys.mT).softmax(-1) @ values).transpose(1, 2).flatten(2)
        return x + mixed


class Cache(nn.Module):
    """What keeps K and V for all layers, and is none of them."""

    def forward(self, cache: Tensor, new: Tensor, start: int) -> Tensor:
        cache[:, :, :, start : start + new.shape[-2]] = new
        return cache[:, :, :, : start + new.shape[-2]]


class ByCache(nn.Module):
    """The same attention, which has a module of the model's keep K and V."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.project = number, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, cache: Tensor, start: int, keep: nn.Module) -> Tensor:
        query, *new = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        keys, values = keep(cache[self.number], torch.stack(new), start)
        mixed: Tensor = ((query @ keys.mT).softmax(-1) @ values).transpose(1, 2).flatten(2)
        return x + mixed


class Products(nn.Module):
    """Attention alone, as a module of its own."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mixed: Tensor = ((query @ keys.mT).softmax(-1) @ values).transpose(1, 2).flatten(2)
        return mixed


class Parent(Layer):
    """A layer that keeps K and V, and has a submodule attend."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.core = Products()

    def forward(self, x: Tensor, cache: Tensor, start: int, keep: nn.Module) -> Tensor:
        query, *new = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        end = start + x.shape[1]
        cache[self.number, :, :, :, start:end] = torch.stack(new)
        mixed: Tensor = self.core(query, *cache[self.number, :, :, :, :end])
        return x + mixed


class Recurrent(nn.Module):
    """Linear attention that keeps its state in its part of a tensor (layers, B, H, D, D)."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.project = number, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, states: Tensor, start: int, keep: nn.Module) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        state = states[self.number]
        state += k.exp().mT @ v
        return x + (q.exp() @ state).transpose(1, 2).flatten(2)


class Clamped(Recurrent):
    """The same, whose layers clear and bound the state that a submodule adds to."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.adding = Adding()

    def forward(self, x: Tensor, states: Tensor, start: int, keep: nn.Module) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        state = self.adding(states[self.number], k.exp().mT @ v).clamp_(-9, 9)
        return x + (q.exp() @ state).transpose(1, 2).flatten(2)


class Adding(nn.Module):
    def forward(self, state: Tensor, more: Tensor) -> Tensor:
        return state.add_(more)


Kind = type[Layer] | type[ByCache] | type[Recurrent]


class Model(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.keeper = Cache()
        self.embed, self.layers = nn.Embedding(31, WIDTH), nn.ModuleList(map(kind, range(LAYERS)))

    def forward(self, ids: Tensor, kept: Tensor, start: int) -> Tensor:
        x: Tensor = self.embed(ids)
        if start == 0:
            kept.zero_()
        for layer in self.layers:
            x = layer(x, kept, start, self.keeper)
        return x


def decode(kind: Kind, *shape: int) -> Run:
    model = Model(kind)
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        kept = torch.zeros(LAYERS, *shape)
        for start in (0, PROMPT, PROMPT + 1):
            model(torch.randint(31, (BATCH, 1 if start else PROMPT)), kept, start)
    return tracer.run


@pytest.mark.parametrize("kind", [Layer, ByCache, Parent])
def test_a_tensor_that_all_layers_write_into_is_none_of_theirs_alone(kind: Kind) -> None:
    run = decode(kind, 2, BATCH, HEADS, ROOM, HEAD_DIM)
    whole = 4 * LAYERS * 2 * BATCH * HEADS * ROOM * HEAD_DIM
    inner = ".core" if kind is Parent else ""
    names = [f"layers.{i}{inner}" for i in range(LAYERS)]
    by_layer = run.peak().by_layer()
    held = by_layer.filter(by_layer["category"] == "kv_cache")
    assert held.select("layer", "size_bytes").rows() == [("layers", whole)]
    layers = run.layers()
    assert layers["layer"].to_list() == names
    assert layers["kv_cache_bytes"].to_list() == [whole // LAYERS] * LAYERS
    cache = run.kv_cache()
    assert cache["layer"].to_list() == names * 3
    assert set(cache["kind"]) == {"preallocated"}
    assert set(cache["held_bytes"]) == {whole // LAYERS}
    assert cache["tokens"].to_list() == [PROMPT + i for i in range(3) for _ in range(LAYERS)]


class Grouped(nn.Module):
    """Attention with heads of its own number, in its stretch of a flat tensor."""

    def __init__(self, heads: int, first: int) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.project = nn.Linear(WIDTH, 3 * heads * HEAD_DIM)
        self.out = nn.Linear(heads * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor, pool: Tensor, start: int) -> Tensor:
        end = start + x.shape[1]
        shape = 2, BATCH, self.heads, ROOM, HEAD_DIM
        query, *new = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        room = pool[self.first :][: math.prod(shape)].view(shape)
        for part, value in zip(room, new, strict=True):
            part[:, :, start:end] = value
        keys, values = room[:, :, :, :end]
        mixed: Tensor = ((query @ keys.mT).softmax(-1) @ values).transpose(1, 2).flatten(2)
        return x + self.out(mixed)


class Pyramid(nn.Module):
    """Layers with ever fewer heads, whose rooms lie behind each other."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [2 * BATCH * heads * ROOM * HEAD_DIM for heads in PYRAMID]
        self.layers = nn.ModuleList(map(Grouped, PYRAMID, accumulate(sizes, initial=0)))

    def forward(self, x: Tensor, pool: Tensor, start: int) -> Tensor:
        for layer in self.layers:
            x = layer(x, pool, start)
        return x


def test_rooms_of_several_sizes_in_one_tensor_are_told_apart() -> None:
    model = Pyramid()
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        pool = torch.zeros(2 * BATCH * sum(PYRAMID) * ROOM * HEAD_DIM)
        for start in (0, PROMPT, PROMPT + 1):
            model(torch.randn(BATCH, 1 if start else PROMPT, WIDTH), pool, start)
    rooms = [4 * 2 * BATCH * heads * ROOM * HEAD_DIM for heads in PYRAMID]
    assert tracer.run.layers()["kv_cache_bytes"].to_list() == rooms
    cache = tracer.run.kv_cache()
    assert cache["held_bytes"].to_list() == rooms * 3
    assert cache["tokens"].to_list() == [PROMPT + i for i in range(3) for _ in PYRAMID]
    assert cache["bytes_per_token"].to_list() == [4 * 2 * h * HEAD_DIM for h in PYRAMID] * 3


@pytest.mark.parametrize("kind", [Recurrent, Clamped])
def test_states_of_all_layers_in_one_tensor_are_shared_out(kind: Kind) -> None:
    run = decode(kind, BATCH, HEADS, HEAD_DIM, HEAD_DIM)
    whole = 4 * LAYERS * BATCH * HEADS * HEAD_DIM * HEAD_DIM
    assert run.layers()["kind"].to_list() == ["linear"] * LAYERS
    cache = run.kv_cache()
    assert (
        cache.select("layer", "category", "held_bytes").rows()
        == [(f"layers.{i}", "recurrent_state", whole // LAYERS) for i in range(LAYERS)] * 3
    )
