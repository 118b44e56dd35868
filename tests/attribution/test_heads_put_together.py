"""Heads that are cut from the features and put before the batch, or beside it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnprof

BATCH, TOKENS, KEYS, HEADS, HEAD_DIM = 2, 23, 13, 4, 6
WIDTH = HEADS * HEAD_DIM


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1) @ value


def by_chunks(*parts: Tensor) -> Tensor:
    """As in the Set Transformer."""
    mixed = attend(*(torch.cat(part.chunk(HEADS, 2), 0) for part in parts))
    return torch.cat(mixed.chunk(HEADS, 0), 2)


def by_splits(*parts: Tensor) -> Tensor:
    mixed = attend(*(torch.cat(part.split(HEAD_DIM, 2), 0) for part in parts))
    return torch.cat(mixed.split(BATCH, 0), 2)


def by_stacking(*parts: Tensor) -> Tensor:
    """As in AutoInt."""
    mixed = attend(*(torch.stack(part.split(HEAD_DIM, 2), 0) for part in parts))
    return torch.cat(mixed.unbind(0), 2)


class Attention(nn.Module):
    def __init__(self, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in "qkv")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.mix(self.query(x), self.key(y), self.value(y))


@pytest.mark.parametrize("mix", [by_chunks, by_splits, by_stacking])
def test_heads_cut_from_the_features_are_heads(mix: Callable[..., Tensor]) -> None:
    model = Attention(mix)
    with attnprof.trace(samples_per_second=0) as tracer:
        output = model(torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, KEYS, WIDTH))
        output.square().mean().backward()
    (row,) = tracer.run.layers().rows(named=True)
    assert row["kind"] == "materialised"
    names = ("batch", "heads", "kv_heads", "q_len", "k_len", "head_dim")
    assert [row[name] for name in names] == [BATCH, HEADS, HEADS, TOKENS, KEYS, HEAD_DIM]
    assert row["saved_softmax_bytes"] == BATCH * HEADS * TOKENS * KEYS * 4


def test_images_put_together_along_channels_have_no_heads() -> None:
    """Patches of four neighbours become one: those are tokens, and no features."""

    class Merging(Attention):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            merged = torch.cat([x[:, i::4, : WIDTH // 4] for i in range(4)], -1)
            return attend(self.query(merged), self.key(merged), self.value(merged))

    model = Merging(attend)
    with attnprof.trace(samples_per_second=0) as tracer:
        x = torch.randn(BATCH, 4 * TOKENS, WIDTH)
        model(x, x).square().mean().backward()
    (row,) = tracer.run.layers().rows(named=True)
    assert (row["batch"], row["heads"], row["q_len"]) == (BATCH, 1, TOKENS)
