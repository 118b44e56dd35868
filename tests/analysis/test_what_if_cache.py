"""The KV cache in other forms: predicted from one that grows by concatenation."""

from pathlib import Path
from typing import Any

import pytest
from what_if_decoders import (
    BATCH,
    HEADS,
    LAYERS,
    PROMPT,
    TOKENS,
    WIDTH,
    make_decoding,
    record_decoding,
)

from attnprof.analysis.what_if.advice import WhatIf
from attnprof.capture.dry_run import dry_run
from attnprof.run import Run
from tests.versions import needs_fused_groups

PER_TOKEN = 4 * 2 * BATCH * WIDTH * LAYERS
"""Bytes of K and V of one token in all layers, in float32."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record_decoding(tmp_path_factory.mktemp("cache") / "grown")


def count_cache(what_if: WhatIf) -> int:
    return what_if.after.by_category()["kv_cache"]


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        ({"scenario": "cache_static"}, {"cache": "fixed"}),
        ({"scenario": "cache_fp8"}, {"cache": "fp8"}),
        pytest.param({"kv_heads": 1}, {"kv_heads": 1}, marks=needs_fused_groups),
        pytest.param({"kv_heads": 2}, {"kv_heads": 2}, marks=needs_fused_groups),
    ],
)
def test_other_caches_are_predicted(
    grown: Run, tmp_path: Path, arguments: dict[str, Any], form: dict[str, Any]
) -> None:
    scenarios = [arguments.pop("scenario")] if "scenario" in arguments else []
    predicted = grown.what_if(*scenarios, **arguments).after
    assert predicted.total_bytes == record_decoding(tmp_path / "run", **form).peak().total_bytes


def test_four_bits_take_four_and_a_half(grown: Run) -> None:
    # Per 64 elements a scale and a zero point of 16 bits each. The peak is in the prompt.
    predicted = count_cache(grown.what_if("cache_int4"))
    assert predicted == PROMPT * PER_TOKEN // 4 * (4 + 2 * 16 / 64) / 8


def test_pages_are_full_but_for_the_last(grown: Run) -> None:
    what_if = grown.what_if("cache_paged")
    assert count_cache(what_if) == 48 * PER_TOKEN  # three pages of 16 for 40 tokens
    assert f"{2 * LAYERS * (TOKENS - 1)} times they were copied" in what_if.changes[0].evidence


def test_a_latent_takes_its_share_of_the_elements(grown: Run) -> None:
    predicted = count_cache(grown.what_if(latent_dim=16))
    assert predicted == PROMPT * PER_TOKEN * 16 // (2 * WIDTH)


def test_a_latent_must_be_smaller_than_what_it_replaces(grown: Run) -> None:
    with pytest.raises(ValueError, match="no layer keeps more than 64 elements per token"):
        grown.what_if(latent_dim=2 * WIDTH)


def test_an_offloaded_cache_leaves_two_layers_on_the_gpu(tmp_path: Path) -> None:
    run = dry_run(
        lambda seq_len, device: make_decoding(), PROMPT, target="cuda", directory=tmp_path / "run"
    )
    before, after = run.peak().by_layer(), run.what_if("cache_offload").after.by_layer()
    layers = [
        set(peak.filter(peak["category"] == "kv_cache")["layer"].to_list())
        for peak in (before, after)
    ]
    assert len(layers[0]) == LAYERS
    assert len(layers[1]) == 2


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("cache_offload", "the KV cache is in host memory already"),
        ("cache_static_masked", "attention is fused and reads the cache where it lies"),
        ("checkpointing", "no backward was recorded"),
        ("fused_attention", "no layer materialises scores: attention is fused"),
        ("optimizer_8bit", "no float32 optimizer state has 4096 elements or more"),
    ],
)
def test_what_does_not_apply_says_why(grown: Run, scenario: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{scenario} does not apply to this run: {reason}"):
        grown.what_if(scenario)


def test_a_fixed_cache_is_not_replaced_by_one(tmp_path: Path) -> None:
    run = record_decoding(tmp_path / "run", cache="fixed")
    for scenario in ("cache_static", "cache_static_masked", "cache_paged"):
        with pytest.raises(ValueError, match="it is in place already"):
            run.what_if(scenario)


def test_a_cache_of_one_byte_is_small_enough(tmp_path: Path) -> None:
    run = record_decoding(tmp_path / "run", cache="fp8")
    with pytest.raises(ValueError, match="at most one byte per element already"):
        run.what_if("cache_int4")


def test_more_heads_than_there_are_are_refused(grown: Run) -> None:
    with pytest.raises(ValueError, match=rf"key/value heads are now {HEADS} of {HEADS}"):
        grown.what_if(kv_heads=HEADS)


def test_a_decoding_run_is_not_stretched(grown: Run) -> None:
    with pytest.raises(ValueError, match="decodes token by token"):
        grown.what_if(seq_len=4096)
