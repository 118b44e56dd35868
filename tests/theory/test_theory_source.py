"""Every figure of the text this project grew from, as arithmetic; docs/theory.md cites them."""

import pytest

from attnprof.theory.architecture import Architecture
from attnprof.theory.cache import cache_bytes, cache_bytes_per_token, expanded_elements_per_token
from attnprof.theory.devices import DEVICES, find_device
from attnprof.theory.flops import count_decode, count_forward, count_generation, find_crossing
from attnprof.theory.models import find_model
from attnprof.theory.recipes import Mask, ScorePath
from attnprof.theory.scores import predict_scores
from attnprof.theory.traffic import bound_prefill, seconds_to_move

FP16 = 2  # bytes


def scores_of(n: int) -> int:
    """Return the scores of one head in one layer."""
    return predict_scores(ScorePath.MATERIALISED, batch=1, heads=1, q_len=n, k_len=n).scores


def saved_softmax(n: int, layers: int) -> int:
    """Return the softmax results that layers of one head keep, in FP16."""
    held = predict_scores(
        ScorePath.MATERIALISED, batch=1, heads=1, q_len=n, k_len=n, dtype="float16", mask=Mask.NONE
    )
    return held.saved_by_layers(layers)


def plain(
    layers: int, width: int, *, ffn_gated: bool = False, ffn: int | None = None
) -> Architecture:
    """Return multi-head attention with an FFN of 4 d, or a gated one of 8/3 d."""
    return Architecture(
        name="plain", layers=layers, width=width, heads=width // 128, kv_heads=width // 128,
        head_dim=128, ffn_width=ffn or 4 * width, ffn_gated=ffn_gated, vocabulary=32000,
        context_len=None,
    )  # fmt: skip


def test_8000_tokens_are_64_million_scores() -> None:
    assert scores_of(8000) == 64_000_000
    assert scores_of(8000) * FP16 == 128 * 10**6


def test_a_million_tokens_are_a_trillion_scores_and_2_terabytes() -> None:
    assert scores_of(10**6) == 10**12
    assert scores_of(10**6) * FP16 == 2 * 10**12


def test_no_accelerator_holds_2_terabytes() -> None:
    assert max(device.memory_bytes for device in DEVICES) < 2 * 10**12


def test_32_layers_of_32768_tokens_keep_70_gigabytes_for_one_head() -> None:
    kept = saved_softmax(32_768, layers=32)
    assert kept == 32 * 32_768**2 * FP16 == 64 * 2**30
    assert kept / 10**9 == pytest.approx(70, rel=0.02)
    assert kept / 10**9 == pytest.approx(68.7, abs=0.05)


def test_moving_one_score_matrix_in_and_out_takes_2_15_milliseconds_and_not_30() -> None:
    matrix = 32_768**2 * FP16
    assert matrix / 10**9 == pytest.approx(2.147, abs=0.001)
    once = seconds_to_move(matrix, bandwidth_bytes_per_second=2 * 10**12)
    both = seconds_to_move(matrix, bandwidth_bytes_per_second=2 * 10**12, times=2)
    assert (once, both) == (pytest.approx(1.07e-3, abs=5e-6), pytest.approx(2.15e-3, abs=5e-6))
    assert both < 30e-3 / 10


def test_an_a100_has_about_2_terabytes_per_second() -> None:
    assert find_device("A100 80GB").bandwidth_bytes_per_second / 10**12 == pytest.approx(
        2.0, abs=0.05
    )


@pytest.mark.parametrize("n", [512, 8192])
def test_attention_takes_4_n_squared_d_flops_a_layer(n: int) -> None:
    arch = plain(layers=3, width=1024)
    assert count_forward(arch, seq_len=n).attention == 3 * 4 * n * n * 1024
    assert count_forward(arch, seq_len=n, skip_masked=True).attention == 3 * 2 * n * (n + 1) * 1024


def test_doubling_the_context_quadruples_attention_and_its_memory() -> None:
    arch = plain(layers=2, width=512)
    once, twice = (count_forward(arch, seq_len=n).attention for n in (4096, 8192))
    assert twice == 4 * once
    assert saved_softmax(8192, layers=2) == 4 * saved_softmax(4096, layers=2)


@pytest.mark.parametrize("width", [768, 4096, 12288])
def test_attention_overtakes_the_ffn_at_4_d_and_the_layer_at_6_d(width: int) -> None:
    arch = plain(layers=4, width=width)
    assert find_crossing(arch) == 4 * width
    assert find_crossing(arch, with_projections=True) == 6 * width
    gated = plain(layers=4, width=width, ffn_gated=True, ffn=8 * width // 3)
    assert find_crossing(gated) == pytest.approx(4 * width, abs=2)


def test_at_a_million_tokens_attention_is_21_times_the_ffn_of_a_model_12000_wide() -> None:
    # two orders of magnitude are n : d = 83; the flops themselves are n : 4 d
    flops = count_forward(find_model("GPT-3"), seq_len=10**6)
    assert pytest.approx(81, abs=1) == 10**6 / 12_288
    assert flops.attention / flops.ffn == pytest.approx(10**6 / (4 * 12_288))
    assert flops.attention / flops.ffn == pytest.approx(20.3, abs=0.1)


def test_a_cache_of_100_000_tokens_is_50_gigabytes() -> None:
    arch = plain(layers=32, width=4096)
    cache = cache_bytes(arch, seq_len=100_000, dtype="float16")
    assert cache == 2 * 32 * 100_000 * 4096 * FP16
    assert cache / 10**9 == pytest.approx(52.4, abs=0.05)


def test_that_cache_is_larger_than_the_weights() -> None:
    llama = find_model("Llama 2 7B")
    assert cache_bytes(llama, seq_len=100_000, dtype="float16") > 3 * llama.parameters * FP16


def test_grouped_keys_replace_d_by_their_own_width() -> None:
    llama = find_model("Llama 3.1 8B")
    assert cache_bytes_per_token(llama) == 2 * 32 * (8 * 128) * FP16


@pytest.mark.parametrize("tokens", [1, 10, 1000])
def test_decoding_is_quadratic_with_a_cache_and_cubic_without(tokens: int) -> None:
    arch = plain(layers=2, width=256)
    per_pair = 2 * 4 * 256  # layers · flops per pair of query and key
    naive = sum(per_pair * t * t for t in range(1, tokens + 1))
    cached = sum(per_pair * t for t in range(1, tokens + 1))
    assert count_generation(arch, new_tokens=tokens, cached=False) == naive
    assert count_generation(arch, new_tokens=tokens) == cached
    assert cached == sum(count_decode(arch, past_len=t).attention for t in range(tokens))


def test_latents_shrink_the_cache_by_an_order_of_magnitude() -> None:
    deepseek, llama = find_model("DeepSeek-V3"), find_model("Llama 3.1 405B")
    assert cache_bytes_per_token(deepseek) == 61 * (512 + 64) * FP16 == 70_272
    assert cache_bytes_per_token(llama) == 126 * 2 * 8 * 128 * FP16 == 516_096
    assert pytest.approx(7.3, abs=0.05) == 516_096 / 70_272
    expanded = deepseek.layers * expanded_elements_per_token(deepseek) * FP16
    assert expanded / 70_272 == pytest.approx(71, abs=0.2)  # keys and values of every head


def test_a_prompt_of_200_000_tokens_takes_an_h100_tens_of_seconds() -> None:
    h100 = find_device("H100")
    small, large = (
        bound_prefill(find_model(name), h100, seq_len=200_000, skip_masked=True).seconds
        for name in ("Llama 3.1 8B", "Llama 3.1 70B")
    )
    assert 10 < small < large < 100


def test_gpt_3_had_2_thousand_tokens_and_deepseek_v3_has_128() -> None:
    assert find_model("GPT-3").context_len == 2 * 1024
    assert find_model("DeepSeek-V3").context_len == 128 * 1024
