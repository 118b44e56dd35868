"""Read an architecture from the ``config.json`` that Hugging Face models come with.

Keys are looked up by what they mean, under every name in common use, and never by model. What a
config does not say is inferred from what it does say, and listed in `Architecture.assumptions`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnprof.theory.architecture import Architecture, Experts, Latent

_WINDOWED = ("sliding_attention",)
_LAYER_KINDS = ("full_attention", "attention", *_WINDOWED)
_STATE_SPACE_PREFIXES = ("mamba_", "ssm_", "rwkv_", "lru_", "chunkwise_")
"""Beginnings of keys that only layers with a state have; the last is of xLSTM's kernels."""
_GATED_ACTIVATIONS = ("silu", "swish", "swiglu", "geglu", "reglu")
_ENCODER_KEYS = (
    "type_vocab_size", "type_vocab_sizes", "mask_token_id", "sparse_prediction",
    "relative_attention", "relative_attention_num_buckets", "projection_dim", "projection_size",
)  # fmt: skip
"""Keys of models whose tokens all see each other: pairs of sentences, tokens to be guessed, one
vector for all of the text. No decoder among transformers' configurations has any."""
_PAIR_KEYS = ("logit_scale_init_value", "temperature_init_value")
"""Keys of two encoders that are trained to agree."""
_SENSOR_KEYS = ("num_channels", "conv_dim", "num_mel_bins")
"""Keys of models that are given images or sound in place of tokens."""
_POSITION_KEYS = (
    "rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct", "rotary_emb_base",
    "partial_rotary_factor", "alibi",
)  # fmt: skip


def read_config(path: str | Path) -> Architecture:
    """Return the architecture that a ``config.json``, or the one in a directory, describes.

    Raises:
        ValueError: The file is not such a config, lacks something that nothing else tells, or
            describes layers that theory has no closed form for.
        OSError: The file cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        file /= "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot read {file}: not JSON ({error}); expected a model's config"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"cannot read {file}: expected an object with a model's sizes")
    own_name = file.resolve().parent.name if file.name == "config.json" else file.stem
    name = config.get("_name_or_path") or own_name
    return parse_config(config, name=str(name), source=str(file))


def parse_config(config: Mapping[str, Any], *, name: str, source: str = "") -> Architecture:
    """Return the architecture that a config's keys describe.

    Args:
        config: The keys, as in ``config.json``. Those of ``text_config`` win over the others.
        name: What to call it.
        source: Where the config comes from.

    Raises:
        ValueError: See `read_config`.
    """
    keys = _Keys(config, source or name)
    keys.refuse_what_has_no_form()
    keys.refuse_encoders()
    width = keys.number("hidden_size", "n_embd", "d_model")
    heads = keys.number("num_attention_heads", "n_head", "n_heads", "num_heads")
    layers = keys.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    context = keys.find_size("max_position_embeddings", "n_positions", "n_ctx", "model_max_length")
    gated = keys.is_ffn_gated()
    windowed_layers = keys.count_windowed(layers)
    latent = keys.find_latent()
    head_dim = keys.find_size("head_dim")
    if head_dim is None and latent is None and width % heads:
        raise keys.error(
            f"its width {width} is no multiple of its {heads} heads, and it has no head_dim"
        )
    return Architecture(
        name=name,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=keys.count_kv_heads(heads),
        head_dim=head_dim or width // heads,
        ffn_width=keys.find_ffn_width(width),
        vocabulary=keys.number("vocab_size"),
        context_len=context,
        ffn_gated=gated,
        rms_norm=keys.has_rms_norm(),
        tied_embeddings=bool(keys.get("tie_word_embeddings", True)),
        learned_positions=keys.count_positions(context),
        window=keys.find("sliding_window") if windowed_layers else None,
        windowed_layers=windowed_layers,
        latent=latent,
        experts=keys.find_experts(layers),
        source=source,
        assumptions=tuple(keys.assumptions),
    )


class _Keys:
    """The keys of one config, and what had to be assumed on reading them."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.source = source
        self.assumptions: list[str] = []
        self.config = config
        own = self.get("text_config", {})
        if not isinstance(own, Mapping):
            raise self.error(f"text_config is {own!r}; expected an object with a model's sizes")
        self._own = own or config  # the keys that the text model has to itself
        self.config = {**config, **own}
        if own:
            self.assumptions.append("this is the model of text alone: what text_config describes")

    def get(self, key: str, default: object = None) -> Any:
        found = self.config.get(key)
        return default if found is None else found

    def find(self, *names: str) -> int | None:
        """Return the first of some keys that has a whole number."""
        for name in names:
            found = self.get(name)
            if isinstance(found, int) and not isinstance(found, bool):
                return found
            if found is not None:
                raise self.error(f"{name} is {found!r}; expected one whole number for all layers")
        return None

    def find_size(self, *names: str) -> int | None:
        """Return the first of some keys that has a number above 0."""
        found = self.find(*names)
        if found is not None and found < 1:
            name = next(name for name in names if self.get(name) is not None)
            raise self.error(f"{name} is {found}; expected a number above 0")
        return found

    def number(self, *names: str) -> int:
        found = self.find_size(*names)
        if found is None:
            raise self.error(f"it has no {' or '.join(names)}")
        return found

    def list_words(self, key: str) -> tuple[str, ...]:
        """Return the words that a key lists, one per layer; none if it is not there."""
        found = self.get(key, ())
        if not isinstance(found, list | tuple) or not all(isinstance(w, str) for w in found):
            raise self.error(f"{key} is {found!r}; expected a list of words")
        return tuple(found)

    def error(self, problem: str) -> ValueError:
        return ValueError(
            f"cannot use {self.source}: {problem}; give the config of a decoder-only Transformer, "
            "or measure the model with attnprof.dry_run"
        )

    def refuse_what_has_no_form(self) -> None:
        if self.get("is_encoder_decoder"):
            raise self.error("it is an encoder-decoder")
        if self.get("per_layer_config"):
            raise self.error("its layers differ in shape (per_layer_config)")
        if states := sorted(k for k in self.config if k.startswith(_STATE_SPACE_PREFIXES)):
            raise self.error(f"some of its layers are no attention ({states[0]})")
        value_dim = self.find("v_head_dim")
        if value_dim not in (None, self.find("head_dim")) and self.find("kv_lora_rank") is None:
            raise self.error(f"its values differ in width from its keys (v_head_dim={value_dim})")
        kinds = {*self.list_words("layer_types"), *self.list_words("layers_block_type")}
        if unknown := sorted(kinds - set(_LAYER_KINDS)):
            raise self.error(f"it has layers of kind {', '.join(unknown)}")

    def refuse_encoders(self) -> None:
        """Refuse what has no cache: every token is there from the beginning."""
        if any(name.endswith("ForMaskedLM") for name in self.list_words("architectures")):
            raise self.error(f"it is an encoder ({', '.join(self.list_words('architectures'))})")
        if pairs := [key for key in _PAIR_KEYS if self.get(key) is not None]:
            raise self.error(f"it is a pair of encoders ({pairs[0]})")
        if sensors := [key for key in _SENSOR_KEYS if self._own.get(key) is not None]:
            raise self.error(f"it is given images or sound ({sensors[0]})")
        signs = [key for key in _ENCODER_KEYS if self._own.get(key) is not None]
        if signs and self.get("is_decoder") is not True:
            raise self.error(f"it is an encoder ({signs[0]})")

    def count_kv_heads(self, heads: int) -> int:
        if self.get("multi_query") and not self.get("new_decoder_architecture"):
            return 1
        found = self.find_size("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
        if heads % found:
            raise self.error(f"{heads} heads cannot share {found} key and value heads evenly")
        return found

    def find_ffn_width(self, width: int) -> int:
        found = self.find_size("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
        if found is None:
            self.assumptions.append("the FFN is 4 times as wide as the model: no key gives a width")
        return found or 4 * width

    def is_ffn_gated(self) -> bool:
        """Tell SwiGLU and its like (three matrices) from the older FFN of two.

        No key says it. Gated FFNs came with SiLU and with RMS norm; ungated ones have LayerNorm.
        """
        activation = next(
            (str(self.get(key)) for key in
             ("hidden_act", "hidden_activation", "activation_function", "activation")
             if self.get(key)), "unknown",
        )  # fmt: skip
        norm = "RMS norm" if self.has_rms_norm() else "LayerNorm"
        gated = activation in _GATED_ACTIVATIONS or self.has_rms_norm()
        self.assumptions.append(
            f"the FFN has {'three matrices (gated)' if gated else 'two matrices'}: "
            f"its activation is {activation}, its norm {norm}"
        )
        return gated

    def has_rms_norm(self) -> bool:
        return self.get("rms_norm_eps") is not None

    def count_positions(self, context: int | None) -> int:
        if self.has_rms_norm() or any(key in self.config for key in _POSITION_KEYS):
            return 0
        self.assumptions.append("positions are learned: no key speaks of rotary or ALiBi ones")
        return context or 0

    def count_windowed(self, layers: int) -> int:
        """Return how many layers see a sliding window only."""
        if self.get("use_sliding_window") is False or self.find("sliding_window") is None:
            return 0
        if kinds := self.list_words("layer_types"):
            return sum(kind in _WINDOWED for kind in kinds)
        pattern = self.find_size("sliding_window_pattern", "_sliding_window_pattern")
        if pattern is not None:  # every so many layers, one sees everything
            return layers - layers // pattern
        if self.get("use_sliding_window"):
            return layers - min(layers, self.find("max_window_layers") or 0)
        self.assumptions.append("every layer has the window: no key names those that have not")
        return layers

    def find_latent(self) -> Latent | None:
        rank = self.find("kv_lora_rank")
        if rank is None:
            return None
        return Latent(
            kv_rank=rank,
            rope_dim=self.number("qk_rope_head_dim"),
            nope_dim=self.number("qk_nope_head_dim"),
            value_dim=self.number("v_head_dim"),
            query_rank=self.find("q_lora_rank"),
        )

    def find_experts(self, layers: int) -> Experts | None:
        count = self.find("num_local_experts", "n_routed_experts", "num_experts")
        if count is None or count < 2:
            return None
        width = self.number("moe_intermediate_size", "intermediate_size")
        shared = self.find("n_shared_experts", "num_shared_experts") or 0
        return Experts(
            count=count,
            active=self.number("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
            width=width,
            shared_width=self.find("shared_expert_intermediate_size") or shared * width,
            dense_layers=self._count_dense(layers),
        )

    def _count_dense(self, layers: int) -> int:
        """Return how many layers have an ordinary FFN among those with experts."""
        if kinds := self.list_words("mlp_layer_types"):
            return sum(kind == "dense" for kind in kinds)
        sparse_step = self.find("decoder_sparse_step") or 1
        dense = set(self.get("mlp_only_layers", ()))
        dense |= set(range(self.find("first_k_dense_replace") or 0))
        dense |= {layer for layer in range(layers) if (layer + 1) % sparse_step}
        return len(dense)
