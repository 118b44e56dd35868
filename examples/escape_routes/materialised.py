"""Materialised attention: the quadratic wall itself.

Every head of every layer writes an (n, n) matrix of scores and another of softmax results, and
autograd keeps the latter for backward: doubling n costs four times the memory.

Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762
"""

import torch
from small_model import Step, make_attention_step, show_growth
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal softmax attention, softmax(QKᵀ / √D) V."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, n, n)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def make_step(seq_len: int, device: str) -> Step:
    """Materialised softmax attention."""
    return make_attention_step(attend, seq_len, device)


if __name__ == "__main__":
    show_growth(make_step)
