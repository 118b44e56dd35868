"""Attention whose scores come from several products, or meet values piece by piece."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnprof

HEADS, WIDTH, BATCH = 4, 48, 3
Row = tuple[object, ...]


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
