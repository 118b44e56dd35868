"""FlashAttention, through `scaled_dot_product_attention`: the same result in linear memory.

One op computes exact attention tile by tile. It keeps the output and a log-sum-exp per row, both
linear in n, and backward recomputes the scores: compute stays quadratic, memory does not. With a
mask handed in, the kernel is fused all the same and memory is quadratic again: the mask is (n, n),
and the op keeps it for backward. ``is_causal=True`` says the same without one.

Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022,
https://arxiv.org/abs/2205.14135
"""

import torch
from small_model import Step, make_attention_step, show_growth
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal softmax attention, computed by one op."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same by the same op, with the causal mask written out."""
    past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return scaled_dot_product_attention(q, k, v, attn_mask=past)


def make_step(seq_len: int, device: str) -> Step:
    """Fused softmax attention."""
    return make_attention_step(attend, seq_len, device)


def make_masked_step(seq_len: int, device: str) -> Step:
    """Fused softmax attention with an (n, n) mask."""
    return make_attention_step(attend_with_mask, seq_len, device)


if __name__ == "__main__":
    show_growth(make_step, make_masked_step)
