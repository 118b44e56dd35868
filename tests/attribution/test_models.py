"""What attribution says of whole models, byte for byte: hand-written ones and transformers' own.

Every model is small and random. The sizes differ from each other (except where a test is about
sizes that coincide), so that a count of bytes comes out right only for the right reason.
"""

import math
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.run import Run

BATCH = 2
HEADS = 4
HEAD_DIM = 12
WIDTH = HEADS * HEAD_DIM
TOKENS = 40
VOCABULARY = 61
LAYERS = 2
FLOAT = 4  # bytes
HALF = 2

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Projections around ``mix``, which is given Q (B, H, T, D) and K, V (B, Hkv, T, D)."""

    def __init__(self, mix: Mix, *, heads: int = HEADS, kv_heads: int | None = None) -> None:
        super().__init__()
        self.mix, self.heads, self.head_dim = mix, heads, WIDTH // heads
        width = (kv_heads or heads) * self.head_dim
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, width), nn.Linear(WIDTH, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        keys, values = self.split(self.key(source)), self.split(self.value(source))
        mixed = self.mix(self.split(self.query(x)), keys, values)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def scale(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return scale(queries, keys).softmax(-1) @ values


def embed(tokens: int = TOKENS, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, tokens, WIDTH)


def train(model: nn.Module, *inputs: Any) -> Run:
    """Trace one forward and backward."""
    with attnprof.trace() as tracer:
        output = model(*inputs)
        output.square().mean().backward()
    return tracer.run


def row_of(run: Run, layer: str = "0") -> dict[str, Any]:
    """Return what is said of one attention layer."""
    rows = run.layers().filter(pl.col("layer") == layer)
    assert rows.height == 1, run.layers()["layer"].to_list()
    return rows.row(0, named=True)


def shape_of(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[name] for name in ("batch", "heads", "kv_heads", "q_len", "k_len"))


def trace_layer(mix: Mix, **options: Any) -> dict[str, Any]:
    """Return what is said of a layer with a given inside."""
    return row_of(train(nn.Sequential(Attention(mix, **options)), embed()))


SCORES = BATCH * HEADS * TOKENS * TOKENS
"""Elements of one score matrix."""


# Normalisers -------------------------------------------------------------------------------------


def test_sigmoid_attention_keeps_one_matrix() -> None:
    row = trace_layer(lambda q, k, v: torch.sigmoid(scale(q, k) - 3.0) @ v)
    assert row["kind"] == "materialised"
    assert (row["softmax_bytes"], row["saved_softmax_bytes"]) == (SCORES * FLOAT, SCORES * FLOAT)


def test_exponential_and_division_keep_two_matrices() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.exp(scale(q, k))
        return (weights / weights.sum(-1, keepdim=True)) @ v

    row = trace_layer(mix)
    assert row["softmax_bytes"] == SCORES * FLOAT
    assert row["saved_softmax_bytes"] == 2 * SCORES * FLOAT  # the exponential and the quotient


def test_division_after_the_values_keeps_the_exponential() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.exp(scale(q, k))
        return (weights @ v) / weights.sum(-1, keepdim=True)

    row = trace_layer(mix)
    assert (row["softmax_bytes"], row["saved_softmax_bytes"]) == (SCORES * FLOAT, SCORES * FLOAT)


def test_squared_relu_attention_keeps_what_square_and_product_need() -> None:
    row = trace_layer(lambda q, k, v: functional.relu(scale(q, k)).square() @ v)
    assert row["kind"] == "materialised"
    assert row["saved_softmax_bytes"] == 2 * SCORES * FLOAT


def test_attention_sink_is_no_key() -> None:
    sink = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        column = sink.expand(BATCH, HEADS, TOKENS, 1)
        return torch.cat([scale(q, k), column], -1).softmax(-1)[..., :-1] @ v

    row = trace_layer(mix)
    assert row["k_len"] == TOKENS
    assert row["softmax_bytes"] == BATCH * HEADS * TOKENS * (TOKENS + 1) * FLOAT


def test_top_k_mask_counts_a_byte_per_score() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scale(q, k)
        least = scores.topk(6, -1).values[..., -1:]
        return scores.masked_fill(scores < least, -1e9).softmax(-1) @ v

    row = trace_layer(mix)
    assert row["softmax_bytes"] == SCORES * FLOAT
    assert row["saved_softmax_bytes"] == SCORES * (FLOAT + 1)  # masked_fill keeps its bool mask


def test_talking_heads_keep_raw_normalised_and_mixed_scores() -> None:
    before, after = (nn.Conv2d(HEADS, HEADS, 1, bias=False) for _ in range(2))
    row = trace_layer(lambda q, k, v: after(before(scale(q, k)).softmax(-1)) @ v)
    assert shape_of(row) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)
    assert row["saved_softmax_bytes"] == 3 * SCORES * FLOAT


class RelativeAttention(nn.Module):
    """Transformer-XL: content scores plus position scores, put in place by a pad and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.position = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            part.unflatten(-1, (HEADS, HEAD_DIM)) for part in self.project(x).chunk(3, -1)
        )
        angle = torch.arange(tokens - 1.0, -1, -1)[:, None] / torch.arange(1.0, WIDTH + 1)
        position = self.position(angle.sin()).unflatten(-1, (HEADS, HEAD_DIM))
        content = torch.einsum("bihd,bjhd->bhij", query, key)
        moved = functional.pad(torch.einsum("bihd,jhd->bhij", query, position), (1, 0))
        moved = moved.view(batch, HEADS, tokens + 1, tokens)[:, :, 1:]
        weights = (content + moved).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2)


def test_position_scores_are_not_on_the_way_to_the_values() -> None:
    row = row_of(train(nn.Sequential(RelativeAttention()), embed()))
    assert shape_of(row) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)
    assert (row["softmax_bytes"], row["saved_softmax_bytes"]) == (SCORES * FLOAT, SCORES * FLOAT)


# Layouts -----------------------------------------------------------------------------------------


def test_einsum_with_heads_behind_queries_keeps_a_copy_for_the_product() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhqd,bhkd->bqhk", q, k).softmax(-1)
        return torch.einsum("bqhk,bhkd->bhqd", weights, v)

    row = trace_layer(mix)
    assert shape_of(row) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)
    assert row["saved_softmax_bytes"] == 2 * SCORES * FLOAT


def test_multi_query_by_expanded_view_has_one_key_head() -> None:
    row = trace_layer(
        lambda q, k, v: attend(q, k.expand_as(q), v.expand_as(q)),
        kv_heads=1,
    )
    assert shape_of(row) == (BATCH, HEADS, 1, TOKENS, TOKENS)


def test_repeated_keys_count_as_the_heads_they_were_made_from() -> None:
    row = trace_layer(
        lambda q, k, v: attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
        kv_heads=2,
    )
    assert shape_of(row) == (BATCH, HEADS, 2, TOKENS, TOKENS)


def test_tokens_as_many_as_channels_are_told_apart() -> None:
    model = nn.Sequential(Attention(attend), Attention(attend))
    run = train(model, embed(tokens=WIDTH))
    for layer in ("0", "1"):
        assert shape_of(row_of(run, layer)) == (BATCH, HEADS, HEADS, WIDTH, WIDTH)


def test_batch_heads_and_tokens_of_one_size_are_told_apart() -> None:
    row = row_of(train(nn.Sequential(Attention(attend)), embed(tokens=HEADS, batch=HEADS)))
    assert shape_of(row) == (HEADS, HEADS, HEADS, HEADS, HEADS)
    assert row["softmax_bytes"] == HEADS**4 * FLOAT


def test_single_head_has_its_whole_width_as_head_dimension() -> None:
    row = trace_layer(attend, heads=1)
    assert shape_of(row) == (BATCH, 1, 1, TOKENS, TOKENS)
    assert row["head_dim"] == WIDTH


def test_cross_attention_has_as_many_keys_as_its_context_tokens() -> None:
    run = train(Inner(Attention(attend)), embed(), embed(tokens=31))
    row = row_of(run, "inner")
    assert shape_of(row) == (BATCH, HEADS, HEADS, TOKENS, 31)
    assert row["softmax_bytes"] == BATCH * HEADS * TOKENS * 31 * FLOAT


class Inner(nn.Module):
    """A root around a layer that takes several inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.inner(*inputs)
        return result


def test_module_made_in_a_forward_belongs_to_its_caller() -> None:
    run = train(
        nn.Sequential(
            Attention(lambda q, k, v: nn.Softmax(-1)(scale(q, k)) @ v),
            Attention(lambda q, k, v: nn.Softmax(-1)(scale(q, k)) @ v),
        ),
        embed(),
    )
    assert run.layers()["layer"].to_list() == ["0", "1"]


# torch's own attention ---------------------------------------------------------------------------


class SelfAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of one tensor with itself."""

    def __init__(self, *, need_weights: bool, dropout: float = 0.0) -> None:
        super().__init__(WIDTH, HEADS, dropout=dropout, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # self-attention only
        return super().forward(x, x, x, need_weights=self.need_weights)[0]


def test_multihead_attention_with_weights_is_written_out() -> None:
    row = row_of(train(nn.Sequential(SelfAttention(need_weights=True)), embed()))
    assert row["kind"] == "materialised"
    assert shape_of(row) == (BATCH, HEADS, HEADS, TOKENS, TOKENS)
    assert (row["softmax_bytes"], row["saved_softmax_bytes"]) == (SCORES * FLOAT, SCORES * FLOAT)


def test_multihead_attention_without_weights_is_fused() -> None:
    row = row_of(train(nn.Sequential(SelfAttention(need_weights=False)), embed()))
    assert row["kind"] == "fused"
    assert (row["softmax_bytes"], row["saved_softmax_bytes"]) == (0, 0)


def test_multihead_attention_with_dropout_keeps_three_matrices() -> None:
    layer = SelfAttention(need_weights=False, dropout=0.1)
    row = row_of(train(nn.Sequential(layer), embed()))
    assert row["kind"] == "materialised"
    assert row["saved_softmax_bytes"] == 3 * SCORES * FLOAT  # result, mask, dropped copy


# Fewer scores than token pairs -------------------------------------------------------------------


def test_blocks_of_tokens_are_a_band() -> None:
    block = 10

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (-1, block)) for t in (q, k, v))
        return (scale(q, k).softmax(-1) @ v).flatten(2, 3)

    row = trace_layer(mix)
    assert row["kind"] == "banded"
    assert row["softmax_bytes"] == BATCH * HEADS * TOKENS * block * FLOAT
    assert row["saved_softmax_bytes"] == BATCH * HEADS * TOKENS * block * FLOAT


def test_window_by_unfold_is_a_band() -> None:
    width = 9

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (functional.pad(t, (0, 0, width - 1, 0)).unfold(2, width, 1) for t in (k, v))
        weights = (q.unsqueeze(-2) @ k).softmax(-1)  # (B, H, T, 1, D) @ (B, H, T, D, w)
        return (weights @ v.transpose(-1, -2)).squeeze(-2)

    row = trace_layer(mix)
    assert (row["kind"], row["k_len"]) == ("banded", width)
    assert row["softmax_bytes"] == BATCH * HEADS * TOKENS * width * FLOAT


def test_projected_keys_are_low_rank() -> None:
    rank = 10
    project = nn.Parameter(torch.randn(TOKENS, rank))

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.einsum("bhnd,nk->bhkd", t, project) for t in (k, v))
        return attend(q, k, v)

    row = trace_layer(mix)
    assert row["kind"] == "low_rank"
    assert row["softmax_bytes"] == BATCH * HEADS * TOKENS * rank * FLOAT
    assert row["saved_softmax_bytes"] == BATCH * HEADS * TOKENS * rank * FLOAT


def test_axial_attention_adds_up_rows_and_columns() -> None:
    height, width = 5, 8

    class Axial(Attention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            grid = x.unflatten(1, (height, width))
            rows = super().forward(grid.flatten(0, 1)).view_as(grid)
            columns = super().forward(rows.transpose(1, 2).flatten(0, 1))
            return columns.unflatten(0, (BATCH, width)).transpose(1, 2).flatten(1, 2)

    row = row_of(train(nn.Sequential(Axial(attend)), embed()))
    elements = BATCH * HEADS * height * width * (width + height)
    assert row["softmax_bytes"] == elements * FLOAT


# No scores ---------------------------------------------------------------------------------------


def test_linear_attention_makes_no_softmax() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        norm = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        return q @ (k.transpose(-1, -2) @ v) / norm

    row = trace_layer(mix)
    assert row["kind"] == "linear"
    assert (row["softmax_bytes"], row["saved_softmax_bytes"]) == (0, 0)


def test_softmaxes_of_queries_and_keys_alone_are_linear_attention() -> None:
    row = trace_layer(lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v))
    assert (row["kind"], row["softmax_bytes"]) == ("linear", 0)


def test_chunkwise_retention_is_linear() -> None:
    chunk = 8

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = q.new_zeros(BATCH, HEADS, HEAD_DIM, HEAD_DIM), []
        mask = torch.ones(chunk, chunk).tril()
        for qc, kc, vc in zip(*(t.split(chunk, 2) for t in (q, k, v)), strict=True):
            out.append((qc @ kc.transpose(-1, -2) * mask) @ vc + qc @ state)
            state = 0.9 * state + kc.transpose(-1, -2) @ vc
        return torch.cat(out, 2)

    assert trace_layer(mix)["kind"] == "linear"


@pytest.mark.parametrize("chunks", [1, 5])
def test_states_that_a_matrix_of_decays_hands_from_chunk_to_chunk_are_linear(chunks: int) -> None:
    """Mamba-2: a state per chunk, in one dimension when decays between chunks multiply it."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (chunks, -1)) for t in (q, k, v))
        gates = q.sum(-1).sigmoid().log()  # (B, H, chunks, T)
        inside = gates.cumsum(-1)
        decays = (inside[..., :, None] - inside[..., None, :]).exp().tril()
        own = (q @ k.mT * decays) @ v
        states = (k * (inside[..., -1:] - inside).exp()[..., None]).mT @ v
        states = torch.cat([torch.zeros_like(states[:, :, :1]), states], 2)
        ends = functional.pad(inside[..., -1], (1, 0)).cumsum(-1)
        across = (ends[..., :, None] - ends[..., None, :]).exp().tril()
        passed = (across @ states.flatten(-2)).view_as(states)[:, :, :-1]
        return (own + q @ passed * inside.exp()[..., None]).flatten(2, 3)

    row = trace_layer(mix)
    assert (row["kind"], row["softmax_bytes"], row["saved_softmax_bytes"]) == ("linear", 0, 0)


# Not attention -----------------------------------------------------------------------------------


class Experts(nn.Module):
    """A router over experts, all of which run; their outputs are summed by its weights."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.router = gate, nn.Linear(WIDTH, 5)
        self.expand = nn.Parameter(torch.randn(5, WIDTH, 20))
        self.contract = nn.Parameter(torch.randn(5, 20, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(self.router(x)).topk(2, -1)
        weights = torch.zeros_like(x[..., :5]).scatter(-1, chosen, weights)
        hidden = torch.einsum("btd,edf->btef", x, self.expand).relu()
        return torch.einsum(
            "bte,bted->btd", weights, torch.einsum("btef,efd->bted", hidden, self.contract)
        )


class Mixer(nn.Module):
    """MLP-Mixer: a layer over tokens, with parameters for weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(TOKENS, 20), nn.GELU(), nn.Linear(20, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.transpose(1, 2)).transpose(1, 2)


class Gram(nn.Module):
    """Products of features with themselves, which no second product takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return torch.cat(
            [(x @ x.transpose(1, 2)).flatten(1), (x.transpose(1, 2) @ x).flatten(1)], 1
        )


class Contrast(nn.Module):
    """Two towers and the logits of all pairs, softmaxed both ways by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 20)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.left(x[:, 0]) @ self.right(x[:, 1]).T
        pairs = torch.arange(len(x))
        return functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)


@pytest.mark.parametrize(
    "layers",
    [
        [Experts(lambda x: x.softmax(-1)), Experts(lambda x: x.softmax(-1))],
        [Experts(torch.sigmoid), Experts(torch.sigmoid)],
        [Mixer(), Mixer()],
        [Gram()],
        [Contrast()],
    ],
    ids=["softmax_router", "sigmoid_router", "mixer", "gram", "contrast"],
)
def test_products_that_are_not_attention_are_not_reported(layers: list[nn.Module]) -> None:
    run = train(nn.Sequential(*layers), embed())
    assert run.layers().is_empty(), run.layers()
    assert run.peak().by_category().get("attention_scores", 0) == 0


def test_products_in_an_optimizer_are_not_attention() -> None:
    model = nn.Sequential(Attention(attend))

    class Orthogonal(torch.optim.Optimizer):  # Newton-Schulz, as in Muon
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                if parameter.ndim == 2:
                    update = parameter.grad / parameter.grad.norm()
                    product = update @ update.T
                    parameter.sub_(1.5 * update - 0.5 * product @ update)

    optimizer = Orthogonal(model.parameters(), {})
    with attnprof.trace() as tracer:
        model(embed()).square().mean().backward()
        optimizer.step()
    assert tracer.run.layers()["layer"].to_list() == ["0"]


# Precision, checkpoints, several models ----------------------------------------------------------


def test_autocast_keeps_the_float_result_and_its_half_copy() -> None:
    model = nn.Sequential(
        Attention(lambda q, k, v: scale(q, k).softmax(-1, dtype=torch.float32) @ v)
    )
    with attnprof.trace() as tracer:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(embed())
        output.float().square().mean().backward()
    row = row_of(tracer.run)
    assert (row["softmax_bytes"], row["dtype"]) == (SCORES * FLOAT, "float32")
    assert row["saved_softmax_bytes"] == SCORES * (FLOAT + HALF)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_attention_keeps_nothing(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(Attention(attend))

    class Whole(Inner):
        def forward(self, *inputs: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.inner, *inputs, use_reentrant=use_reentrant)
            return result

    row = row_of(train(Whole(model[0]), embed().requires_grad_()), "inner")
    assert (row["calls"], row["saved_softmax_bytes"]) == (1, 0)
    assert row["softmax_bytes"] == SCORES * FLOAT


def test_a_layer_called_again_keeps_what_all_its_calls_keep() -> None:
    class Shared(Inner):
        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.inner(self.inner(self.inner(inputs)))
            return result

    model = Shared(Attention(attend))
    with attnprof.trace() as tracer:
        for _ in range(2):  # the second step keeps what the first gave back
            model(embed()).square().mean().backward()
    row = row_of(tracer.run, "inner")
    assert (row["calls"], row["softmax_bytes"]) == (6, SCORES * FLOAT)
    assert row["saved_softmax_bytes"] == row["predicted_saved_bytes"] == 3 * SCORES * FLOAT


def test_models_in_one_trace_are_named_apart() -> None:
    class First(Inner):
        pass

    class Second(Inner):
        pass

    first, second = First(Attention(attend)), Second(Attention(attend))
    with attnprof.trace() as tracer:
        (first(embed()).mean() + second(embed(tokens=31)).mean()).backward()
    rows = dict(tracer.run.layers().select("layer", "softmax_bytes").iter_rows())
    assert rows == {
        "First.inner": SCORES * FLOAT,
        "Second.inner": BATCH * HEADS * 31 * 31 * FLOAT,
    }


# Caches ------------------------------------------------------------------------------------------

PROMPT, NEW = 20, 5


class Caching(nn.Module):
    """Attention that keeps K and V as ``store`` says; (past K, past V) go in and come out."""

    def __init__(self, store: Callable[[Any, Tensor, Tensor, int], Any]) -> None:
        super().__init__()
        self.store = store
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Any, start: int) -> tuple[Tensor, Any]:
        query, key, value = (
            part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for part in self.project(x).chunk(3, -1)
        )
        past, keys, values = self.store(past, key, value, start)
        return self.out(attend(query, keys, values).transpose(1, 2).flatten(2)), past


def concatenate(past: Any, key: Tensor, value: Tensor, start: int) -> Any:
    if past is not None:
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    return (key, value), key, value


class CachingModel(nn.Module):
    def __init__(self, store: Callable[[Any, Tensor, Tensor, int], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Caching(store) for _ in range(LAYERS))

    def forward(self, x: Tensor, past: list[Any], start: int) -> tuple[Tensor, list[Any]]:
        kept = []
        for layer, own in zip(self.layers, past, strict=True):
            x, own = layer(x, own, start)
            kept.append(own)
        return x, kept


def decode(store: Callable[[Any, Tensor, Tensor, int], Any], past: list[Any]) -> tuple[Run, Any]:
    """Trace a prompt and a few single tokens; return the run and what was kept at its end."""
    model = CachingModel(store).eval()
    with attnprof.trace() as tracer, torch.no_grad():
        output, past = model(embed(PROMPT), past, 0)
        for i in range(NEW):
            output, past = model(output[:, -1:], past, PROMPT + i)
    return tracer.run, past


def held(run: Run, category: str = "kv_cache") -> int:
    """Return the bytes of a category that were live when the trace ended."""
    rows = run.allocations.filter(
        pl.col("end_ns").is_null() & (pl.col("category").cast(pl.String) == category)
    )
    return int(rows["requested_bytes"].sum())


def test_concatenated_cache_holds_every_token_once() -> None:
    run, kept = decode(concatenate, [None] * LAYERS)
    assert kept[0][0].shape[2] == PROMPT + NEW
    assert held(run) == LAYERS * 2 * BATCH * (PROMPT + NEW) * WIDTH * FLOAT


def test_phases_of_inference_with_a_cache_are_prefill_and_decode() -> None:
    run, _kept = decode(concatenate, [None] * LAYERS)
    phases = run.allocations["phase"].cast(pl.String).unique().to_list()
    assert {"prefill", "decode"} <= set(phases)
    assert "forward" not in phases


def test_preallocated_cache_counts_in_full() -> None:
    room = 64

    def store(past: Any, key: Tensor, value: Tensor, start: int) -> Any:
        end = start + key.shape[2]
        past[0][:, :, start:end], past[1][:, :, start:end] = key, value
        return past, past[0][:, :, :end], past[1][:, :, :end]

    empty = [tuple(torch.zeros(BATCH, HEADS, room, HEAD_DIM) for _ in "kv") for _ in range(LAYERS)]
    run, _kept = decode(store, empty)
    assert held(run) == LAYERS * 2 * BATCH * HEADS * room * HEAD_DIM * FLOAT


def test_paged_pool_is_the_cache() -> None:
    page, pages = 4, 30

    def store(past: Any, key: Tensor, value: Tensor, start: int) -> Any:
        pool, table = past
        at = torch.arange(start, start + key.shape[2])
        slots = (table[:, at // page] * page + at % page).flatten()
        for part, new in zip(pool, (key, value), strict=True):
            part.view(-1, HEADS, HEAD_DIM)[slots] = new.transpose(1, 2).flatten(0, 1)
        used = table[:, : math.ceil((start + key.shape[2]) / page)]
        read = (part[used].flatten(1, 2)[:, : start + key.shape[2]] for part in pool)
        return past, *(part.transpose(1, 2) for part in read)

    table = torch.randperm(pages).view(BATCH, -1)
    pools = [
        (tuple(torch.zeros(pages, page, HEADS, HEAD_DIM) for _ in "kv"), table)
        for _ in range(LAYERS)
    ]
    run, _kept = decode(store, pools)
    assert held(run) == LAYERS * 2 * pages * page * WIDTH * FLOAT


def test_cache_reordered_outside_of_the_model_is_still_the_cache() -> None:
    model = CachingModel(concatenate).eval()
    order = torch.tensor([1, 0])  # beam search picks its beams anew after every token
    with attnprof.trace() as tracer, torch.no_grad():
        past: list[Any] = [None] * LAYERS
        output = embed(PROMPT)
        for i in range(NEW):
            output, past = model(output[:, -1:] if i else output, past, i)
            past = [tuple(part.index_select(0, order) for part in own) for own in past]
    assert held(tracer.run) == LAYERS * 2 * BATCH * (PROMPT + NEW - 1) * WIDTH * FLOAT
    assert len(past) == LAYERS


def test_carried_state_of_retention_does_not_grow() -> None:
    class Retention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
            query, key, value = (
                part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
                for part in self.project(x).chunk(3, -1)
            )
            state = (0 if state is None else 0.9 * state) + key.transpose(-1, -2) @ value
            return (query @ state).transpose(1, 2).flatten(2), state

    model = _Stateful(Retention(), Retention())
    with attnprof.trace() as tracer, torch.no_grad():
        output, states = model(embed(PROMPT), [None, None])
        for _ in range(NEW):
            output, states = model(output[:, -1:], states)
    assert held(tracer.run, "recurrent_state") == 2 * BATCH * HEADS * HEAD_DIM * HEAD_DIM * FLOAT


class _Stateful(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        kept = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            kept.append(state)
        return x, kept


# transformers ------------------------------------------------------------------------------------

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = (BATCH, HEADS, HEADS, TOKENS, TOKENS)


def build(name: str, attention: str | None = "eager", **options: Any) -> nn.Module:
    """Build ``<name>ForCausalLM`` (or the class of that name) with random weights."""
    import transformers

    head = name if hasattr(transformers, name) else f"{name}ForCausalLM"
    model_class = getattr(transformers, head)
    config = model_class.config_class(**options)
    model: nn.Module = model_class._from_config(config, attn_implementation=attention)
    return model


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, tokens))


def train_transformer(model: nn.Module) -> Run:
    inputs = ids()
    with attnprof.trace() as tracer:
        model.train()(input_ids=inputs, labels=inputs, use_cache=False).loss.backward()
    return tracer.run


@pytest.mark.parametrize(
    ("name", "options", "layer", "kv_heads", "matrices"),
    [
        pytest.param(
            "Bloom",
            {
                "vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
                "hidden_dropout": 0.0, "attention_dropout": 0.0,
            },
            "transformer.h.{}.self_attention", HEADS, 1, id="baddbmm_with_alibi",
        ),
        pytest.param(
            "Falcon",
            {
                "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS, "multi_query": True,
            },
            "transformer.h.{}.self_attention", 1, 1, id="multi_query",
        ),
        pytest.param(
            "DiffLlama", COMMON | {"num_key_value_heads": 2},
            "model.layers.{}.self_attn", 2, 2, id="difference_of_two_softmaxes",
        ),
        pytest.param(
            "Qwen2Moe",
            COMMON | {
                "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24,
            },
            "model.layers.{}.self_attn", 2, 1, id="experts_beside_attention",
        ),
        pytest.param(
            "DebertaForMaskedLM",
            COMMON | {
                "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
            },
            "deberta.encoder.layer.{}.attention.self", HEADS, 1, id="disentangled_positions",
        ),
    ],
)  # fmt: skip
def test_transformer_layers_make_and_keep_exact_bytes(
    name: str, options: dict[str, Any], layer: str, kv_heads: int, matrices: int
) -> None:
    attention = None if name in ("Bloom", "DebertaForMaskedLM") else "eager"
    model = build(name, attention, **options)
    inputs = ids()
    with attnprof.trace() as tracer:
        model.train()(input_ids=inputs, labels=inputs).loss.backward()
    run = tracer.run
    assert run.layers()["layer"].to_list() == [layer.format(i) for i in range(LAYERS)]
    for row in run.layers().iter_rows(named=True):
        assert shape_of(row) == (BATCH, HEADS, kv_heads, TOKENS, TOKENS)
        assert row["softmax_bytes"] == matrices * SCORES * FLOAT
        assert row["saved_softmax_bytes"] == matrices * SCORES * FLOAT


def test_cosine_attention_keeps_the_scores_its_learned_scale_multiplied() -> None:
    window, heads, patches = 4, 2, 16  # 16 x 16 patches in windows of 4 x 4
    model = build(
        "Swinv2Model", None, image_size=32, patch_size=2, embed_dim=24, depths=[1],
        num_heads=[heads], window_size=window, hidden_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    with attnprof.trace() as tracer:
        output = model.train()(pixel_values=torch.randn(BATCH, 3, 32, 32)).last_hidden_state
        output.square().mean().backward()
    row = row_of(tracer.run, "encoder.layers.0.blocks.0.attention.self")
    scores = BATCH * (patches // window) ** 2 * heads * (window**2) ** 2
    assert row["softmax_bytes"] == scores * FLOAT
    assert row["saved_softmax_bytes"] == 2 * scores * FLOAT


@pytest.mark.parametrize("chunk", [8, 64])  # of 40 tokens
def test_mamba_2_is_linear(chunk: int) -> None:
    model = build(
        "Mamba2", None, vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_heads=8, head_dim=12, state_size=16, n_groups=1, chunk_size=chunk,
        tie_word_embeddings=False,
    )  # fmt: skip
    rows = train_transformer(model).layers().select("layer", "kind", "softmax_bytes").rows()
    assert rows == [(f"backbone.layers.{i}.mixer", "linear", 0) for i in range(LAYERS)]


def test_fourier_mixing_is_not_attention() -> None:
    model = build(
        "FNetForMaskedLM", None, vocab_size=VOCABULARY, hidden_size=WIDTH,
        num_hidden_layers=LAYERS, intermediate_size=80, max_position_embeddings=128,
    )  # fmt: skip
    inputs = ids()
    with attnprof.trace() as tracer:
        model.train()(input_ids=inputs, labels=inputs).loss.backward()
    assert tracer.run.layers().is_empty()


def test_latent_cache_holds_latent_and_positions_only() -> None:
    rank, rotary = 16, 8
    model = build(
        "DeepseekV2", **COMMON, num_key_value_heads=HEADS, kv_lora_rank=rank, q_lora_rank=None,
        qk_rope_head_dim=rotary, qk_nope_head_dim=12, v_head_dim=10, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=20, first_k_dense_replace=1,
        n_shared_experts=1,
    )  # fmt: skip
    run, cache = generate(model)
    assert len(cache.layers) == LAYERS
    seen = PROMPT + NEW - 1  # the last token made is never read
    assert held(run) == LAYERS * BATCH * seen * (rank + rotary) * FLOAT


def generate(model: nn.Module, **options: Any) -> tuple[Run, Any]:
    """Trace the generation of a few tokens; return the run and the cache."""
    with attnprof.trace() as tracer:
        output = model.eval().generate(
            ids(PROMPT), attention_mask=torch.ones(BATCH, PROMPT), max_new_tokens=NEW,
            min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, pad_token_id=0,
            **options,
        )  # fmt: skip
    return tracer.run, output.past_key_values


def test_sliding_layers_cache_their_window_and_full_layers_everything() -> None:
    window, kv_heads = 8, 2
    model = build(
        "Gemma3ForCausalLM", **COMMON, num_key_value_heads=kv_heads, head_dim=HEAD_DIM,
        sliding_window=window, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    run, cache = generate(model)
    assert len(cache.layers) == 2
    token = BATCH * 2 * kv_heads * HEAD_DIM * FLOAT
    assert held(run) == token * window + token * (PROMPT + NEW - 1)


def test_state_space_model_carries_states_instead_of_a_cache() -> None:
    inner, kernel, state = 2 * WIDTH, 4, 8
    model = build(
        "Mamba", None, vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        state_size=state, conv_kernel=kernel, time_step_rank=4,
    )  # fmt: skip
    run, cache = generate(model)
    assert len(cache.layers) == LAYERS
    assert held(run, "recurrent_state") == LAYERS * BATCH * inner * (kernel + state) * FLOAT
    assert held(run) == 0
