"""Attention whose scores come from several products, or meet values piece by piece."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import attnprof

HEADS, WIDTH, BATCH = 4, 48, 3
Row = tuple[object, ...]
Mix = Callable[[Tensor, Tensor], Tensor]
Repeat = Callable[[Tensor], Tensor]


def list_rows(model: nn.Module, **inputs: Tensor) -> dict[str, Row]:
    """Return kind, batch, heads, KV heads, and keys per query of each layer."""
    with attnprof.trace(samples_per_second=0) as tracer:
        model(**inputs)[0].float().square().mean().backward()
    columns = ("layer", "kind", "batch", "heads", "kv_heads", "q_len", "k_len")
    return {str(row[0]): row[1:] for row in tracer.run.layers().select(columns).rows()}


def make_ids(tokens: int) -> Tensor:
    return torch.randint(3, 60, (BATCH, tokens))


SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 61, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0,
}  # fmt: skip


def test_bias_made_of_tokens_leaves_heads_as_they_are() -> None:
    config = transformers.ProphetNetConfig(
        **SEQ2SEQ, hidden_size=WIDTH, num_encoder_layers=1, num_decoder_layers=1, ngram=2,
        num_encoder_attention_heads=HEADS, num_decoder_attention_heads=HEADS,
    )  # fmt: skip
    model = transformers.ProphetNetModel(config)
    rows = list_rows(model, input_ids=make_ids(14), decoder_input_ids=make_ids(10))
    assert rows["encoder.layers.0.self_attn"][1:] == (BATCH, HEADS, HEADS, 14, 14)
    # Two streams predict: each of them meets the main stream's keys and its own.
    assert rows["decoder.layers.0.self_attn"][1:] == (2 * BATCH, HEADS, HEADS, 10, 20)


@pytest.mark.parametrize("held", [6, 16], ids=["fewer than a block", "as many as a block"])
def test_global_tokens_and_blocks_are_met_by_every_query(held: int) -> None:
    config = transformers.PegasusXConfig(
        **SEQ2SEQ, d_model=WIDTH, encoder_layers=1, decoder_layers=1, block_size=16,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, num_global_tokens=held,
    )  # fmt: skip
    model = transformers.PegasusXModel(config)
    rows = list_rows(model, input_ids=make_ids(64), decoder_input_ids=make_ids(9))
    assert rows == {
        "encoder.layers.0.self_attn": ("banded", BATCH, HEADS, HEADS, 64, held + 16),
        "decoder.layers.0.self_attn": ("materialised", BATCH, HEADS, HEADS, 9, 9),
        "decoder.layers.0.encoder_attn": ("materialised", BATCH, HEADS, HEADS, 9, 64),
    }


def test_global_window_and_random_blocks_are_met_by_every_query() -> None:
    config = transformers.BigBirdConfig(
        vocab_size=61, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS,
        intermediate_size=64, block_size=8, num_random_blocks=2, attention_type="block_sparse",
    )  # fmt: skip
    model = transformers.BigBirdModel(config)
    rows = list_rows(model, input_ids=make_ids(160))
    # Two global blocks, a window of three, two random ones; the first and last two blocks of
    # queries have products of their own.
    assert rows == {"encoder.layer.0.attention.self": ("banded", BATCH, HEADS, HEADS, 128, 7 * 8)}


class Sink(nn.Module):
    """Scores with a column for no key; values are met in blocks of queries, or twice."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.project, self.twice = nn.Linear(WIDTH, 3 * WIDTH), twice
        self.sink = nn.Parameter(torch.zeros(1, HEADS, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT
        sink = self.sink.expand(len(x), -1, scores.shape[2], -1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        if self.twice:
            return (torch.cat([weights @ v, weights @ v.sin()], -1),)
        return (torch.cat([part @ v for part in weights.chunk(2, 2)], 2),)


@pytest.mark.parametrize("twice", [False, True])
def test_sink_is_no_key_where_values_are_met_in_several_products(twice: bool) -> None:
    rows = list_rows(Sink(twice=twice), x=torch.randn(BATCH, 20, WIDTH))
    assert rows == {"": ("materialised", BATCH, HEADS, HEADS, 20, 20)}


class Mixed(nn.Module):
    """Scores in which a part of the rows or of the heads is left when they meet values."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.project, self.mix = nn.Linear(WIDTH, 3 * WIDTH), mix

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return (self.mix((q @ k.mT).softmax(-1), v),)


def subtract(weights: Tensor, values: Tensor) -> Tensor:
    """Do as the Differential Transformer."""
    first, second = weights.unflatten(1, (-1, 2)).unbind(2)
    return (first - 0.3 * second) @ values.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)


def average(weights: Tensor, values: Tensor) -> Tensor:
    """Do as the Temporal Fusion Transformer, whose heads share their values."""
    return weights.mean(1) @ values[:, 0]


def prune(weights: Tensor, values: Tensor) -> Tensor:
    return weights[:, [0, 2, 3]] @ values[:, [0, 2, 3]]


def ask_for_one(weights: Tensor, values: Tensor) -> Tensor:
    return weights[:, :, :1] @ values


def attend_in_causal_chunks(weights: Tensor, values: Tensor) -> Tensor:
    chunks = [weights[:, :, i : i + 10, : i + 10] @ values[:, :, : i + 10] for i in (0, 10)]
    return torch.cat(chunks, 2)


@pytest.mark.parametrize("mix", [subtract, average, prune, ask_for_one, attend_in_causal_chunks])
def test_rows_and_heads_that_are_left_out_are_no_keys(mix: Mix) -> None:
    rows = list_rows(Mixed(mix), x=torch.randn(BATCH, 20, WIDTH))
    assert rows == {"": ("materialised", BATCH, HEADS, HEADS, 20, 20)}


class Biased(nn.Module):
    """A bias of products, or of distances, of tokens; made before the scores or after them."""

    def __init__(self, *, is_first: bool, of_distances: bool) -> None:
        super().__init__()
        self.is_first, self.of_distances = is_first, of_distances
        self.project, self.features = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.slopes = nn.Parameter(torch.rand(HEADS, 1, 1))

    def make_bias(self, x: Tensor, places: Tensor) -> Tensor:
        if self.of_distances:
            return torch.cdist(places, places)[:, None] * self.slopes
        features: Tensor = self.features(x)
        return (features @ features.mT)[:, None]

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.is_first:
            bias = self.make_bias(x, places)
        scores = q @ k.mT
        if not self.is_first:
            bias = self.make_bias(x, places)
        return ((scores - bias).softmax(-1) @ v,)


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("of_distances", [False, True])
def test_bias_made_of_tokens_is_not_taken_for_the_scores(
    is_first: bool, of_distances: bool
) -> None:
    model = Biased(is_first=is_first, of_distances=of_distances)
    with attnprof.trace(samples_per_second=0) as tracer:
        x, places = torch.randn(BATCH, 20, WIDTH), torch.randn(BATCH, 20, 3)
        model(x, places)[0].square().mean().backward()
    columns = ("kind", "batch", "heads", "kv_heads", "q_len", "k_len", "head_dim")
    expected = ("materialised", BATCH, HEADS, HEADS, 20, 20, WIDTH // HEADS)
    assert tracer.run.layers().select(columns).rows() == [expected]


class Slopes(nn.Module):
    """Layers that weigh the same distances of tokens, each by its own slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SlopedLayer(), SlopedLayer()])

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor]:
        distances = torch.cdist(places, places)[:, None]
        for layer in self.layers:
            x = x + layer(x, distances)
        return (x,)


class SlopedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.slopes = nn.Parameter(torch.rand(HEADS, 1, 1))

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        bias = distances * self.slopes
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = ((q @ k.mT - bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return mixed


def test_distances_that_layers_share_leave_them_apart() -> None:
    inputs = {"x": torch.randn(BATCH, 20, WIDTH), "places": torch.randn(BATCH, 20, 3)}
    rows = list_rows(Slopes(), **inputs)
    expected = ("materialised", BATCH, HEADS, HEADS, 20, 20)
    assert rows == {"layers.0": expected, "layers.1": expected}


class Repeated(nn.Module):
    """Cross-attention to K and V of fewer heads or fewer sequences, repeated as ``repeat`` does."""

    def __init__(self, heads: int, repeat: Repeat) -> None:
        super().__init__()
        self.heads, self.repeat = heads, repeat
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(11, 2 * heads * WIDTH // HEADS)

    def forward(self, x: Tensor, source: Tensor) -> tuple[Tensor]:
        q = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        parts = self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = (self.repeat(part) for part in parts)
        return ((q @ k.mT).softmax(-1) @ v,)


@pytest.mark.parametrize(
    ("heads", "sequences", "repeat"),
    [
        (HEADS, 2, lambda t: t.repeat_interleave(3, 0)),
        (HEADS, 2, lambda t: t.repeat(3, 1, 1, 1)),
        (HEADS, 1, lambda t: t),
        (2, 6, lambda t: t.repeat_interleave(2, 1)),
        (2, 6, lambda t: t.repeat(1, 2, 1, 1)),
        (2, 6, lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)),
        (1, 6, lambda t: t),
        (1, 6, lambda t: t.expand(-1, HEADS, -1, -1)),
    ],
)
def test_repeated_sequences_are_not_repeated_heads(
    heads: int, sequences: int, repeat: Repeat
) -> None:
    inputs = {"x": torch.randn(6, 20, WIDTH), "source": torch.randn(sequences, 9, 11)}
    rows = list_rows(Repeated(heads, repeat), **inputs)
    assert rows == {"": ("materialised", 6, HEADS, heads, 20, 9)}


class Grouped(nn.Module):
    """The attention of gpt-oss's reference: no batch, groups of heads as a dimension, sinks."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, (6 + 2 + 2) * 8)
        self.sinks = nn.Parameter(torch.randn(2, 3, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).split([6 * 8, 2 * 8, 2 * 8], -1)
        q = q.view(-1, 2, 3, 8)
        k, v = (t.view(-1, 2, 1, 8).expand(-1, -1, 3, -1) for t in (k, v))
        scores = torch.einsum("qhmd,khmd->hmqk", q, k)
        sinks = self.sinks.expand(-1, -1, len(x), -1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return (torch.einsum("hmqk,khmd->qhmd", weights, v),)


def test_groups_of_heads_without_a_batch_are_heads() -> None:
    rows = list_rows(Grouped(), x=torch.randn(20, WIDTH))
    assert rows == {"": ("materialised", 1, 6, 2, 20, 20)}


class Segments(nn.Module):
    """Queries ask segment by segment; each sees its own keys and some of those before."""

    def __init__(self, length: int, *, sees_all: bool) -> None:
        super().__init__()
        self.project, self.length, self.sees_all = nn.Linear(WIDTH, 3 * WIDTH), length, sees_all

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = []
        for begin in range(0, x.shape[1], self.length):
            end = begin + self.length
            seen = slice(0 if self.sees_all else max(0, begin - self.length), end)
            weights = (q[:, :, begin:end] @ k[:, :, seen].mT).softmax(-1)
            mixed.append(weights @ v[:, :, seen])
        return (torch.cat(mixed, 2),)


@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize("sees_all", [False, True])
def test_segments_that_see_the_one_before_are_a_band(length: int, sees_all: bool) -> None:
    rows = list_rows(Segments(length, sees_all=sees_all), x=torch.randn(BATCH, 23, WIDTH))
    assert rows[""][0] == ("materialised" if sees_all else "banded")


class Remembering(nn.Module):
    """Infini-attention: segments, and a memory of those before that is read by linear attention."""

    def __init__(self, *, is_normalised: bool) -> None:
        super().__init__()
        self.project, self.is_normalised = nn.Linear(WIDTH, 3 * WIDTH), is_normalised

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        width = WIDTH // HEADS
        memory, total = x.new_zeros(BATCH, HEADS, width, width), x.new_zeros(BATCH, HEADS, width, 1)
        mixed = []
        for query, key, value in zip(*(t.split(8, 2) for t in (q, k, v)), strict=True):
            asking, asked = functional.elu(query) + 1, functional.elu(key) + 1
            read, known = asking @ memory, asked @ memory
            if self.is_normalised:
                read, known = read / (asking @ total + 1), known / (asked @ total + 1)
            mixed.append(read + (query @ key.mT).softmax(-1) @ value)
            memory = memory + asked.mT @ (value - known)
            total = total + asked.sum(2).unsqueeze(-1)
        return (torch.cat(mixed, 2),)


@pytest.mark.parametrize("is_normalised", [False, True])
def test_what_a_memory_is_divided_by_is_no_score(is_normalised: bool) -> None:
    model = Remembering(is_normalised=is_normalised)
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, 23, WIDTH))[0].square().mean().backward()
    (row,) = tracer.run.layers().rows(named=True)
    shapes = [row[name] for name in ("kind", "batch", "heads", "q_len", "k_len")]
    assert shapes == ["banded", BATCH, HEADS, 8, 8]
    assert row["softmax_bytes"] == BATCH * HEADS * (8 * 8 + 8 * 8 + 7 * 7) * 4
