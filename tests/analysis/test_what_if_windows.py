"""Fused attention where attention is windowed, or its heads are computed apart: to the byte."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from attnprof.capture.workload import Step, record_workload

B, H, D, N, W = 2, 4, 8, 128, 16

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """Attention between two projections."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)  # (B, H, n, D) each
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).reshape(x.shape))


class Program(nn.Module):
    """Two layers with a mask of a window, which not all of them need."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(attend), Layer(attend)])

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=torch.bool).tril().triu(-W)
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


def write_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * D**-0.5).softmax(-1) @ v


def write_out_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * D**-0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def take_windows(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        starts = range(0, N, W)
        near = [slice(max(0, start - W), start + W) for start in starts]
        parts = [
            attend(q[:, :, start : start + W], k[:, :, keys], v[:, :, keys])
            for start, keys in zip(starts, near, strict=True)
        ]
        return torch.cat(parts, 2)

    return run


def take_heads(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        heads = [slice(head, head + 1) for head in range(H)]
        return torch.cat([attend(q[:, head], k[:, head], v[:, head]) for head in heads], 1)

    return run


def write_out_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (-1, W)) for t in (q, k, v))  # (B, H, n / W, W, D)
    return write_out(q, k, v).flatten(2, 3)


def fuse_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.reshape(B, -1, W, D) for t in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).view(B, H, N, D)


FUSED = functional.scaled_dot_product_attention
FORMS: dict[str, tuple[Attend, Attend]] = {
    "mask of a window": (write_out_masked, lambda q, k, v, mask: FUSED(q, k, v, attn_mask=mask)),
    "windows": (take_windows(write_out), take_windows(FUSED)),
    "blocks": (write_out_blocks, fuse_blocks),
    "heads apart": (take_heads(write_out), take_heads(FUSED)),
}


@pytest.mark.parametrize("name", FORMS)
def test_fused_attention_is_predicted(name: str) -> None:
    def make_with(attend: Attend) -> Callable[[int, str], Step]:
        def make_step(seq_len: int, device: str) -> Step:
            model, x = Program(attend), torch.randn(B, seq_len, H * D)
            return lambda: model(x).square().mean().backward()

        return make_step

    before, after = (record_workload(make_with(attend), N) for attend in FORMS[name])
    predicted = before.what_if("fused_attention")
    assert predicted.after.total_bytes == after.peak().total_bytes
    assert predicted.saves_bytes > 0.05 * before.peak().total_bytes
