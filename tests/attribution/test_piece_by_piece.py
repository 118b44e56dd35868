"""Attention that a module does in a loop over queries, keys, heads or sequences."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof

BATCH, HEADS, TOKENS, HEAD_DIM = 3, 4, 40, 12
WIDTH = HEADS * HEAD_DIM
WHOLE = {
    "batch": BATCH, "heads": HEADS, "kv_heads": HEADS, "q_len": TOKENS, "k_len": TOKENS,
}  # fmt: skip

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Joint(nn.Module):
    """Q, K and V (B, H, T, D) are parts of one projection."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix, self.qkv, self.out = mix, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def project(self, x: Tensor) -> Iterator[Tensor]:
        yield from self.qkv(x).chunk(3, -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.project(x))
        return x + self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


class Separate(Joint):
    """Q, K and V have projections of their own."""

    def __init__(self, mix: Mix) -> None:
        super().__init__(mix)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def project(self, x: Tensor) -> Iterator[Tensor]:
        yield from (projection(x) for projection in self.projections)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / HEAD_DIM**0.5).softmax(-1) @ v


def all_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


def queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([attend(part, k, v) for part in q.split(8, 2)], 2)


def queries_unevenly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([attend(part, k, v) for part in q.split(16, 2)], 2)


def scaled_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([(part * 0.3 @ k.mT).softmax(-1) @ v for part in q.split(8, 2)], 2)


def queries_with_what_was_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ends = range(8, TOKENS + 1, 8)
    return torch.cat(
        [attend(q[:, :, end - 8 : end], k[:, :, :end], v[:, :, :end]) for end in ends], 2
    )


def tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries by stretches, and keys by others, as in memory-efficient attention."""

    def attend_to_all(queries: Tensor) -> Tensor:
        total, weight = torch.zeros(1), torch.zeros(1)
        for keys, values in zip(k.split(20, 2), v.split(20, 2), strict=True):
            exponentials = (queries @ keys.mT).exp()
            total = total + exponentials @ values
            weight = weight + exponentials.sum(-1, keepdim=True)
        return total / weight

    return torch.cat([attend_to_all(part) for part in q.split(8, 2)], 2)


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(q[:, h], k[:, h], v[:, h]) for h in range(HEADS)], 1)


def pairs_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(*(t.split(2, 1) for t in (q, k, v)), strict=True)
    return torch.cat([attend(*part) for part in parts], 1)


def heads_and_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(*(t.split(1, 1) for t in (q, k, v)), strict=True)
    return torch.cat([queries(*part) for part in parts], 1)


def sequences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(q[b], k[b], v[b]) for b in range(BATCH)])


def sequences_and_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([queries(*(t[b : b + 1] for t in (q, k, v))) for b in range(BATCH)])


def heads_and_what_was_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(*(t.split(1, 1) for t in (q, k, v)), strict=True)
    return torch.cat([queries_with_what_was_before(*part) for part in parts], 1)


def normalised_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat(
        [attend(functional.normalize(part, dim=-1), k, v) for part in q.split(8, 2)], 2
    )


def sequences_and_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = (heads(*(t[b : b + 1] for t in (q, k, v))) for b in range(BATCH))
    return torch.cat(list(parts))


def slices_of_both(size: int) -> Mix:
    """Return attention that takes so many of all heads of all sequences at a time."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (t.flatten(0, 1).split(size) for t in (q, k, v))
        return torch.cat([attend(*p) for p in zip(*flat, strict=True)]).unflatten(0, (BATCH, HEADS))

    return mix


def fused_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend = functional.scaled_dot_product_attention
    return torch.cat([attend(part, k, v) for part in q.split(8, 2)], 2)


def fused_sequences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(*(t.split(1) for t in (q, k, v)), strict=True)
    return torch.cat([functional.scaled_dot_product_attention(*part) for part in parts])


def describe(layer: nn.Module) -> dict[str, object]:
    with attnprof.trace() as tracer:
        layer(torch.randn(BATCH, TOKENS, WIDTH)).sum().backward()
    return tracer.run.layers().row(0, named=True)


@pytest.mark.parametrize("layer", [Joint, Separate])
@pytest.mark.parametrize(
    "mix",
    [
        all_at_once, queries, queries_unevenly, scaled_queries, queries_with_what_was_before, tiles,
        heads, pairs_of_heads, heads_and_queries, sequences, sequences_and_heads,
        sequences_and_queries, heads_and_what_was_before, normalised_queries,
        slices_of_both(2), slices_of_both(3), slices_of_both(4), slices_of_both(5),
        slices_of_both(6),
        fused_queries, fused_sequences,
    ],
)  # fmt: skip
def test_row_says_what_all_pieces_attended_with(layer: type[Joint], mix: Mix) -> None:
    row = describe(layer(mix))
    assert row["calls"] == 1
    assert row["kind"] in ("materialised", "fused")
    assert {name: row[name] for name in WHOLE} == WHOLE
    are_all_scores = mix not in (queries_with_what_was_before, heads_and_what_was_before)
    if are_all_scores and row["kind"] == "materialised":
        assert row["softmax_bytes"] == 4 * BATCH * HEADS * TOKENS * TOKENS


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, HEAD_DIM), nn.Linear(WIDTH, HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.key(x).unsqueeze(1), self.value(x).unsqueeze(1)
        mixed = torch.cat([attend(part, k, v) for part in q.split(1, 1)], 1)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def test_heads_that_are_asked_one_by_one_share_what_is_one_head_of_keys() -> None:
    row = describe(Shared())
    assert {name: row[name] for name in WHOLE} == WHOLE | {"kv_heads": 1}


@pytest.mark.parametrize("mix", [queries, heads])
def test_keys_may_be_the_queries_themselves(mix: Mix) -> None:
    row = describe(Separate(lambda q, _, v: mix(q, q, v)))
    assert {name: row[name] for name in WHOLE} == WHOLE


class Grouped(nn.Module):
    """Six heads of Q, and two of K and V, are parts of one projection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.qkv, self.out = nn.Linear(WIDTH, 10 * HEAD_DIM), nn.Linear(6 * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (10, HEAD_DIM)).transpose(1, 2).split([6, 2, 2], 1)
        parts = [
            attend(part, *(t[:, at * self.size // 3, None] for t in (k, v)))
            for at, part in enumerate(q.split(self.size, 1))
        ]
        return x + self.out(torch.cat(parts, 1).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("size", [1, 3])
def test_heads_that_are_asked_in_groups_have_as_many_of_keys_as_there_are(size: int) -> None:
    row = describe(Grouped(size))
    assert {name: row[name] for name in WHOLE} == WHOLE | {"heads": 6, "kv_heads": 2}


@pytest.mark.parametrize("layer", [Joint, Separate])
def test_heads_that_attend_twice_are_not_twice_as_many(layer: type[Joint]) -> None:
    def attend_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v) + attend(q * 2, k, v)

    row = describe(layer(attend_twice))
    assert {name: row[name] for name in WHOLE} == WHOLE


def test_sequences_that_lie_behind_each_other_are_not_put_together() -> None:
    def attend_in_each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split([8, 14, 18], 2) for t in (q, k, v)), strict=True)
        return torch.cat([functional.scaled_dot_product_attention(*part) for part in parts], 2)

    row = describe(Separate(attend_in_each))
    assert {name: row[name] for name in WHOLE} == WHOLE | {"q_len": 18, "k_len": 18}


def test_half_of_the_queries_is_not_half_of_the_heads() -> None:
    def attend_with_some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked, others = q.chunk(2, 2)
        return torch.cat([queries(asked, k, v), others], 2)

    assert describe(Separate(attend_with_some))["heads"] == HEADS


@pytest.mark.parametrize("sizes", [(0, 40), (8, 0, 32)])
def test_pieces_may_be_empty(sizes: tuple[int, ...]) -> None:
    def attend_in_stretches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(part, k, v) for part in q.split(sizes, 2)], 2)

    row = describe(Separate(attend_in_stretches))
    assert {name: row[name] for name in WHOLE} == WHOLE


def test_windows_in_a_loop_stay_windows() -> None:
    def attend_in_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(8, 2) for t in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts], 2)

    row = describe(Separate(attend_in_windows))
    assert (row["kind"], row["heads"], row["k_len"]) == ("banded", HEADS, 8)
