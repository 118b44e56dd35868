"""Twice the decoded tokens, or training steps, are twice the work, and not four times."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnprof
from attnprof.analysis import cache_copies
from attnprof.analysis.cache_use import CacheUse
from attnprof.attribution.facts import Facts, Ints
from attnprof.run import Run
from tests.attribution.cache_programs import PROMPT
from tests.attribution.test_caches_by_hand import (
    Model,
    Store,
    concatenate,
    embed,
    make_room,
    write_slice,
)

FEW, MANY = 12, 24


def decode(tokens: int, store: Store = concatenate, past: list[Any] | None = None) -> Run:
    """Trace a prompt and ``tokens`` single ones, with a cache that grows or the room ``past``."""
    model = Model(store).eval()
    past = past or [None] * len(model.layers)
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        x, past = model(embed(), past, 0)
        for start in range(PROMPT, PROMPT + tokens):
            x, past = model(x[:, -1:], past, start)
    return tracer.run


def train(steps: int) -> Run:
    """Trace steps of training that change the parameters in place."""
    model = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    with attnprof.trace(samples_per_second=0, detail="full") as tracer:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(2, 5, 16)).sum().backward()
            optimizer.step()
            tracer.step()
    return tracer.run


@pytest.mark.parametrize("program", [decode, train])
def test_grouping_heads_looks_at_each_token_once(
    program: Callable[[int], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, rows_in = [0], Facts.rows_in

    def count(facts: Facts, op: int) -> range:
        looks[0] += 1
        return rows_in(facts, op)

    counts = []
    for length in (FEW, MANY):
        run = program(length)
        assert run.attribution.calls
        with monkeypatch.context() as patch:
            patch.setattr(Facts, "rows_in", count)
            looks[0] = 0
            run.what_if(kv_heads=1)
        counts.append(looks[0])
    assert counts[1] <= 2.2 * counts[0]


class Averaging(nn.Module):
    """Attention that also keeps a running mean of its keys: each is made from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.kept: tuple[Tensor, Tensor] | None = None
        self.mean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        query, *new = self.project(x).chunk(3, -1)
        key, value = (
            (torch.cat(pair, 1) for pair in zip(self.kept, new, strict=True)) if self.kept else new
        )
        self.kept = key, value
        mean = key.mean(1)
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return x + (query @ key.mT).softmax(-1) @ value


def test_copies_of_copies_of_a_cache_are_looked_for_in_one_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, indices = Averaging(), []
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        x = torch.randn(1, 4, 16)
        for _ in range(FEW):
            x = model(x)[:, -1:]

    def index(*arguments: Any) -> CacheUse:
        indices.append(arguments)
        return CacheUse(*arguments)

    monkeypatch.setattr(cache_copies, "CacheUse", index)
    assert (tracer.run.kv_cache()["expanded_bytes"] > 0).any()
    assert len(indices) == 1


def test_a_room_is_not_looked_through_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_out, rows_of = [0], CacheUse.rows_of

    def count(use: CacheUse, storage: int) -> Ints:
        rows = rows_of(use, storage)
        handed_out[0] += len(rows)
        return rows

    monkeypatch.setattr(CacheUse, "rows_of", count)
    counts = []
    for tokens in (FEW // 2, FEW):
        run = decode(tokens, write_slice, make_room())
        handed_out[0] = 0
        assert run.kv_cache()["tokens"].max() == PROMPT + tokens
        counts.append(handed_out[0])
    assert counts[1] <= 2.2 * counts[0]
