"""Mamba: a state-space model whose state update depends on the token.

No scores at all. Each of 2 · width channels carries N numbers of state; the path without CUDA
kernels writes the discretised matrices for every token, 2 · width · N numbers each, and then loops
over tokens in Python. Linear in n, with a large constant; the fused kernel keeps the states out of
memory and recomputes them in backward.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
https://arxiv.org/abs/2312.00752
"""

from small_model import LAYERS, VOCABULARY, WIDTH, Step, make_transformers_step, show_growth
from transformers import MambaConfig, MambaForCausalLM


def _make_model() -> MambaForCausalLM:
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=16,
        num_hidden_layers=LAYERS,
        use_cache=False,
    )
    return MambaForCausalLM(config)


def make_step(seq_len: int, device: str) -> Step:
    """Mamba's selective scan, token by token."""
    return make_transformers_step(_make_model, seq_len, device)


if __name__ == "__main__":
    show_growth(make_step)
