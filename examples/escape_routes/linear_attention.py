"""Linear attention: φ(x) = elu(x) + 1 instead of softmax, and sums over the past instead of scores.

Token i needs S_i = Σ_{j≤i} φ(k_j) v_jᵀ, a (D, D) matrix. Two ways to get there:

- cumulative: `cumsum` writes every S_i. Linear in n with D² numbers a token, where materialised
  attention writes n: fewer only once n passes D², give or take the number of copies.
- chunked: S at chunk borders only, and a small (C, C) score matrix inside each chunk: C + D²/C
  numbers a token, which is what fused kernels do.

Katharopoulos et al., "Transformers are RNNs", 2020, https://arxiv.org/abs/2006.16236; chunks as in
Yang et al., "Gated Linear Attention", 2023, https://arxiv.org/abs/2312.06635
"""

from small_model import REACH, Step, make_attention_step, show_growth
from torch import Tensor
from torch.nn import functional


def attend_cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal linear attention by cumulative sums."""
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)  # (B, H, n, D, D)
    norms = (q * k.cumsum(2)).sum(-1, keepdim=True)  # (B, H, n, 1)
    return (q.unsqueeze(-2) @ states).squeeze(-2) / norms


def attend_chunked(q: Tensor, k: Tensor, v: Tensor, *, chunk: int = REACH) -> Tensor:
    """Return the same, chunk by chunk; n must be a multiple of ``chunk``."""
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    v = functional.pad(v, (0, 1), value=1.0)  # a column of ones adds up to the normaliser
    q, k, v = (t.unflatten(2, (-1, chunk)) for t in (q, k, v))  # (B, H, n/C, C, D)
    sums = (k.transpose(-1, -2) @ v).cumsum(2)  # (B, H, n/C, D, D + 1)
    before = functional.pad(sums[:, :, :-1], (0, 0, 0, 0, 1, 0))  # what lies before each chunk
    inside = (q @ k.transpose(-1, -2)).tril() @ v  # (B, H, n/C, C, C) @ (B, H, n/C, C, D + 1)
    mixed = (inside + q @ before).flatten(2, 3)
    return mixed[..., :-1] / mixed[..., -1:]


def make_step(seq_len: int, device: str) -> Step:
    """Linear attention in chunks."""
    return make_attention_step(attend_chunked, seq_len, device)


def make_cumulative_step(seq_len: int, device: str) -> Step:
    """Linear attention that writes a (D, D) state per token."""
    return make_attention_step(attend_cumulative, seq_len, device)


if __name__ == "__main__":
    show_growth(make_step, make_cumulative_step)
