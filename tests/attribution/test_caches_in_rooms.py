"""Rooms that were taken in advance: for an encoder's K and V, by the model itself, for a latent."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import attnprof
from attnprof.run import Run

BATCH, HEADS, HEAD_DIM, LAYERS, ROOM, LATENT = 2, 3, 8, 2, 64, 6
WIDTH = HEADS * HEAD_DIM
FLOAT = 4
PROMPT, NEW = 9, 4
LENGTHS = range(PROMPT, PROMPT + NEW)
ENCODED = 13
TOKEN = 2 * WIDTH * FLOAT
"""Bytes of K and V of one token of one sequence."""


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention without a cache, and what the others are made of."""

    def __init__(self, *, kept: int = WIDTH) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(kept, WIDTH), nn.Linear(kept, WIDTH)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mixed = attend(split_heads(self.query(x)), keys, values)
        done: Tensor = x + self.out(mixed.transpose(1, 2).flatten(2))
        return done


class Cross(Attention):
    """Attention to an encoder's tokens, kept in the beginning of a room."""

    def forward(self, x: Tensor, start: int, encoded: Tensor | None) -> Tensor:
        if encoded is not None:
            self.room = torch.zeros(2, BATCH, HEADS, ROOM, HEAD_DIM)
            self.length = encoded.shape[1]
            for part, projection in zip(self.room, (self.key, self.value), strict=True):
                part[:, :, : self.length].copy_(split_heads(projection(encoded)))
        return self.attend(x, *self.room[:, :, :, : self.length])


class Latent(Attention):
    """Attention that keeps a latent, in a room, and projects K and V from it."""

    def __init__(self) -> None:
        super().__init__(kept=LATENT)
        self.down = nn.Linear(WIDTH, LATENT)

    def forward(self, x: Tensor, start: int, encoded: Tensor | None) -> Tensor:
        end = start + x.shape[1]
        if start == 0:
            self.room = torch.zeros(BATCH, ROOM, LATENT)
        self.room[:, start:end] = self.down(x)
        kept = self.room[:, :end]
        return self.attend(x, split_heads(self.key(kept)), split_heads(self.value(kept)))


class Shifting(Attention):
    """Attention whose V have a share of the token before; it reads all of its room, masked."""

    def forward(self, x: Tensor, start: int, encoded: Tensor | None) -> Tensor:
        end = start + x.shape[1]
        if start == 0:
            self.room = [torch.zeros(BATCH, HEADS, ROOM, HEAD_DIM) for _ in "kv"]
            self.last = torch.zeros(BATCH, 1, WIDTH)
        own = self.value(x)
        shifted = torch.cat([self.last, own], 1)[:, :-1]
        self.last.copy_(own[:, -1:])
        for part, new in zip(self.room, (self.key(x), own + shifted), strict=True):
            part[:, :, start:end] = split_heads(new)
        seen = torch.arange(ROOM) <= torch.arange(start, end)[:, None]
        mixed = attend(split_heads(self.query(x)), *self.room, attn_mask=seen)
        done: Tensor = x + self.out(mixed.transpose(1, 2).flatten(2))
        return done


class Model(nn.Module):
    def __init__(self, kind: type[Attention]) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(31, WIDTH), nn.ModuleList(kind() for _ in "ab")

    def forward(self, ids: Tensor, start: int, encoded: Tensor | None) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = layer(x, start, encoded)
        return x


class KeptOnce(nn.Module):
    """A model that projects K and V once, into its own room, for all of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.own = nn.Embedding(31, WIDTH), Attention()
        self.layers = nn.ModuleList(Reading() for _ in range(LAYERS))

    def forward(self, ids: Tensor, start: int, encoded: Tensor | None) -> Tensor:
        x: Tensor = self.embed(ids)
        end = start + x.shape[1]
        if start == 0:
            self.room = torch.zeros(2, BATCH, HEADS, ROOM, HEAD_DIM)
        for part, projection in zip(self.room, (self.own.key, self.own.value), strict=True):
            part[:, :, start:end] = split_heads(projection(x))
        for layer in self.layers:
            x = layer(x, *self.room[:, :, :, :end])
        return x


class Reading(Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.attend(x, keys, values)


def decode(model: nn.Module, encoded: Tensor | None = None) -> Run:
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        for end in LENGTHS:
            new = PROMPT if end == PROMPT else 1
            model(torch.randint(31, (BATCH, new)), end - new, encoded)
            encoded = None
    return tracer.run


def test_an_encoders_tokens_in_a_room_are_those_that_were_written() -> None:
    frame = decode(Model(Cross), torch.randn(BATCH, ENCODED, WIDTH)).kv_cache()
    assert frame["layer"].to_list() == ["layers.0", "layers.1"] * NEW
    assert set(frame["kind"]) == {"cross"}
    assert set(frame["tokens"]) == {ENCODED}
    assert set(frame["bytes_per_token"]) == {TOKEN}
    assert set(frame["used_bytes"]) == {BATCH * ENCODED * TOKEN}
    assert set(frame["held_bytes"]) == {BATCH * ROOM * TOKEN}


def test_single_tokens_that_read_a_room_do_not_make_it_a_token_long() -> None:
    model = Model(Cross)
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        encoded: Tensor | None = torch.randn(BATCH, ENCODED, WIDTH)
        for start in range(NEW):
            model(torch.randint(31, (BATCH, 1)), start, encoded)
            encoded = None
    frame = tracer.run.kv_cache()
    assert set(frame["kind"]) == {"cross"}
    assert set(frame["tokens"]) == {ENCODED}
    assert set(frame["bytes_per_token"]) == {TOKEN}


def test_a_room_that_the_model_fills_for_its_layers_has_the_tokens_that_it_wrote() -> None:
    frame = decode(KeptOnce()).kv_cache()
    assert set(frame["kind"]) == {"preallocated"}
    assert frame["tokens"].to_list() == [*LENGTHS]
    assert frame["used_bytes"].to_list() == [BATCH * length * TOKEN for length in LENGTHS]
    assert set(frame["held_bytes"]) == {BATCH * ROOM * TOKEN}


def test_a_latent_in_a_room_is_a_latent() -> None:
    frame = decode(Model(Latent)).kv_cache()
    assert set(frame["kind"]) == {"latent"}
    assert frame["tokens"].to_list() == [n for n in LENGTHS for _ in range(LAYERS)]
    assert set(frame["bytes_per_token"]) == {LATENT * FLOAT}
    assert set(frame["held_bytes"]) == {BATCH * ROOM * LATENT * FLOAT}


def test_what_is_kept_of_the_last_token_beside_a_room_is_none_of_its_tokens() -> None:
    frame = decode(Model(Shifting)).kv_cache()
    assert set(frame["kind"]) == {"preallocated"}
    assert frame["tokens"].to_list() == [n for n in LENGTHS for _ in range(LAYERS)]
    assert set(frame["held_bytes"]) == {BATCH * (ROOM * TOKEN + WIDTH * FLOAT)}
