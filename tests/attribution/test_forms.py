"""Attention written in other ways: what is said of it must not depend on how it was written."""

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.run import Run

BATCH, HEADS, HEAD_DIM, TOKENS, FLOAT = 2, 4, 6, 20, 4
WIDTH = HEADS * HEAD_DIM
SCORES = BATCH * HEADS * TOKENS * TOKENS
"""Elements of one score matrix."""

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Projections around ``mix``, which is given Q (B, T, H, D) and K, V (B, T, Hkv, D)."""

    def __init__(self, mix: Mix, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.mix = mix
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, kv_heads * HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = (project(x) for project in (self.query, self.key, self.value))
        mixed = self.mix(*(part.unflatten(-1, (-1, HEAD_DIM)) for part in parts))
        return self.out(mixed.flatten(2))


def train(mix: Mix, batch: int = BATCH, **options: Any) -> Run:
    """Trace one forward and backward of attention over embedded tokens."""
    model = nn.Sequential(nn.Embedding(50, WIDTH), Attention(mix, **options))
    tokens = torch.randint(0, 50, (batch, TOKENS))
    with attnprof.trace() as tracer:
        model(tokens).square().mean().backward()
    return tracer.run


def read_row(run: Run) -> dict[str, Any]:
    """Return what is said of the only attention layer."""
    assert run.layers().height == 1, run.layers()
    return run.layers().row(0, named=True)


def shape_of(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[name] for name in ("batch", "heads", "kv_heads", "q_len", "k_len"))


def flip(x: Tensor) -> Tensor:
    """Return (B, H, T, D) for (B, T, H, D), and the other way round."""
    return x.transpose(1, 2)


# Layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["bhqk", "hbqk", "qbhk", "qkbh", "kbhq", "hqbk"])
def test_order_of_dimensions_does_not_confuse_heads_and_batch(order: str) -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum(f"bqhd,bkhd->{order}", q, k)
        weights = scores.softmax(order.index("k"))
        return torch.einsum(f"{order},bkhd->bqhd", weights, v)

    row = read_row(train(mix))
    assert shape_of(row) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)
    assert row["softmax_bytes"] == SCORES * FLOAT


def test_heads_folded_before_batch_are_told_from_it() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(2, 0, 1, 3).reshape(-1, TOKENS, HEAD_DIM) for t in (q, k, v))
        out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return out.view(HEADS, BATCH, TOKENS, HEAD_DIM).permute(1, 2, 0, 3)

    assert shape_of(read_row(train(mix))) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)


def test_heads_folded_into_queries_are_told_from_them() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.bmm(q.reshape(BATCH, -1, HEAD_DIM), k[:, :, 0].transpose(1, 2))
        weights = scores.view(BATCH, TOKENS, HEADS, TOKENS).softmax(-1)
        return torch.bmm(weights.view_as(scores), v[:, :, 0]).view_as(q)

    row = read_row(train(mix, kv_heads=1))
    assert shape_of(row) == (BATCH, HEADS, 1, TOKENS, TOKENS)


def test_rotation_by_complex_numbers_keeps_the_shapes() -> None:
    def turn(x: Tensor) -> Tensor:
        angle = torch.arange(TOKENS)[:, None, None] / torch.arange(1.0, HEAD_DIM // 2 + 1)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones(()), angle)).flatten(3)

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flip((flip(turn(q)) @ flip(turn(k)).mT).softmax(-1) @ flip(v))

    assert shape_of(read_row(train(mix))) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)


def test_as_many_sequences_as_heads_are_told_apart() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]).softmax(-1)
        return torch.einsum("bhqk,bkd->bqhd", weights, v[:, :, 0])

    row = read_row(train(mix, batch=HEADS, kv_heads=1))
    assert shape_of(row) == (HEADS, HEADS, 1, TOKENS, TOKENS)


def test_queries_without_projections_have_heads_in_second_place() -> None:
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM) for _ in range(3))
    with attnprof.trace() as tracer:
        (q @ k.mT).softmax(-1) @ v
    assert shape_of(read_row(tracer.run)) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)


class Latents(Attention):
    """A Perceiver's: learned queries, the same for every sequence."""

    def __init__(self, mix: Mix) -> None:
        super().__init__(mix)
        self.latents = nn.Parameter(torch.randn(9, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(self.latents.expand(BATCH, 9, WIDTH)).unflatten(-1, (HEADS, -1))
        key, value = (p(x).unflatten(-1, (HEADS, -1)) for p in (self.key, self.value))
        return self.out(self.mix(query, key, value).flatten(2))


def test_batch_of_learned_queries_is_no_heads() -> None:
    layer = Latents(lambda q, k, v: flip((flip(q) @ flip(k).mT).softmax(-1) @ flip(v)))
    model = nn.Sequential(nn.Embedding(50, WIDTH), layer)
    with attnprof.trace() as tracer:
        model(torch.randint(0, 50, (BATCH, TOKENS))).square().mean().backward()
    assert shape_of(read_row(tracer.run)) == (BATCH, HEADS, HEADS, 9, TOKENS)


def test_gradients_of_weights_that_are_padded_for_values_are_scores() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = functional.pad((flip(q) @ flip(k).mT).softmax(-1), (0, 3))
        return flip(weights @ functional.pad(flip(v), (0, 0, 0, 3)))

    frame = train(mix).allocations
    own = frame.filter((frame["phase"] == "backward") & (frame["size_bytes"] == SCORES * FLOAT))
    assert own.height
    assert {*own["category"]} <= {"attention_scores", "softmax"}


class ClassToken(Attention):
    """One query for all tokens; heads are mixed before the softmax and after it."""

    def __init__(self) -> None:
        super().__init__(self.attend)
        self.before, self.after = (nn.Linear(HEADS, HEADS, bias=False) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before(torch.einsum("bqhd,bkhd->bqkh", q[:, :1], k))
        weights = self.after(scores.softmax(2))
        return torch.einsum("bqkh,bkhd->bqhd", weights, v)


def test_heads_of_one_query_are_mixed() -> None:
    model = nn.Sequential(nn.Embedding(50, WIDTH), ClassToken())
    with attnprof.trace() as tracer:
        model(torch.randint(0, 50, (BATCH, TOKENS))).square().mean().backward()
    row = read_row(tracer.run)
    assert shape_of(row) == (BATCH, HEADS, HEADS, 1, TOKENS)
    # What the mixes take in, and what the second gives.
    assert row["saved_softmax_bytes"] == 3 * BATCH * HEADS * TOKENS * FLOAT


def test_products_of_all_with_all_summed_over_features_are_scores() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decay = torch.rand(TOKENS, TOKENS, 1)
        products = flip(q).unsqueeze(-2) * flip(k).unsqueeze(-3) * decay
        return flip(products.sum(-1).softmax(-1) @ flip(v))

    run = train(mix)
    row = read_row(run)
    assert shape_of(row) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)
    assert (row["softmax_bytes"], row["saved_softmax_bytes"]) == (SCORES * FLOAT, SCORES * FLOAT)
    size = pl.col("shape").list.eval(pl.element().product()).list.first()
    large = run.allocations.filter(size >= SCORES * HEAD_DIM)
    assert set(large["category"].cast(pl.String)) == {"attention_scores"}


def test_features_gated_by_features_are_no_scores() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gates = (q * k).sum(-1, keepdim=True)
        pairs = q.unsqueeze(-1) * k.unsqueeze(-2)  # of the same token
        return gates * v + pairs.sum(-1)

    assert train(mix).layers().is_empty()


@pytest.mark.parametrize("tokens", [HEAD_DIM, TOKENS, 40])  # torch takes another op from 26 on
def test_distances_of_queries_and_keys_are_scores(tokens: int) -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flip((-(torch.cdist(flip(q), flip(k)) ** 2)).softmax(-1) @ flip(v))

    model = nn.Sequential(nn.Embedding(50, WIDTH), Attention(mix))
    with attnprof.trace() as tracer:
        model(torch.randint(0, 50, (BATCH, tokens))).square().mean().backward()
    row = read_row(tracer.run)
    assert shape_of(row) == (BATCH, HEADS, HEADS, tokens, tokens)
    assert (row["kind"], row["head_dim"]) == ("materialised", HEAD_DIM)
    assert row["softmax_bytes"] == FLOAT * BATCH * HEADS * tokens * tokens
    assert row["backend_reason"].startswith("written out: distances of queries and keys around")
    with pytest.raises(ValueError, match="scores are distances"):
        tracer.run.what_if("fused_attention")


# Kinds: how much of the sequence the queries meet -------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with Q, K and V (…, H, T, D)."""
    return (q @ k.mT).softmax(-1) @ v


def leave_out_first_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flip(attend(flip(q), flip(k)[:, :, 1:], flip(v)[:, :, 1:]))


def attend_to_own_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sequence by sequence, each without its padding: most of one is padding."""
    out = torch.zeros_like(q)
    for i, length in enumerate((8, 19)):
        own = (t[i, :length].transpose(0, 1) for t in (q, k, v))
        out[i, :length] = attend(*own).transpose(0, 1)
    return out


def attend_in_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention by hand: every tile of scores, none of them beside another."""
    out = []
    for queries in flip(q).split(10, 2):
        most, total, mixed = torch.tensor(-1e9), torch.tensor(0.0), torch.tensor(0.0)
        for keys, values in zip(flip(k).split(10, 2), flip(v).split(10, 2), strict=True):
            scores = queries @ keys.mT
            newer = torch.maximum(most, scores.amax(-1, keepdim=True))
            weights, shrink = (scores - newer).exp(), (most - newer).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            mixed, most = mixed * shrink + weights @ values, newer
        out.append(mixed / total)
    return flip(torch.cat(out, 2))


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(*(flip(t).split(5, 2) for t in (q, k, v)), strict=True)
    return flip(torch.cat([attend(*part) for part in parts], 2))


def attend_to_few_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flip(attend(flip(q), flip(k)[:, :, :4], flip(v)[:, :, :4]))


def attend_to_means(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = (flip(t).unflatten(2, (4, 5)).mean(3) for t in (k, v))
    return flip(attend(flip(q), keys, values))


def pool_keys(pool: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to fewer keys, which ``pool`` makes of (B · H, D, T): MViT's and PVT's way."""
    fewer = (pool(flip(t).flatten(0, 1).mT).mT.unflatten(0, (-1, HEADS)) for t in (k, v))
    return flip(attend(flip(q), *fewer))


def attend_to_pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return pool_keys(lambda x: functional.max_pool1d(x, 4), q, k, v)


def attend_to_averages(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return pool_keys(lambda x: functional.avg_pool1d(x, 4), q, k, v)


def attend_to_convolved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kernel = nn.Parameter(torch.randn(HEAD_DIM, 1, 4))
    return pool_keys(lambda x: functional.conv1d(x, kernel, stride=4, groups=HEAD_DIM), q, k, v)


def attend_to_adaptive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return pool_keys(lambda x: functional.adaptive_avg_pool1d(x, 5), q, k, v)


def ask_through_agents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Agents ask all tokens; all tokens ask the agents."""
    agents = flip(q).unflatten(2, (4, 5)).mean(3)
    return flip(attend(flip(q), agents, attend(agents, flip(k), flip(v))))


@pytest.mark.parametrize(
    ("mix", "kind"),
    [
        (leave_out_first_key, "materialised"),
        (attend_to_own_length, "materialised"),
        (attend_in_tiles, "materialised"),
        (attend_in_chunks, "banded"),
        (attend_to_few_keys, "banded"),
        (attend_to_means, "low_rank"),
        (attend_to_pooled, "materialised"),
        (attend_to_averages, "materialised"),
        (attend_to_convolved, "materialised"),
        (attend_to_adaptive, "low_rank"),
        (ask_through_agents, "low_rank"),
    ],
)
def test_kind(mix: Mix, kind: str) -> None:
    assert read_row(train(mix))["kind"] == kind


def test_heads_one_by_one_are_one_call_of_a_layer_traced_alone() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = zip(*(t.unbind(2) for t in (q, k, v)), strict=True)
        return torch.stack([attend(*head) for head in heads], 2)

    layer, x = Attention(mix), torch.randn(BATCH, TOKENS, WIDTH)
    with attnprof.trace() as tracer:
        layer(x).square().mean().backward()
    row = read_row(tracer.run)
    assert (row["calls"], row["saved_softmax_bytes"]) == (1, SCORES * FLOAT)


# Not attention, not a mask -----------------------------------------------------------------------


class Streams(nn.Module):
    """Hyper-connections: a token's residual streams, mixed by weights made from them."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh, self.block = nn.Linear(4 * WIDTH, 4 + 16), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        spread, mix = self.weigh(x.flatten(2)).split([4, 16], -1)
        out = self.block(x.mean(2)).unsqueeze(2) * spread.unsqueeze(-1)
        return out + mix.unflatten(-1, (4, 4)).softmax(-1).mT @ x


def test_mixing_the_streams_of_a_token_is_no_attention() -> None:
    embed = nn.Sequential(nn.Embedding(50, 4 * WIDTH), nn.Unflatten(-1, (4, WIDTH)))
    model = nn.Sequential(embed, Streams(), Streams(), Streams())
    with attnprof.trace() as tracer:
        model(torch.randint(0, 50, (BATCH, TOKENS))).square().mean().backward()
    assert tracer.run.layers().is_empty()


def test_distances_that_choose_a_bias_are_no_mask() -> None:
    table = nn.Parameter(torch.randn(2 * TOKENS, HEADS))

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distances = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS
        scores = flip(q) @ flip(k).mT
        to_places = flip(q) @ k.new_ones(HEAD_DIM, 2 * TOKENS)
        scores = scores + to_places.gather(-1, distances.expand_as(scores))
        return flip((scores + table[distances].permute(2, 0, 1)).softmax(-1) @ flip(v))

    run = train(mix)
    assert read_row(run)["mask_bytes"] == HEADS * TOKENS * TOKENS * FLOAT  # the bias alone
    integers = run.allocations.filter(pl.col("dtype") == "int64", pl.col("op").is_not_null())
    assert "attention_mask" not in integers["category"].to_list()


# Gradients, and what stands beside the scores -----------------------------------------------------


def subtract_maps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Differential attention: half as many heads of values as of queries and keys."""
    weights = (flip(q) @ flip(k).mT).softmax(-1).unflatten(1, (-1, 2))
    values = torch.cat(flip(v).chunk(2, 1), -1)
    mixed = (weights[:, :, 0] - 0.5 * weights[:, :, 1]) @ values
    return flip(mixed).reshape_as(q)


def decay_in_one_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The delta rule of a single chunk: its state is empty at first, and read by nobody after."""
    q, k, v = flip(q), flip(k), flip(v)
    rates = v.sigmoid().mean(-1).cumsum(-1)
    decay = (rates.unsqueeze(-1) - rates.unsqueeze(-2)).tril().exp().tril()
    state = torch.zeros(BATCH, HEADS, HEAD_DIM, HEAD_DIM)
    out = q @ state + (q @ k.mT * decay) @ v
    state = state * 0.9 + k.mT @ v
    return flip(out)


def bias_in_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = q.mean((2, 3)).unsqueeze(-1) + k.mean((2, 3)).unsqueeze(-2)
    queries, keys, values = (flip(t).flatten(0, 1) for t in (q, k, v))
    bias = bias.repeat_interleave(HEADS, 0)
    weights = torch.baddbmm(bias, queries, keys.mT).softmax(-1)
    return flip((weights @ values).unflatten(0, (BATCH, HEADS)))


def shift_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores shifted by a view of padded ones, which is then changed in place."""
    padded = functional.pad(flip(q) @ flip(k).mT, (1, 0))
    shifted = padded.view(BATCH, HEADS, TOKENS + 1, TOKENS)[:, :, 1:]
    shifted *= torch.rand(TOKENS, TOKENS)
    values = v.tanh()  # the next op, which the change in place is none of
    return flip(shifted.softmax(-1) @ flip(values))


@pytest.mark.parametrize(
    "mix", [subtract_maps, decay_in_one_chunk, bias_in_product, shift_in_place]
)
def test_everything_as_large_as_scores_is_named_so(mix: Mix) -> None:
    blocks = train(mix).allocations
    size = pl.col("shape").list.eval(pl.element().product()).list.first()
    large = blocks.filter(size >= SCORES // 2)
    names = {"attention_scores", "softmax", "attention_mask"}
    assert set(large["category"].cast(pl.String)) <= names, large["op", "category", "phase"]
    small = blocks.filter(size == BATCH * TOKENS * WIDTH)
    assert not names & set(small["category"].cast(pl.String)), small["op", "category", "phase"]


def test_only_chunk_of_linear_attention_is_linear() -> None:
    assert read_row(train(decay_in_one_chunk))["kind"] == "linear"
