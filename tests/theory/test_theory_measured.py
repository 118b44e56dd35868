"""Kinds of attention other than the plain one, layers and whole models: theory against runs."""

import polars as pl
import pytest
import torch
from attention_runs import (
    BATCH,
    HEAD_DIM,
    HEADS,
    LENGTH,
    WIDTH,
    materialise,
    row_of,
    saved_bytes,
    scale,
    see_past,
    trace_attention,
)
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.run import Run
from attnprof.theory.activations import Setting, predict_layer
from attnprof.theory.architecture import Architecture, Latent
from attnprof.theory.cache import (
    cache_bytes,
    recurrent_state_bytes,
)
from attnprof.theory.capacity import predict_inference, predict_training
from attnprof.theory.recipes import Mask, ScorePath
from attnprof.theory.scores import keys_per_query, predict_scores
from attnprof.vocabulary import Category
from tests.versions import needs_fused_groups

FLOAT = 4  # bytes
KV_HEADS = 2
VOCABULARY = 61
FUSED = pytest.param("sdpa", marks=needs_fused_groups)


def size_of(run: Run, op: str, category: Category, *, saved: bool = False) -> int:
    """Return the bytes that an op made of a category."""
    blocks = run.allocations.filter(
        (pl.col("op").cast(pl.String) == op) & (pl.col("category").cast(pl.String) == category)
    )
    return int((blocks.filter("saved") if saved else blocks)["size_bytes"].sum())


# Kinds -------------------------------------------------------------------------------------------


def test_repeated_keys_are_io_and_scores_are_those_of_all_heads() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        return materialise(causal=False)(q, k, v)

    run = trace_attention(mix, kv_heads=KV_HEADS)
    held = predict_scores(
        ScorePath.MATERIALISED, batch=BATCH, heads=HEADS, q_len=LENGTH, k_len=LENGTH, mask=Mask.NONE
    )
    row = row_of(run)
    assert (row["heads"], row["kv_heads"]) == (HEADS, KV_HEADS)
    assert row["saved_softmax_bytes"] == held.saved_bytes
    q_k_v_and_output = 4 * BATCH * HEADS * LENGTH * HEAD_DIM * FLOAT  # K and V for all heads
    assert saved_bytes(run, Category.ATTENTION_IO) == q_k_v_and_output


def test_a_window_that_is_a_mask_saves_nothing() -> None:
    past = see_past(LENGTH)
    window = past & ~past.tril(-8)

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scale(q, k).masked_fill(~window, -torch.inf).softmax(-1) @ v

    assert row_of(trace_attention(mix))["softmax_bytes"] == BATCH * HEADS * LENGTH * LENGTH * FLOAT


def test_a_window_in_blocks_has_the_scores_of_a_band() -> None:
    block = 8

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = (functional.pad(t, (0, 0, block, 0)) for t in (k, v))
        keys, values = (t.unfold(2, 2 * block, block).transpose(-1, -2) for t in padded)
        queries = q.unflatten(2, (-1, block))  # (B, H, n / b, b, D)
        return (scale(queries, keys).softmax(-1) @ values).flatten(2, 3)

    row = row_of(trace_attention(mix))
    band = keys_per_query(before=block, block=block)
    held = predict_scores(
        ScorePath.MATERIALISED, batch=BATCH, heads=HEADS, q_len=LENGTH, k_len=band, mask=Mask.NONE
    )
    assert row["kind"] == "banded"
    assert row["saved_softmax_bytes"] == held.saved_bytes == BATCH * HEADS * LENGTH * 16 * FLOAT


@pytest.mark.parametrize("length", [40, 80])
def test_linear_attention_has_a_state_that_no_length_changes(length: int) -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = functional.elu(q) + 1, functional.elu(k) + 1
        return queries @ (keys.transpose(-1, -2) @ v)

    run = trace_attention(mix, length=length)
    state = recurrent_state_bytes(
        batch=BATCH, heads=HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM, dtype="float32"
    )
    assert row_of(run)["kind"] == "linear"
    assert size_of(run, "aten::bmm", Category.RECURRENT_STATE, saved=True) == state
    assert row_of(run)["saved_softmax_bytes"] == 0


class Recurrent(nn.Module):
    """RetNet's recurrent form: a state per head, one token at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.state: Tensor | None = None

    def forward(self, token: Tensor) -> Tensor:
        q, k, v = self.project(token).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
        update = k.unsqueeze(-1) * v.unsqueeze(-2)  # (B, H, D, D)
        self.state = update if self.state is None else 0.9 * self.state + update
        return (q.unsqueeze(-2) @ self.state).flatten(1)


def test_a_recurrent_layer_holds_one_state() -> None:
    model = nn.Sequential(Recurrent())
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        for _ in range(4):
            model(torch.randn(BATCH, WIDTH))
    held = tracer.run.peak(step=2).by_category()["recurrent_state"]
    state = recurrent_state_bytes(
        batch=BATCH, heads=HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM, dtype="float32"
    )
    assert held == 2 * state  # while the new one is made, the old one lives


class LatentAttention(nn.Module):
    """Multi-head latent attention with its latents cached, expanded at every use."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        assert shape.latent is not None
        self.shape, self.latent = shape, shape.latent
        self.query = nn.Linear(shape.width, shape.heads * shape.qk_dim)
        self.down = nn.Linear(shape.width, self.latent.kv_rank + self.latent.rope_dim)
        expanded = self.latent.nope_dim + self.latent.value_dim
        self.up = nn.Linear(self.latent.kv_rank, shape.heads * expanded)
        self.out = nn.Linear(shape.heads * shape.value_dim, shape.width)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        new = self.down(x)
        self.cache = new if self.cache is None else torch.cat([self.cache, new], 1)
        compressed, shared = self.cache.split([self.latent.kv_rank, self.latent.rope_dim], -1)
        heads = self.up(compressed).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)
        keys, values = heads.split([self.latent.nope_dim, self.latent.value_dim], -1)
        shared = shared.unsqueeze(1).expand(-1, self.shape.heads, -1, -1)
        keys = torch.cat([keys, shared], -1)
        queries = self.query(x).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)
        mixed = scale(queries, keys).softmax(-1) @ values
        return self.out(mixed.transpose(1, 2).flatten(2))


LATENT = Architecture(
    name="latent", layers=1, width=WIDTH, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM,
    ffn_width=56, vocabulary=VOCABULARY, context_len=64, latent=Latent(10, 6, 8, 14),
)  # fmt: skip


def test_latent_attention_caches_its_latents() -> None:
    model = nn.Sequential(LatentAttention(LATENT))
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        model(torch.randn(BATCH, LENGTH, WIDTH))
        model(torch.randn(BATCH, 1, WIDTH))
    live = tracer.run.allocations.filter(
        (pl.col("category").cast(pl.String) == "kv_cache") & pl.col("end_ns").is_null()
    )
    tokens = LENGTH + 1
    assert live["size_bytes"].sum() == BATCH * tokens * (10 + 6) * FLOAT
    assert live["size_bytes"].sum() == cache_bytes(
        LATENT, seq_len=tokens, batch=BATCH, dtype="float32"
    )


# Layers ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A GPT layer, byte for byte as Korthikanti et al. count it."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = dropout

    def drop(self, x: Tensor) -> Tensor:
        # One op with a bool mask, as CUDA has it; F.dropout on the CPU keeps a float one.
        return torch.native_dropout(x, 0.1, True)[0] if self.dropout else x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for t in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        mixed = self.drop(scale(q, k).softmax(-1)) @ v
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(functional.gelu(self.up(self.norms[1](x)))))


GPT = Architecture(
    name="gpt", layers=1, width=WIDTH, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM,
    ffn_width=4 * WIDTH, vocabulary=VOCABULARY, context_len=64, ffn_gated=False, rms_norm=False,
)  # fmt: skip


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpt_layer_keeps_what_theory_says(dtype: str, dropout: bool) -> None:
    model = nn.Sequential(Block(dropout)).to(getattr(torch, dtype))
    x = torch.randn(1, LENGTH, WIDTH, dtype=getattr(torch, dtype), requires_grad=True)
    with attnprof.trace(samples_per_second=0) as tracer:
        model(x + 0).float().sum().backward()
    setting = Setting(LENGTH, 1, dtype, ScorePath.MATERIALISED, Mask.NONE, dropout)
    layer = predict_layer(GPT, setting)
    first_input = LENGTH * WIDTH * setting.item_bytes  # made outside: x + 0
    measured = saved_bytes(tracer.run, layer="0")
    # LayerNorm keeps mean and scale in float32 on CUDA; on the CPU in the model's dtype.
    statistics = 2 * 2 * LENGTH * (4 - setting.item_bytes)
    assert measured == layer.total_bytes - first_input - statistics


def make_llama(implementation: str, dtype: str, layers: int, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, intermediate_size=112,
        max_position_embeddings=1024, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def shape_llama(layers: int, vocabulary: int) -> Architecture:
    return Architecture(
        name="llama", layers=layers, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS,
        head_dim=HEAD_DIM, ffn_width=112, vocabulary=vocabulary, context_len=1024,
    )  # fmt: skip


def set_llama(implementation: str, dtype: str, length: int, batch: int) -> Setting:
    if implementation == "sdpa":
        return Setting(length, batch, dtype, ScorePath.FUSED)
    return Setting(length, batch, dtype, ScorePath.FP32_SOFTMAX, Mask.FLOAT)


def train(model: nn.Module, vocabulary: int, length: int, batch: int) -> Run:
    """Trace two steps with AdamW, so that the second has its states."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.randint(0, vocabulary, (batch, length))
    with attnprof.trace(samples_per_second=0) as tracer:
        for _ in range(2):
            output = model(input_ids=ids, labels=ids, use_cache=False)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracer.run


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["eager", FUSED])
def test_a_llama_layer_keeps_what_theory_says(implementation: str, dtype: str, batch: int) -> None:
    run = train(make_llama(implementation, dtype, 2, VOCABULARY), VOCABULARY, 64, batch)
    kept = run.allocations.filter(
        pl.col("saved")
        & (pl.col("step") == 1)
        & (pl.col("phase").cast(pl.String) == "forward")
        & pl.col("layer").cast(pl.String).str.starts_with("model.layers.0")
    )
    setting = set_llama(implementation, dtype, 64, batch)
    assert (
        kept["size_bytes"].sum() == predict_layer(shape_llama(2, VOCABULARY), setting).total_bytes
    )


# Whole models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["eager", FUSED])
@pytest.mark.parametrize(("vocabulary", "length"), [(64, 256), (1024, 128)])
def test_training_takes_what_theory_says_within_4_percent(
    implementation: str, dtype: str, vocabulary: int, length: int
) -> None:
    # Left out of theory: rotary tables, the last norm, what autograd sums before it can free.
    run = train(make_llama(implementation, dtype, 6, vocabulary), vocabulary, length, 1)
    predicted = predict_training(
        shape_llama(6, vocabulary), set_llama(implementation, dtype, length, 1)
    )
    assert predicted.total_bytes == pytest.approx(run.peak(step=1).total_bytes, rel=0.04)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["eager", FUSED])
def test_a_prefill_takes_what_theory_says_within_4_percent(implementation: str, dtype: str) -> None:
    model = make_llama(implementation, dtype, 6, 64)
    ids = torch.randint(0, 64, (1, 256))
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    predicted = predict_inference(shape_llama(6, 64), set_llama(implementation, dtype, 256, 1))
    assert predicted.total_bytes == pytest.approx(tracer.run.peak().total_bytes, rel=0.04)


def shape_mistral(window: int | None) -> Architecture:
    return Architecture(
        name="mistral", layers=3, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        ffn_width=56, vocabulary=VOCABULARY, context_len=64, window=window,
        windowed_layers=0 if window is None else 3,
    )  # fmt: skip


def serve_mistral(window: int | None, *, new_tokens: int) -> int:
    """Return the bytes of the KV cache after a prompt and some tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, intermediate_size=56, max_position_embeddings=64,
        head_dim=HEAD_DIM, sliding_window=window,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    cache = None
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        for length in (LENGTH, *[1] * new_tokens):
            ids = torch.randint(0, VOCABULARY, (BATCH, length))
            cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
    live = tracer.run.allocations.filter(pl.col("end_ns").is_null())
    return int(live.filter(pl.col("category").cast(pl.String) == "kv_cache")["size_bytes"].sum())


@pytest.mark.parametrize("window", [None, 16])
def test_a_cache_holds_what_theory_says(window: int | None) -> None:
    assert serve_mistral(window, new_tokens=1) == cache_bytes(
        shape_mistral(window), seq_len=LENGTH + 1, batch=BATCH, dtype="float32"
    )


def test_a_window_holds_the_whole_prompt_until_the_first_token_after_it() -> None:
    # transformers keeps a view of the last tokens, and with it the storage of all of them
    assert serve_mistral(16, new_tokens=0) == cache_bytes(
        shape_mistral(16), seq_len=LENGTH, batch=BATCH, dtype="float32", windows_kept=False
    )
