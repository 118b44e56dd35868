"""Each kind of cache in transformers, against the real cache object, at every step."""

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
from torch import nn

import attnprof
from attnprof.analysis.cache_forms import take_largest
from attnprof.analysis.forwards import find_forwards
from tests.attribution.cache_programs import (
    BATCH,
    ENCODER_DECODER,
    FLOAT,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    NEW,
    PROMPT,
    SIZES,
    VOCABULARY,
    WIDTH,
    Watch,
    build,
    generate,
    held_by_forward,
    make_llama,
    prompt,
    reachable_by_forward,
)

WINDOW = 8
MLA = {key: value for key, value in SIZES.items() if key != "head_dim"} | {
    "num_key_value_heads": HEADS, "kv_lora_rank": 16, "q_lora_rank": 20, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 20, "first_k_dense_replace": LAYERS, "n_shared_experts": 1,
}  # fmt: skip
INDEX_DIM = 14
NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


def make_t5() -> nn.Module:
    return build(
        "T5ForConditionalGeneration", d_model=WIDTH, d_kv=HEAD_DIM, d_ff=80, num_layers=LAYERS,
        num_heads=HEADS, **ENCODER_DECODER,
    )  # fmt: skip


def make_bart() -> nn.Module:
    return build(
        "BartForConditionalGeneration", d_model=WIDTH, encoder_layers=LAYERS,
        decoder_layers=LAYERS, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2, forced_eos_token_id=None, **ENCODER_DECODER,
    )  # fmt: skip


def make_mamba2() -> nn.Module:
    return build(
        "Mamba2ForCausalLM", attention=None, vocab_size=VOCABULARY, hidden_size=WIDTH,
        num_hidden_layers=LAYERS, state_size=8, num_heads=8, head_dim=HEAD_DIM, n_groups=2,
        chunk_size=8,
    )  # fmt: skip


def make_jamba() -> nn.Module:
    return build(
        "JambaForCausalLM", **NO_HEAD_DIM, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=2, mamba_d_state=8,
        mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip


def make_bamba() -> nn.Module:
    return build(
        "BambaForCausalLM", **NO_HEAD_DIM, mamba_n_heads=8, mamba_d_head=12, mamba_n_groups=1,
        mamba_d_state=8, mamba_chunk_size=8, attn_layer_indices=[1],
    )  # fmt: skip


def make_indexed() -> nn.Module:
    """Return a model whose indexer has keys of its own to choose tokens by."""
    return build(
        "DeepseekV32ForCausalLM", **MLA, n_group=1, topk_group=1, index_topk=4, index_n_heads=2,
        index_head_dim=INDEX_DIM,
    )  # fmt: skip


def make_qwen3_next() -> nn.Module:
    return build(
        "Qwen3NextForCausalLM", **SIZES, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=12, linear_value_head_dim=14, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=20, shared_expert_intermediate_size=20,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def make_falcon_h1() -> nn.Module:
    return build(
        "FalconH1ForCausalLM", **SIZES, mamba_d_ssm=48, mamba_n_heads=4, mamba_d_head=12,
        mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8,
    )  # fmt: skip


GROWN, WINDOWED, STATIC = {"grown"}, {"window"}, {"preallocated"}

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], set[str]]] = {
    "dynamic": (make_llama, {}, GROWN),
    "dynamic_sdpa": (lambda: make_llama(attention="sdpa"), {}, GROWN),
    "fused_qkv": (
        lambda: build(
            "GPT2LMHeadModel", vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH,
            n_layer=LAYERS, n_head=HEADS, bos_token_id=1, eos_token_id=2,
        ),
        {},
        GROWN,
    ),
    "window_shorter_than_prompt": (
        lambda: build("MistralForCausalLM", **SIZES, sliding_window=4), {}, WINDOWED,
    ),
    "window_reached_while_decoding": (
        lambda: build("MistralForCausalLM", **SIZES, sliding_window=PROMPT + 3), {}, WINDOWED,
    ),
    "gemma2": (lambda: build("Gemma2ForCausalLM", **SIZES, **HYBRID), {}, WINDOWED | GROWN),
    "gemma3": (lambda: build("Gemma3ForCausalLM", **SIZES, **HYBRID), {}, WINDOWED | GROWN),
    "static": (make_llama, {"cache_implementation": "static", "max_cache_len": 20}, STATIC),
    "static_sdpa": (
        lambda: make_llama(attention="sdpa"),
        {"cache_implementation": "static", "max_cache_len": 20},
        STATIC,
    ),
    "static_window": (
        lambda: build("Gemma3ForCausalLM", **SIZES, **HYBRID),
        {"cache_implementation": "static"},
        STATIC,
    ),
    "t5": (make_t5, {}, GROWN | {"cross"}),
    "bart": (make_bart, {"num_beams": 1}, GROWN | {"cross"}),
    "latent": (lambda: build("DeepseekV3ForCausalLM", **MLA, n_group=1, topk_group=1), {},
               {"latent"}),
    "indexer": (make_indexed, {}, {"latent"}),
    "convolved_keys": (lambda: build("ZayaForCausalLM", **SIZES), {}, GROWN | {"state"}),
    "one_token_to_states": (make_bamba, {"ids": prompt(1)}, GROWN | {"state"}),
    "mamba": (
        lambda: build(
            "MambaForCausalLM", attention=None, vocab_size=VOCABULARY, hidden_size=WIDTH,
            num_hidden_layers=LAYERS, state_size=8, time_step_rank=4,
        ),
        {},
        {"state"},
    ),
    "mamba2": (make_mamba2, {}, {"state"}),
    "rwkv": (
        lambda: build(
            "RwkvForCausalLM", attention=None, vocab_size=VOCABULARY, hidden_size=WIDTH,
            num_hidden_layers=LAYERS, attention_hidden_size=WIDTH, intermediate_size=80,
        ),
        {},
        {"state"},
    ),
    "jamba": (make_jamba, {}, GROWN | {"state"}),
    "qwen3_next": (make_qwen3_next, {}, GROWN | {"state"}),
    "falcon_h1": (make_falcon_h1, {}, GROWN | {"state"}),
    "short_convolution": (
        lambda: build(
            "Lfm2ForCausalLM", **NO_HEAD_DIM, layer_types=["conv", "full_attention"],
            conv_L_cache=3,
        ),
        {},
        GROWN | {"state"},
    ),
    "beams": (make_llama, {"num_beams": 3}, GROWN),
    "beams_of_states": (make_falcon_h1, {"num_beams": 3}, GROWN | {"state"}),
    "beams_in_a_room": (make_llama, {"cache_implementation": "static", "num_beams": 3}, STATIC),
    "beams_of_an_encoder_decoder": (make_t5, {"num_beams": 3}, GROWN | {"cross"}),
    "several_samples": (make_llama, {"do_sample": True, "num_return_sequences": 3}, GROWN),
    "chunked_prefill": (make_llama, {"prefill_chunk_size": 3}, GROWN),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_held_and_reachable_bytes_are_those_of_the_cache_object(case: str) -> None:
    make, options, kinds = CASES[case]
    run, truth, _output = generate(make(), **options)
    assert held_by_forward(run) == [h.held_bytes for h in truth]
    assert reachable_by_forward(run) == [h.reachable_bytes for h in truth]
    assert set(run.kv_cache()["kind"]) == kinds


@pytest.mark.parametrize("case", ["dynamic", "gemma3", "static", "t5", "beams", "falcon_h1"])
def test_layers_sum_to_their_category_whenever_a_forward_has_ended(case: str) -> None:
    make, options, _kinds = CASES[case]
    run, _truth, _output = generate(make(), **options)
    frame = run.attribution.allocations
    places = {forward.number: forward.settled_event for forward in find_forwards(run.attribution)}
    for (forward, category), rows in run.kv_cache().group_by("forward", "category"):
        place = places[int(str(forward))]
        live = frame.filter(
            (pl.col("category").cast(pl.String) == category)
            & (pl.col("start") < place)
            & (pl.col("end") >= place)
        )
        assert rows["held_bytes"].sum() == live["size_bytes"].sum()


def test_tokens_and_their_bytes_are_those_of_the_architecture() -> None:
    run, _truth, _output = generate(make_llama())
    frame = run.kv_cache()
    assert set(frame["bytes_per_token"]) == {2 * KV_HEADS * HEAD_DIM * FLOAT}
    for _layer, rows in frame.group_by("layer"):
        assert rows["tokens"].to_list() == list(range(PROMPT, PROMPT + NEW))
        assert rows["phase"].to_list() == ["prefill"] + ["decode"] * (NEW - 1)
    assert set(frame.select("batch", "kv_heads", "head_dim").rows()) == {
        (BATCH, KV_HEADS, HEAD_DIM)
    }


def test_static_cache_tells_what_is_used_from_what_is_held() -> None:
    room = 20
    run, _truth, _output = generate(make_llama(), cache_implementation="static", max_cache_len=room)
    token = BATCH * 2 * KV_HEADS * HEAD_DIM * FLOAT
    for _layer, rows in run.kv_cache().group_by("layer"):
        assert rows["tokens"].to_list() == list(range(PROMPT, PROMPT + NEW))
        assert rows["used_bytes"].to_list() == [n * token for n in range(PROMPT, PROMPT + NEW)]
        assert set(rows["held_bytes"]) == {room * token}


def test_room_of_a_window_has_a_slot_per_token_of_the_window() -> None:
    """A prompt that is longer than the window is cut; none of its tokens is smaller for that."""
    window = 4
    model = build("MistralForCausalLM", **SIZES, sliding_window=window)
    run, _truth, _output = generate(model, cache_implementation="static")
    frame = run.kv_cache()
    assert set(frame["tokens"]) == {window}
    assert set(frame["bytes_per_token"]) == {2 * KV_HEADS * HEAD_DIM * FLOAT}


def test_beams_in_a_room_have_the_tokens_of_the_room_they_were_copied_from() -> None:
    run, _truth, _output = generate(make_llama(), cache_implementation="static", num_beams=3)
    for _layer, rows in run.kv_cache().group_by("layer"):
        assert rows["tokens"].to_list() == list(range(PROMPT, PROMPT + NEW))


def test_window_keeps_one_token_less_than_it_attends_to() -> None:
    run, _truth, _output = generate(build("MistralForCausalLM", **SIZES, sliding_window=4))
    frame = run.kv_cache()
    token = BATCH * 2 * KV_HEADS * HEAD_DIM * FLOAT
    assert set(frame["tokens"]) == {4 - 1}
    assert set(frame.filter(pl.col("phase") == "prefill")["held_bytes"]) == {PROMPT * token}
    assert set(frame.filter(pl.col("phase") == "decode")["held_bytes"]) == {4 * token}


def test_latent_is_smaller_than_the_keys_and_values_it_expands_to() -> None:
    model = build("DeepseekV3ForCausalLM", **MLA, n_group=1, topk_group=1)
    run, _truth, _output = generate(model)
    latent = MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"]
    assert set(run.kv_cache()["bytes_per_token"]) == {latent * FLOAT}


def test_keys_and_values_may_differ_in_width() -> None:
    value_dim = 10
    model = build(
        "MiMoV2FlashForCausalLM", **SIZES, v_head_dim=value_dim, layer_types=["full_attention"] * 2,
        mlp_layer_types=["dense"] * 2,
    )  # fmt: skip
    run, _truth, _output = generate(model)
    frame = run.kv_cache()
    assert set(frame.select("kv_heads", "head_dim", "value_dim").rows()) == {
        (KV_HEADS, HEAD_DIM, value_dim)
    }
    layers = take_largest(frame)
    assert {(x.bytes_per_token, x.predicted_bytes_per_token) for x in layers} == {
        2 * (KV_HEADS * (HEAD_DIM + value_dim) * FLOAT,)
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_heads_are_those_that_are_kept_and_not_those_they_are_repeated_to(attention: str) -> None:
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # then the fused kernel cannot repeat them by itself
    run, _truth, _output = generate(make_llama(attention=attention), ids, attention_mask=mask)
    assert set(run.layers().select("heads", "kv_heads").rows()) == {(HEADS, KV_HEADS)}
    latent = 16
    predicted = run.what_if(latent_dim=latent).after.by_category()["kv_cache"]
    held = run.peak().by_category()["kv_cache"]
    assert predicted == held * latent // (2 * KV_HEADS * HEAD_DIM)


def test_keys_that_choose_tokens_are_cached_with_the_keys_they_choose() -> None:
    run, _truth, _output = generate(make_indexed())
    kept = MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"] + INDEX_DIM
    assert set(run.kv_cache()["bytes_per_token"]) == {kept * FLOAT}


def test_growing_holds_old_and_new_copies_and_heads_are_repeated_to_attend() -> None:
    run, _truth, _output = generate(make_llama())
    rows = run.kv_cache().filter(pl.col("phase") == "decode")
    part = BATCH * KV_HEADS * HEAD_DIM * FLOAT  # K, or V, of one token
    for row in rows.iter_rows(named=True):
        # K is longer by now; V is copied while the shorter V is still there.
        assert row["growing_bytes"] == (row["tokens"] - 1) * part
        # K and V with as many heads as queries.
        assert row["expanded_bytes"] >= 2 * row["tokens"] * part * HEADS // KV_HEADS
        assert row["transient_bytes"] >= row["expanded_bytes"]


def test_rotary_table_that_is_filled_inside_the_trace_is_no_cache() -> None:
    with attnprof.trace() as tracer:
        make_llama().generate(
            torch.arange(PROMPT)[None], max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    per_token = tracer.run.kv_cache()["bytes_per_token"]
    assert per_token.unique().to_list() == [2 * KV_HEADS * HEAD_DIM * FLOAT]


def test_prompt_lookup_crops_the_tokens_that_were_not_accepted() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
    run, truth, _output = generate(make_llama(), ids, prompt_lookup_num_tokens=3)
    assert held_by_forward(run) == [h.held_bytes for h in truth]
    token = 2 * LAYERS * KV_HEADS * HEAD_DIM * FLOAT  # K and V of all layers
    kept = [h.reachable_bytes // token for h in truth]
    assert kept[0] == ids.shape[1] + 3  # the prompt, and the candidates that follow it
    assert kept[1] == ids.shape[1] + 1  # none was accepted: all are gone before the next token
    assert run.kv_cache()["tokens"].to_list() == [n for n in kept for _ in range(LAYERS)]


def test_padding_on_the_left_is_held_like_tokens() -> None:
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    run, truth, _output = generate(make_llama(), ids.masked_fill(mask == 0, 0), attention_mask=mask)
    assert held_by_forward(run) == [h.held_bytes for h in truth]
    assert run.kv_cache()["tokens"].to_list()[:LAYERS] == [PROMPT] * LAYERS


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompt_of_one_token(attention: str) -> None:
    run, truth, _output = generate(make_llama(attention=attention), prompt(1))
    assert held_by_forward(run) == [h.held_bytes for h in truth]
    assert run.kv_cache()["tokens"].to_list() == [
        n for n in range(1, NEW + 1) for _ in range(LAYERS)
    ]


def test_empty_prompt_starts_from_the_first_token_that_the_program_puts_in() -> None:
    watched = Watch(model := make_llama())
    with attnprof.trace(samples_per_second=0) as tracer:
        model.generate(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert held_by_forward(tracer.run) == [h.held_bytes for h in watched.holdings]


def test_chunks_of_a_prompt_are_prefill_and_what_follows_the_first_answer_is_decode() -> None:
    run, _truth, _output = generate(make_llama(), prefill_chunk_size=3)
    phases = run.kv_cache().group_by("forward", maintain_order=True).first()["phase"].to_list()
    assert phases == ["prefill"] * 3 + ["decode"] * (NEW - 1)  # 3 + 3 + 1 tokens of the prompt


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantised_cache_counts_what_it_packs_and_what_waits_to_be_packed(backend: str) -> None:
    pytest.importorskip("optimum.quanto" if backend == "quanto" else "hqq")
    axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    options = {"backend": backend, "nbits": 4, "q_group_size": 24, "residual_length": 4} | axis
    run, truth, _output = generate(
        make_llama(), cache_implementation="quantized", cache_config=options
    )
    assert held_by_forward(run) == [h.held_bytes for h in truth]
    assert set(run.kv_cache()["kind"]) == {"quantised"}
    for _layer, rows in run.kv_cache().group_by("layer"):
        assert rows["tokens"].to_list() == list(range(PROMPT, PROMPT + NEW))


@pytest.mark.parametrize("beams", [1, 3])
def test_floats_of_eight_bits_are_held_with_their_scales(beams: int) -> None:
    run, truth, _output = generate(
        make_llama(), cache_implementation="quantized", cache_config={"backend": "fp8"},
        num_beams=beams,
    )  # fmt: skip
    scales = 2 * LAYERS * FLOAT  # one each for K and V; `measure` leaves single numbers out
    assert held_by_forward(run) == [h.held_bytes + scales for h in truth]
    assert set(run.kv_cache()["kind"]) == {"quantised"}
