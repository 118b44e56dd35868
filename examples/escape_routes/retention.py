"""RetNet: attention without softmax, with a decay per head, in three forms of one function.

- parallel: (QKᵀ ⊙ D) V with D_ij = gamma^(i−j). It trains like attention and costs like
  attention: the (n, n) matrix is there, quadratic.
- recurrent: S_i = gamma S_{i−1} + k_i v_iᵀ, o_i = q_i S_i. At inference one (D, D) state per head,
  whatever n is; in training autograd keeps the state of every token.
- chunkwise: parallel within chunks, recurrent between them. Linear, and the form to train with.

Left out: the rotation of Q and K by position, which works on each token alone.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023,
https://arxiv.org/abs/2307.08621
"""

from collections.abc import Callable

import torch
from small_model import (
    HEADS,
    REACH,
    WIDTH,
    Step,
    join_heads,
    make_training_step,
    show_growth,
    split_heads,
)
from torch import Tensor, nn
from torch.nn import functional

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From Q, K and V, each (B, H, n, D), and gamma per head, (H,), to retention, (B, H, n, D)."""


def decay_of_heads(heads: int = HEADS) -> Tensor:
    """Return gamma per head, as the paper sets it."""
    return 1 - 2.0 ** (-5 - torch.arange(heads))


def decay_matrix(length: int, decay: Tensor) -> Tensor:
    """Return D, (H, length, length): gamma^(i−j) where i ≥ j, else 0."""
    positions = torch.arange(length, device=decay.device)
    distance = (positions[:, None] - positions).clamp(min=0)
    return (decay[:, None, None] ** distance).tril()


def retain_parallel(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Return retention, all tokens at once."""
    weights = q @ k.transpose(-1, -2) * decay_matrix(q.shape[2], decay)  # (B, H, n, n)
    return weights @ v


def retain_recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Return the same, token by token."""
    state = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])  # (B, H, D, D)
    outputs = []
    for query, key, value in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        state = decay[:, None, None] * state + key.unsqueeze(-1) * value.unsqueeze(-2)
        outputs.append((query.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 2)


def retain_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *, chunk: int = REACH
) -> Tensor:
    """Return the same, chunk by chunk; n must be a multiple of ``chunk``."""
    positions = torch.arange(chunk, device=q.device)
    within = decay_matrix(chunk, decay)  # (H, C, C)
    since_start = decay[:, None, None] ** (positions[:, None] + 1)  # (H, C, 1)
    until_end = decay[:, None, None] ** (chunk - 1 - positions[:, None])  # (H, C, 1)
    over_chunk = decay[:, None, None] ** chunk  # (H, 1, 1)
    state = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])  # (B, H, D, D)
    outputs = []
    chunks = (t.split(chunk, 2) for t in (q, k, v))
    for queries, keys, values in zip(*chunks, strict=True):  # (B, H, C, D)
        inside = (queries @ keys.transpose(-1, -2) * within) @ values
        outputs.append(inside + queries @ state * since_start)
        state = over_chunk * state + (keys * until_end).transpose(-1, -2) @ values
    return torch.cat(outputs, 2)


class Retention(nn.Module):
    """Multi-scale retention: gamma differs between heads, heads are normalised, a gate follows."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("decay", decay_of_heads())

    def forward(self, x: Tensor) -> Tensor:  # (B, n, width) -> (B, n, width)
        """Project, retain, normalise, gate, project back."""
        q, k, v = split_heads(self.qkv(x))
        retained = self.form(q, k / k.shape[-1] ** 0.5, v, self.decay)
        normalised = functional.layer_norm(retained, retained.shape[-1:])
        return self.out(functional.silu(self.gate(x)) * join_heads(normalised))


def make_step(seq_len: int, device: str) -> Step:
    """Retention, chunkwise."""
    return make_training_step(lambda: Retention(retain_chunkwise), seq_len, device)


def make_parallel_step(seq_len: int, device: str) -> Step:
    """Retention in parallel: an (n, n) matrix."""
    return make_training_step(lambda: Retention(retain_parallel), seq_len, device)


def make_recurrent_step(seq_len: int, device: str) -> Step:
    """Retention token by token: autograd keeps a (D, D) state per token."""
    return make_training_step(lambda: Retention(retain_recurrent), seq_len, device)


if __name__ == "__main__":
    show_growth(make_step, make_parallel_step, make_recurrent_step)
