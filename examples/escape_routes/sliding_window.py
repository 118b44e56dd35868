"""Sliding-window attention: a window that is a mask saves nothing, one that skips blocks does.

- masked: Mistral with ``sliding_window``, written out. The window is an (n, n) mask over an (n, n)
  matrix of scores: exactly as quadratic as without it.
- masked SDPA: the same with the fused op. No scores, but the (n, n) mask is there, and the op wants
  it in floating point.
- blocked (`make_step`): queries in blocks, each against its own and the previous block of keys.
  Scores are (n, 2 · window): linear.

Jiang et al., "Mistral 7B", 2023, https://arxiv.org/abs/2310.06825; blocks as in the package
``local-attention``
"""

from local_attention import LocalAttention
from small_model import (
    HEADS,
    LAYERS,
    REACH,
    VOCABULARY,
    WIDTH,
    Attention,
    Step,
    make_training_step,
    make_transformers_step,
    show_growth,
)
from transformers import MistralConfig, MistralForCausalLM


def _make_mistral(attention: str, seq_len: int) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=seq_len,
        sliding_window=REACH,
        use_cache=False,
        attn_implementation=attention,
    )
    return MistralForCausalLM(config)


def make_step(seq_len: int, device: str) -> Step:
    """A window by blocks of keys; n must be a multiple of it."""
    return make_training_step(
        lambda: Attention(LocalAttention(REACH, causal=True, exact_windowsize=True)),
        seq_len,
        device,
    )


def make_masked_step(seq_len: int, device: str) -> Step:
    """A window by mask, scores written out."""
    return make_transformers_step(lambda: _make_mistral("eager", seq_len), seq_len, device)


def make_masked_sdpa_step(seq_len: int, device: str) -> Step:
    """A window by mask, fused attention."""
    return make_transformers_step(lambda: _make_mistral("sdpa", seq_len), seq_len, device)


if __name__ == "__main__":
    show_growth(make_step, make_masked_step, make_masked_sdpa_step)
