"""Flops, caches, traffic, activations, capacity: closed forms against sums and other authors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.theory.activations import Setting, loss_bytes, predict_layer
from attnprof.theory.architecture import Architecture
from attnprof.theory.cache import cache_bytes, recurrent_state_bytes, state_space_bytes
from attnprof.theory.capacity import max_seq_len, predict_inference, predict_training
from attnprof.theory.devices import find_device
from attnprof.theory.dtypes import count_bytes, item_bytes, name_dtype
from attnprof.theory.flops import count_decode, count_forward, count_pairs, find_crossing
from attnprof.theory.forecast import forecast_model
from attnprof.theory.models import MODELS, find_model
from attnprof.theory.recipes import Mask, ScorePath
from attnprof.theory.traffic import (
    bound_decode,
    bound_prefill,
    flash_attention_bytes,
    standard_attention_bytes,
)

models = st.sampled_from(MODELS)
lengths = st.integers(1, 5000)
paths = st.sampled_from(ScorePath)

LLAMA, GEMMA, DEEPSEEK = (find_model(m) for m in ("Llama 3.1 8B", "Gemma 3 4B", "DeepSeek-V3"))


# Dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full"),
    [("bf16", "bfloat16"), ("torch.float32", "float32"), ("FP8", "float8"), ("int4", "int4")],
)
def test_dtypes_go_by_several_names(name: str, full: str) -> None:
    assert name_dtype(name) == full


def test_bytes_are_whole() -> None:
    assert [count_bytes(n, "int4") for n in (1, 2, 3)] == [1, 1, 2]


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="no dtype named 'float12'; expected one of float64"):
        name_dtype("float12")


def test_attention_does_not_compute_in_storage_formats() -> None:
    with pytest.raises(ValueError, match="int4 can store a cache or weights, but attention does"):
        item_bytes("int4")


# Flops -------------------------------------------------------------------------------------------


@given(models, st.integers(1, 300))
def test_pairs_are_those_that_a_mask_leaves(arch: Architecture, n: int) -> None:
    window = arch.window or n
    full = sum(range(1, n + 1))
    banded = sum(min(i, window) for i in range(1, n + 1))
    counted = count_pairs(arch, seq_len=n, skip_masked=True)
    assert counted == arch.full_layers * full + arch.windowed_layers * banded
    assert count_pairs(arch, seq_len=n) == arch.layers * n * n >= counted


def test_a_training_step_takes_the_flops_that_palm_counts() -> None:
    # PaLM, appendix B: 6 N + 12 L H Q T per token, N without embeddings, which it multiplies too
    gpt, n = find_model("GPT-3"), 2048
    per_token = 3 * count_forward(gpt, seq_len=n).total / n
    multiplied = gpt.parameters - gpt.learned_positions * gpt.width
    assert per_token == 6 * multiplied + 12 * gpt.layers * gpt.heads * gpt.head_dim * n


@given(models, st.integers(0, 4000), st.integers(1, 8))
def test_decoding_takes_what_a_prefill_of_one_more_token_takes(
    arch: Architecture, past: int, batch: int
) -> None:
    token = count_decode(arch, past_len=past, batch=batch)
    longer, shorter = (
        count_forward(arch, seq_len=n, batch=batch, skip_masked=True) for n in (past + 1, past)
    )
    assert token.ffn == longer.ffn - shorter.ffn
    assert token.head == longer.head - shorter.head
    if arch.latent is None:  # decoded in another form
        assert token.attention == longer.attention - shorter.attention


@given(models, st.booleans(), st.booleans())
def test_attention_overtakes_exactly_at_the_crossing(
    arch: Architecture, with_projections: bool, skip_masked: bool
) -> None:
    n = find_crossing(arch, with_projections=with_projections, skip_masked=skip_masked)

    def has_crossed(length: int) -> bool:
        flops = count_forward(arch, seq_len=length, skip_masked=skip_masked)
        return flops.attention >= flops.ffn + with_projections * flops.projections

    if n is None:
        assert skip_masked
        assert not has_crossed(2**30)
    else:
        assert has_crossed(n)
        assert not has_crossed(n - 1)


def test_attention_never_overtakes_where_every_layer_has_a_window() -> None:
    assert find_crossing(find_model("Mistral 7B"), skip_masked=True) is None


# Caches ------------------------------------------------------------------------------------------


def test_windowed_layers_keep_a_window() -> None:
    per_token = 2 * GEMMA.kv_heads * GEMMA.head_dim * 2
    assert cache_bytes(GEMMA, seq_len=8000) == per_token * (5 * 8000 + 29 * 1024)
    assert cache_bytes(GEMMA, seq_len=8000, windows_kept=False) == per_token * 34 * 8000


def test_pages_round_every_sequence_up() -> None:
    whole = cache_bytes(LLAMA, seq_len=112, batch=3)
    assert cache_bytes(LLAMA, seq_len=100, batch=3, block_tokens=16) == whole
    assert cache_bytes(LLAMA, seq_len=112, batch=3, block_tokens=16) == whole


@pytest.mark.parametrize(("dtype", "divisor"), [("float8", 2), ("int4", 4)])
def test_a_quantised_cache_is_smaller(dtype: str, divisor: int) -> None:
    whole = cache_bytes(LLAMA, seq_len=1000)
    assert cache_bytes(LLAMA, seq_len=1000, dtype=dtype) == whole // divisor


def test_recurrent_states_know_no_length() -> None:
    assert recurrent_state_bytes(batch=2, heads=8, key_dim=64, value_dim=128, layers=3) == (
        3 * 2 * 8 * 64 * 128 * 4
    )
    mamba = state_space_bytes(batch=1, inner_width=1536, state_size=16, conv_width=4, layers=24)
    assert mamba == 24 * 1536 * (16 + 4) * 4


def test_mamba_holds_the_state_that_theory_says() -> None:
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8, conv_kernel=4
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(0, 61, (3, 10)), use_cache=True).cache_params
    kinds = [d for layer in cache.layers for d in (layer.conv_states, layer.recurrent_states)]
    assert sum(state.nbytes for kind in kinds for state in kind.values()) == state_space_bytes(
        batch=3, inner_width=64, state_size=8, conv_width=4, layers=2
    )


# Traffic -----------------------------------------------------------------------------------------


def test_standard_attention_moves_the_scores_four_times() -> None:
    moved = standard_attention_bytes(q_len=1024, k_len=1024, head_dim=64, dtype="float16")
    assert moved == 2 * (4 * 1024 * 64 + 4 * 1024 * 1024)


def test_flash_attention_moves_nine_times_less_as_its_paper_says() -> None:
    # FlashAttention, figure 2: GPT-2 medium, n = 1024, D = 64: 40.3 GB against 4.4 GB forward and
    # backward; here the forward alone.
    shape = {"q_len": 1024, "k_len": 1024, "head_dim": 64}
    flash = flash_attention_bytes(**shape, sram_bytes=192 * 1024)
    assert 4 < standard_attention_bytes(**shape) / flash < 10


@given(st.integers(10, 14), st.sampled_from([64, 128]))
def test_flash_attention_moves_n_squared_d_squared_over_m(power: int, head_dim: int) -> None:
    shape = {"q_len": 2**power, "k_len": 2**power, "head_dim": head_dim}
    small, large = (flash_attention_bytes(**shape, sram_bytes=m * 2**10) for m in (32, 64))
    assert small / large == pytest.approx(2, rel=0.2)
    longer = flash_attention_bytes(
        q_len=2 ** (power + 1), k_len=2 ** (power + 1), head_dim=head_dim, sram_bytes=2**15
    )
    assert longer / small == pytest.approx(4, rel=0.2)


def test_flash_attention_needs_room_for_a_block() -> None:
    with pytest.raises(ValueError, match="100 bytes on the chip hold no block of keys of 64"):
        flash_attention_bytes(q_len=8, k_len=8, head_dim=64, sram_bytes=100)


def test_a_token_takes_the_time_of_reading_weights_and_cache() -> None:
    h100 = find_device("H100")
    bound = bound_decode(LLAMA, h100, past_len=99_999)
    moved = LLAMA.active_parameters * 2 + cache_bytes(LLAMA, seq_len=100_000)
    assert (bound.moved_bytes, bound.limit) == (moved, "memory")
    assert bound.seconds == moved / h100.bandwidth_bytes_per_second


def test_a_long_prefill_is_limited_by_its_products() -> None:
    bound = bound_prefill(LLAMA, find_device("H100"), seq_len=8192)
    assert (bound.limit, bound.seconds) == ("compute", bound.flops / (989.4 * 10**12))


def test_one_token_reads_few_experts_and_a_batch_reads_all() -> None:
    h200 = find_device("H200")
    one, many = (bound_decode(DEEPSEEK, h200, past_len=0, batch=b).moved_bytes for b in (1, 512))
    cache = cache_bytes(DEEPSEEK, seq_len=1)
    assert one == 2 * DEEPSEEK.active_parameters + cache
    assert many == 2 * (DEEPSEEK.parameters - DEEPSEEK.head_parameters) + 512 * cache


# Activations and capacity ------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "b"), [(128, 1), (2048, 4)])
def test_a_gpt_layer_keeps_the_34_of_korthikanti(s: int, b: int) -> None:
    gpt = find_model("GPT-3")
    h, a = gpt.width, gpt.heads
    setting = Setting(s, b, "bfloat16", ScorePath.MATERIALISED, Mask.NONE, dropout=True)
    layer = predict_layer(gpt, setting)
    statistics = 2 * 2 * 4 * s * b  # mean and scale of two norms, which the paper neglects
    assert layer.total_bytes - statistics == 34 * s * b * h + 5 * a * s * s * b


def test_the_loss_of_a_large_vocabulary_takes_1_7_mebibytes_a_token() -> None:
    assert loss_bytes(LLAMA, Setting(1)) == 128_256 * (2 + 3 * 4)
    assert loss_bytes(LLAMA, Setting(1)) / 2**20 == pytest.approx(1.7, abs=0.02)


@given(models, lengths, st.integers(1, 4), paths, st.booleans())
def test_parts_sum_and_grow_with_length(
    arch: Architecture, n: int, batch: int, path: ScorePath, training: bool
) -> None:
    measure = predict_training if training else predict_inference
    sizes = [measure(arch, Setting(m, batch, path=path)).total_bytes for m in (n, n + 1)]
    assert arch.parameters * 2 < sizes[0] <= sizes[1]


@given(st.sampled_from(MODELS[:20]), paths, st.booleans(), st.integers(2**33, 2**41))
def test_the_largest_length_fits_and_the_next_does_not(
    arch: Architecture, path: ScorePath, training: bool, capacity: int
) -> None:
    measure = predict_training if training else predict_inference
    n = max_seq_len(arch, Setting(1, path=path), capacity_bytes=capacity, training=training)
    if n:
        assert measure(arch, Setting(n, path=path)).total_bytes <= capacity
    assert measure(arch, Setting(n + 1, path=path)).total_bytes > capacity


def test_an_optimizer_may_keep_more_and_gradients_may_stay() -> None:
    setting = Setting(2048)
    plain = predict_training(LLAMA, setting)
    mixed = predict_training(LLAMA, setting, optimizer_bytes_per_parameter=12)
    assert mixed.optimizer_bytes == 12 * LLAMA.parameters
    assert plain.optimizer_bytes == 2 * 2 * LLAMA.parameters
    kept = predict_training(LLAMA, Setting(16_384), gradients_kept=True)
    assert kept.gradients_bytes == 2 * LLAMA.parameters


def test_a_short_step_peaks_where_all_gradients_are_there() -> None:
    assert predict_training(LLAMA, Setting(1)).gradients_bytes == 2 * LLAMA.parameters


def test_chunks_and_quantised_caches_lower_the_peak_of_a_prefill() -> None:
    setting = Setting(131_072)
    whole = predict_inference(LLAMA, setting)
    chunked = predict_inference(LLAMA, setting, prefill_chunk=2048)
    assert chunked.working_bytes == whole.working_bytes // 64
    small = predict_inference(LLAMA, setting, cache_dtype="float8")
    assert small.kv_cache_bytes == whole.kv_cache_bytes // 2


# Forecasts ---------------------------------------------------------------------------------------


def test_a_forecast_compares_each_way_of_running_once() -> None:
    [half] = forecast_model(LLAMA, seq_lens=[1024]).lengths
    assert [(p.path.value, p.dtype) for p in half.paths] == [
        ("materialised", "float32"),
        ("fp32_softmax", "bfloat16"),
        ("materialised", "bfloat16"),
        ("math", "bfloat16"),
        ("fused", "bfloat16"),
    ]
    [full] = forecast_model(LLAMA, seq_lens=[1024], dtype="fp32").lengths
    assert [p.path.value for p in full.paths] == ["materialised", "math", "fused"]


def test_a_forecast_without_a_device_has_no_times() -> None:
    found = forecast_model(LLAMA, seq_lens=[1024])
    assert (found.walls, found.lengths[0].prefill, found.lengths[0].decode) == ((), None, None)


@pytest.mark.parametrize("options", [{"batch": 0}, {"dtype": "int4"}, {"seq_lens": [0]}])
def test_forecasts_of_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|int4 can store"):
        forecast_model(LLAMA, **{"seq_lens": [16]} | options)  # type: ignore[arg-type]  # on purpose
