"""RWKV: attention as a recurrence over time, with an exponential decay per channel.

Each channel carries a numerator, a denominator and a maximum from token to token: the state does
not grow with n. In training autograd keeps what every token computed: linear. Without its CUDA
kernel transformers runs a Python loop over tokens, n times a dozen ops per layer, which is slow
and makes a dry run as long as n.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023,
https://arxiv.org/abs/2305.13048
"""

from small_model import LAYERS, VOCABULARY, WIDTH, Step, make_transformers_step, show_growth
from transformers import RwkvConfig, RwkvForCausalLM


def _make_model() -> RwkvForCausalLM:
    config = RwkvConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        use_cache=False,
    )
    return RwkvForCausalLM(config)


def make_step(seq_len: int, device: str) -> Step:
    """RWKV, token by token."""
    return make_transformers_step(_make_model, seq_len, device)


if __name__ == "__main__":
    show_growth(make_step)
