"""Models with random weights, at sizes that are trained, for ``gpu.py``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Step = Callable[[], None]


def make_step(
    kind: str, seq_len: int, device: str, *, dtype: str = "bf16", attention: str = "sdpa",
    tiny: bool = False, optimize: bool = True,
) -> Step:  # fmt: skip
    """Return one training step of a model on a batch of one.

    Args:
        kind: A key of `MODELS`.
        seq_len: Tokens; where the data has a length of its own it is not used.
        device: Where model and data go.
        dtype: ``"fp32"``, ``"bf16"``, or ``"autocast"`` for float32 weights under autocast.
        attention: transformers' ``attn_implementation``, where the model has a choice.
        tiny: A model too small to show anything, to try the benchmark out.
        optimize: Whether AdamW updates the weights.
    """
    with torch.device(device):
        model, inputs = MODELS[kind](seq_len, attention, tiny)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
        inputs = {
            k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()
        }
    optimizer = torch.optim.AdamW(model.parameters()) if optimize else None

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "autocast"):
            output = model(**inputs)
            loss = getattr(output, "loss", None)
            loss = output[0].float().square().mean() if loss is None else loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return step


def make_gpt2(seq_len: int, attention: str, tiny: bool) -> tuple[nn.Module, dict[str, Any]]:
    """GPT-2 medium: 24 layers, 355 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = (64, 2, 4) if tiny else (1024, 24, 16)
    config = GPT2Config(
        n_embd=size[0], n_layer=size[1], n_head=size[2], n_positions=seq_len, attn_pdrop=0.0,
        attn_implementation=attention, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(config.vocab_size, (1, seq_len))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def make_llama(seq_len: int, attention: str, tiny: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A Llama of Llama 3.2 1B's shape: 1.2 billion parameters, 32 heads that share 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv_heads = (64, 128, 2, 4, 2) if tiny else (2048, 8192, 16, 32, 8)
    config = LlamaConfig(
        vocab_size=1000 if tiny else 128_256, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=seq_len, tie_word_embeddings=True, use_cache=False,
        attn_implementation=attention,
    )  # fmt: skip
    tokens = torch.randint(config.vocab_size, (1, seq_len))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def make_bert(seq_len: int, attention: str, tiny: bool) -> tuple[nn.Module, dict[str, Any]]:
    """BERT base."""
    from transformers import BertConfig, BertModel

    size = (64, 2, 4, 128) if tiny else (768, 12, 12, 3072)
    config = BertConfig(
        hidden_size=size[0], num_hidden_layers=size[1], num_attention_heads=size[2],
        intermediate_size=size[3], max_position_embeddings=seq_len, attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config), {"input_ids": torch.randint(config.vocab_size, (1, seq_len))}


def make_vit(seq_len: int, attention: str, tiny: bool) -> tuple[nn.Module, dict[str, Any]]:
    """ViT base on one picture of 224 × 224: 197 tokens."""
    from transformers import ViTConfig, ViTModel

    size = (64, 2, 4, 128) if tiny else (768, 12, 12, 3072)
    config = ViTConfig(
        hidden_size=size[0], num_hidden_layers=size[1], num_attention_heads=size[2],
        intermediate_size=size[3], attn_implementation=attention,
    )  # fmt: skip
    return ViTModel(config), {"pixel_values": torch.rand(1, 3, 224, 224)}


def make_mamba(seq_len: int, attention: str, tiny: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Mamba, with the scan written out in PyTorch: four layers, short sequences."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=1000, hidden_size=64 if tiny else 768, num_hidden_layers=2 if tiny else 4,
        use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(config.vocab_size, (1, min(seq_len, 64)))
    return MambaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


MODELS = {
    "gpt2": make_gpt2,
    "llama": make_llama,
    "bert": make_bert,
    "vit": make_vit,
    "mamba": make_mamba,
}
