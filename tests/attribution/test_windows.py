"""Windows of keys in the layouts that programs cut: heads before the batch, padding, sorts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof

BATCH, HEADS, HEAD_DIM, TOKENS, WINDOW = 2, 3, 10, 37, 8
WIDTH = HEADS * HEAD_DIM
WINDOWS = 5
"""Of so many tokens, the last one padded."""

Row = tuple[object, ...]
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def look_back(x: Tensor) -> Tensor:
    """Return (B, W, 2N, D), the windows of (B, W, N, D) after those before them."""
    before = functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat((before, x), 2)


def attend_locally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from each window to itself and the one before, of (B, T, D)."""
    tokens = q.shape[1]
    q, k, v = (functional.pad(x, (0, 0, 0, -tokens % WINDOW)) for x in (q, k, v))
    q, k, v = (x.unflatten(1, (-1, WINDOW)) for x in (q, k, v))
    weights = (q @ look_back(k).mT).softmax(-1)
    return (weights @ look_back(v)).flatten(1, 2)[:, :tokens]


def attend_sorted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within buckets of tokens that hash alike, of (B, T, D)."""
    order = q.sum(-1, keepdim=True).argsort(1)
    places = order.expand_as(q)
    q, k, v = (x.gather(1, places) for x in (q, k, v))
    return attend_locally(q, functional.normalize(k, dim=-1), v).scatter(1, places, v)


def turn_partly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from all tokens to all; positions turn some features, of all tokens but the first."""
    positions = torch.linspace(0.0, 1.0, TOKENS - 1)[:, None]

    def turn(x: Tensor) -> Tensor:
        first, rest = x[:, :1], x[:, 1:]
        turned = torch.cat((rest[..., :4] * positions, rest[..., 4:]), -1)
        return torch.cat((first, turned), 1)

    return (turn(q) @ turn(k).mT).softmax(-1) @ v


class Attention(nn.Module):
    """Attention whose heads are put before the batch: (B*H, T, D)."""

    def __init__(self, mix: Mix, heads: int) -> None:
        super().__init__()
        self.mix, self.heads = mix, heads
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.mix(*(part.flatten(0, 1) for part in parts))
        return self.out(mixed.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))


def read_row(layer: nn.Module) -> Row:
    model = nn.Sequential(nn.Embedding(31, WIDTH), layer)
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randint(31, (BATCH, TOKENS))).square().mean().backward()
    columns = ("kind", "batch", "heads", "q_len", "k_len")
    (row,) = tracer.run.layers().select(columns).rows()
    return row


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("mix", [attend_locally, attend_sorted])
def test_windows_are_no_heads(mix: Mix, heads: int) -> None:
    batch = BATCH * WINDOWS
    assert read_row(Attention(mix, heads)) == ("banded", batch, heads, WINDOW, 2 * WINDOW)


def test_heads_before_the_batch_are_heads_if_some_features_are_turned() -> None:
    row = read_row(Attention(turn_partly, HEADS))
    assert row == ("materialised", BATCH, HEADS, TOKENS, TOKENS)


class Sorted(Attention):
    """Attention within buckets of tokens that are alike, as constants of every head say."""

    def __init__(self) -> None:
        super().__init__(self.attend, HEADS)
        self.register_buffer("means", torch.randn(HEADS, HEAD_DIM))

    def attend(self, *parts: Tensor) -> Tensor:
        q, k, v = (part.unflatten(0, (-1, HEADS))[:, :, : 4 * WINDOW] for part in parts)
        order = torch.einsum("bhtd,hd->bht", q, self.means).argsort(-1)
        places = order[..., None].expand_as(q)
        q, k, v = (x.gather(2, places).unflatten(2, (-1, WINDOW)) for x in (q, k, v))
        mixed = ((q @ k.mT).softmax(-1) @ v).flatten(2, 3)
        return torch.zeros_like(mixed).scatter(2, places, mixed).flatten(0, 1)


def test_heads_are_heads_where_an_index_of_tokens_gathers() -> None:
    assert read_row(Sorted()) == ("banded", 4 * BATCH, HEADS, WINDOW, WINDOW)


class Streams(nn.Module):
    """Residual streams in the batch, which are summed up before a layer and added to after it."""

    def __init__(self, layer: nn.Module, streams: int) -> None:
        super().__init__()
        self.layer = layer
        self.read, self.write = (nn.Parameter(torch.rand(streams)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        streams = x.repeat_interleave(len(self.read), 0).unflatten(0, (len(x), -1))
        given = torch.einsum("s,bstd->btd", self.read, streams)
        return torch.einsum("s,btd->bstd", self.write, self.layer(given)) + streams


def test_streams_are_no_sequences() -> None:
    layer = Streams(Attention(attend_locally, HEADS), streams=4)
    assert read_row(layer) == ("banded", BATCH * WINDOWS, HEADS, WINDOW, 2 * WINDOW)


class Captioned(nn.Module):
    """Attention of frames to a caption that they share, before that within windows of a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.words = nn.Linear(WIDTH, WIDTH), nn.Linear(9, WIDTH)
        self.layer = Attention(attend_locally, HEADS)

    def forward(self, x: Tensor, caption: Tensor) -> Tensor:
        words = self.words(caption.repeat_interleave(len(x) // len(caption), 0))
        x = (self.query(x) @ words.mT).softmax(-1) @ words + x
        return self.layer(x)


def test_what_attends_to_a_repeated_caption_is_as_many_sequences_as_before() -> None:
    frames, caption = torch.randn(3 * BATCH, TOKENS, WIDTH), torch.randn(BATCH, 5, 9)
    with attnprof.trace(samples_per_second=0) as tracer:
        Captioned()(frames, caption).square().mean().backward()
    rows = tracer.run.layers().select("layer", "kind", "batch", "heads").rows()
    assert ("layer", "banded", 3 * BATCH * WINDOWS, HEADS) in rows


class Shared(nn.Module):
    """Learned queries that no sequence has copies of: one product takes the keys of all."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(11, WIDTH))
        self.query, self.rest = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(self.latents).unflatten(-1, (HEADS, -1))
        key, value = self.rest(x).unflatten(-1, (2, HEADS, -1)).unbind(2)
        weights = torch.einsum("qhd,bkhd->bhqk", query, key).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def test_keys_of_all_sequences_are_as_many_as_one_has() -> None:
    assert read_row(Shared()) == ("materialised", BATCH, HEADS, 11, TOKENS)


class Pooled(nn.Module):
    """Attention whose heads are put before the batch for convolutions over a grid of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.pool = nn.ModuleList(
            nn.Conv2d(HEAD_DIM, HEAD_DIM, 3, 2, 1, groups=HEAD_DIM) for _ in range(3)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        grid = x.shape[2:]
        parts = self.project(x.flatten(2).mT).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 4, 1)
        q, k, v = (
            pool(part.flatten(0, 1).unflatten(-1, grid)).flatten(2).mT.unflatten(0, (-1, HEADS))
            for pool, part in zip(self.pool, parts.unbind(0), strict=True)
        )
        return (q @ k.mT).softmax(-1) @ v


def test_heads_before_the_batch_are_heads_behind_a_convolution() -> None:
    with attnprof.trace(samples_per_second=0) as tracer:
        Pooled()(torch.randn(BATCH, 3, 12, 20)).square().mean().backward()
    (row,) = tracer.run.layers().select("kind", "batch", "heads", "q_len", "k_len").rows()
    assert row == ("materialised", BATCH, HEADS, 15, 15)
