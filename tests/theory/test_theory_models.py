"""Public models: their parameter counts add up, and transformers builds the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnprof.theory.architecture import Architecture, Experts
from attnprof.theory.config import parse_config, read_config
from attnprof.theory.models import MODELS, find_model

PUBLISHED = {
    # From the checkpoints' own counts, in which biases and norms are included.
    "GPT-2": 124_439_808,
    "GPT-2 Medium": 354_823_168,
    "GPT-2 Large": 774_030_080,
    "GPT-2 XL": 1_557_611_200,
    "Llama 2 7B": 6_738_415_616,
    "Llama 2 13B": 13_015_864_320,
    "Llama 2 70B": 68_976_648_192,
    "Llama 3.1 8B": 8_030_261_248,
    "Llama 3.1 70B": 70_553_706_496,
    "Llama 3.1 405B": 405_853_388_800,
    "Llama 3.2 1B": 1_235_814_400,
    "Llama 3.2 3B": 3_212_749_824,
    "Mistral 7B": 7_241_732_096,
    "Mixtral 8x7B": 46_702_792_704,
    "Gemma 2 2B": 2_614_341_888,
    "Gemma 2 9B": 9_241_705_984,
    "Gemma 2 27B": 27_227_128_320,
    "Gemma 3 1B": 999_885_952,
    "Qwen2.5 0.5B": 494_032_768,
    "Qwen2.5 7B": 7_615_616_512,
    "Qwen2.5 32B": 32_763_876_352,
    "Qwen2.5 72B": 72_706_203_648,
    "Qwen3 0.6B": 596_049_920,
    "Qwen3 8B": 8_190_735_360,
    "Qwen3 32B": 32_762_123_264,
    "Qwen3 30B-A3B": 30_532_122_624,
    "Qwen3 235B-A22B": 235_093_634_560,
    "DeepSeek-V3": 671_026_419_200,
}
ROUNDED = {
    # From papers and model cards, in billions; of Gemma 3 the text model alone.
    "GPT-3": 175.0,
    "Gemma 3 4B": 3.88,
    "Gemma 3 12B": 11.77,
    "Gemma 3 27B": 27.01,
    "gpt-oss 20B": 20.91,
    "gpt-oss 120B": 116.83,
    "DeepSeek-V2": 236.0,
}
ACTIVE = {
    # Billions per token, from papers and model cards.
    "Mixtral 8x7B": 12.9,
    "gpt-oss 20B": 3.61,
    "gpt-oss 120B": 5.13,
    "DeepSeek-V2": 21.0,
    "DeepSeek-V3": 37.0,
}

FAMILIES = [
    "Cohere", "Cohere2", "DeepseekV3", "Falcon", "GPT2", "GPTBigCode", "GPTJ", "GPTNeoX", "Gemma",
    "Gemma2", "Gemma3Text", "Glm4", "GptOss", "Granite", "Llama", "Mistral", "Mixtral", "OPT",
    "Olmo2", "Phi", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SmolLM3", "StableLm",
    "Starcoder2",
]  # fmt: skip
"""Families in transformers, each with its own names for the same things."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_add_up_to_the_checkpoint_within_0_2_percent(name: str) -> None:
    assert find_model(name).parameters == pytest.approx(PUBLISHED[name], rel=2e-3)
    assert find_model(name).parameters < PUBLISHED[name]  # biases and norms are left out


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_add_up_to_what_was_published_within_half_a_percent(name: str) -> None:
    assert find_model(name).parameters / 10**9 == pytest.approx(ROUNDED[name], rel=5e-3)


def test_every_model_is_held_against_something() -> None:
    assert {model.name for model in MODELS} == PUBLISHED.keys() | ROUNDED.keys()


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_those_published_within_2_percent(name: str) -> None:
    assert find_model(name).active_parameters / 10**9 == pytest.approx(ACTIVE[name], rel=0.02)


def test_every_model_says_where_its_shape_comes_from() -> None:
    assert all(model.source and model.context_len and not model.assumptions for model in MODELS)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gpt2", "GPT-2"),
        ("openai-community/gpt2-xl", "GPT-2 XL"),
        ("LLAMA_3.1_8B", "Llama 3.1 8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 8B"),
        ("mistralai/Mistral-7B-v0.1", "Mistral 7B"),
        ("google/gemma-2-9b-it", "Gemma 2 9B"),
        ("deepseek-ai/DeepSeek-R1", "DeepSeek-V3"),
    ],
)
def test_names_of_checkpoints_are_understood(name: str, model: str) -> None:
    assert find_model(name).name == model


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_is_found_by_its_own_name(model: Architecture) -> None:
    assert find_model(model.name) is model


def test_unknown_names_get_the_nearest_and_the_list() -> None:
    message = (
        r"no model named 'lama-3.1-8b'; did you mean Llama 3\.1 8B or .*\? known are GPT-2, .*, "
        r"DeepSeek-V3; for any other, give the path of its config\.json"
    )
    with pytest.raises(ValueError, match=message):
        find_model("lama-3.1-8b")


def test_a_version_of_another_shape_is_not_mistaken_for_the_first() -> None:
    with pytest.raises(ValueError, match=r"no model named 'Mistral-7B-v0\.3'"):
        find_model("Mistral-7B-v0.3")  # has no window any more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "x: layers must be at least 1, got 0"),
        ({"kv_heads": 3}, "x: 8 query heads cannot share 3 key heads evenly; expected a multiple"),
        ({"windowed_layers": 5, "window": 4}, "x: 5 of 4 layers have a window"),
        ({"windowed_layers": 2}, "x: windowed layers need a window of at least 1 token"),
    ],
)
def test_contradictions_are_refused(change: dict[str, int], message: str) -> None:
    shape: dict[str, Any] = {
        "layers": 4, "width": 64, "heads": 8, "kv_heads": 8, "head_dim": 8, "ffn_width": 256,
        "vocabulary": 100, "context_len": 64,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Architecture(name="x", **shape | change)


# Configs -----------------------------------------------------------------------------------------


def count_parameters(config: Any) -> int:
    """Return how many parameters transformers gives a model, without making any."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_any_family_give_the_parameters_that_transformers_builds(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")()
    parsed = parse_config(config.to_dict(), name=family)
    assert parsed.parameters == pytest.approx(count_parameters(config), rel=2e-3)
    assert parsed.layers == config.num_hidden_layers
    assert parsed.heads == config.num_attention_heads


@pytest.mark.parametrize(
    ("family", "layers"), [("Mistral", 32), ("Gemma2", 13), ("Gemma3Text", 22), ("GptOss", 18)]
)
def test_configs_tell_windowed_layers(family: str, layers: int) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")()
    parsed = parse_config(config.to_dict(), name=family)
    assert (parsed.windowed_layers, parsed.window) == (layers, config.sliding_window)


SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 100,
    "intermediate_size": 256, "max_position_embeddings": 512, "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip


def parse(**keys: Any) -> Architecture:
    return parse_config(SMALL | keys, name="small", source="small/config.json")


def test_what_a_config_does_not_say_is_listed() -> None:
    assert parse().assumptions == (
        "the FFN has two matrices: its activation is gelu, its norm LayerNorm",
        "positions are learned: no key speaks of rotary or ALiBi ones",
    )
    assert "the FFN has three matrices (gated)" in parse(rms_norm_eps=1e-6).assumptions[0]
    assert "the FFN is 4 times as wide" in parse(intermediate_size=None).assumptions[1]


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({}, 0),
        ({"sliding_window": 128}, 4),
        ({"sliding_window": 128, "use_sliding_window": False}, 0),
        ({"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1}, 3),
        ({"sliding_window": 128, "sliding_window_pattern": 2}, 2),
        ({"sliding_window": 128, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, 3),
    ],
)
def test_every_way_of_saying_which_layers_have_a_window(keys: dict[str, Any], layers: int) -> None:
    assert parse(**keys).windowed_layers == layers


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({"first_k_dense_replace": 1}, 1),
        ({"mlp_only_layers": [0, 3]}, 2),
        ({"decoder_sparse_step": 2}, 2),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}, 1),
    ],
)
def test_every_way_of_saying_which_layers_have_no_experts(keys: dict[str, Any], dense: int) -> None:
    parsed = parse(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=32, **keys)
    assert parsed.experts == Experts(16, 2, 32, dense_layers=dense)


def test_the_text_model_inside_a_multimodal_one_is_read() -> None:
    parsed = parse_config({"text_config": SMALL, "vision_config": {}}, name="both")
    assert parsed.width == 64
    assert "this is the model of text alone: what text_config describes" in parsed.assumptions


ENCODERS = (
    "Albert", "Bert", "CLIP", "CLIPText", "DebertaV2", "Electra", "MPNet", "ModernBert", "Roberta",
    "Siglip", "ViT", "Wav2Vec2",
)  # fmt: skip


@pytest.mark.parametrize("family", ENCODERS)
def test_configs_of_encoders_are_refused(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")()
    with pytest.raises(ValueError, match="give the config of a decoder-only Transformer"):
        parse_config(config.to_dict(), name=family)


def test_an_encoder_that_is_used_as_a_decoder_is_one() -> None:
    assert parse(type_vocab_size=2, is_decoder=True).width == 64


def test_heads_of_falcon_and_starcoder_share_one_key() -> None:
    assert parse(multi_query=True).kv_heads == 1


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"num_attention_heads": None}, "it has no num_attention_heads or n_head"),
        ({"intermediate_size": [1, 2]}, r"intermediate_size is \[1, 2\]; expected one whole"),
        ({"is_encoder_decoder": True}, "it is an encoder-decoder"),
        ({"layer_types": ["linear_attention"]}, "it has layers of kind linear_attention"),
        ({"mamba_d_state": 16}, r"some of its layers are no attention \(mamba_d_state\)"),
        ({"lru_width": 64}, r"some of its layers are no attention \(lru_width\)"),
        ({"head_dim": 12, "v_head_dim": 8}, r"its values differ in width from its keys \(v_head"),
        ({"per_layer_config": {"3": {}}}, "its layers differ in shape"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a number above 0"),
        ({"intermediate_size": -64}, "intermediate_size is -64; expected a number above 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; expected a number above"),
        ({"layer_types": 0}, "layer_types is 0; expected a list of words"),
        ({"layer_types": [4, 4]}, r"layer_types is \[4, 4\]; expected a list of words"),
        ({"text_config": -1}, "text_config is -1; expected an object"),
        ({"num_attention_heads": 7}, "its width 64 is no multiple of its 7 heads, and it has no"),
        ({"num_key_value_heads": 3}, "8 heads cannot share 3 key and value heads evenly"),
        ({"architectures": ["SomeForMaskedLM"]}, r"it is an encoder \(SomeForMaskedLM\)"),
        ({"type_vocab_size": 2, "is_decoder": False}, r"it is an encoder \(type_vocab_size\)"),
        ({"num_mel_bins": 80}, r"it is given images or sound \(num_mel_bins\)"),
    ],
)
def test_what_has_no_closed_form_is_refused(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"cannot use small/config.json: {problem}.*dry_run"):
        parse(**keys)


def test_a_directory_with_a_config_is_enough(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    parsed = read_config(folder)
    assert (parsed.name, parsed.layers) == ("my-model", 4)
    assert parsed == read_config(folder / "config.json")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("not json", "not JSON"), ("[1]", "expected an object"), (100_000 * "[", "not JSON")],
    ids=["text", "list", "nest"],
)
def test_files_that_are_no_config_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"cannot read {file}: {problem}"):
        read_config(file)
