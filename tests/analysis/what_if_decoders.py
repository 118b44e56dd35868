"""A small decoder that keeps K and V in several ways."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.run import Run

WIDTH, HEADS, LAYERS, BATCH = 32, 4, 3, 2
PROMPT, TOKENS = 40, 12
"""The longest cache holds ``PROMPT + TOKENS - 1`` tokens: what the last step makes is not kept."""


class Layer(nn.Module):
    """Attention with a cache of its own, and an MLP."""

    def __init__(self, cache: str, kv_heads: int) -> None:
        super().__init__()
        self.cache, self.kv_heads = cache, kv_heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * kv_heads * WIDTH // HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.kept: tuple[Tensor, Tensor] | None = None
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        new = x.shape[1]
        q = self.q(x).view(BATCH, new, HEADS, -1).transpose(1, 2)  # (B, H, Tq, D)
        k, v = (
            t.view(BATCH, new, self.kv_heads, -1).transpose(1, 2)  # (B, Hkv, Tq, D)
            for t in self.kv(x).chunk(2, -1)
        )
        k, v = self.remember(k, v)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=new > 1, enable_gqa=self.kv_heads < HEADS
        )
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))

    def remember(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.cache == "fixed":
            return self.write(k, v)
        if self.cache == "fp8":
            k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
        if self.kept is None:
            self.kept = k.contiguous(), v.contiguous()
        else:
            # One after the other, as caches do: the older K is gone before V is copied.
            older, self.kept = list(self.kept), None
            older[0] = torch.cat([older[0], k], dim=2)
            older[1] = torch.cat([older[1], v], dim=2)
            self.kept = older[0], older[1]
        k, v = self.kept
        return (k.float(), v.float()) if self.cache == "fp8" else (k, v)

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept is None:
            shape = (BATCH, self.kv_heads, PROMPT + TOKENS - 1, WIDTH // HEADS)
            self.kept = torch.zeros(shape), torch.zeros(shape)
        end = self.length + k.shape[2]
        for kept, new in zip(self.kept, (k, v), strict=True):
            kept[:, :, self.length : end].copy_(new)
        self.length = end
        return self.kept[0][:, :, :end], self.kept[1][:, :, :end]


def make_decoding(cache: str = "grown", kv_heads: int = HEADS) -> Callable[[], None]:
    """Return a function that reads a prompt and makes the tokens that follow it.

    Args:
        cache: ``"grown"`` by concatenation, of ``"fixed"`` length, or grown in ``"fp8"``.
        kv_heads: Heads of K and V.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(cache, kv_heads) for _ in range(LAYERS)))

    @torch.no_grad()
    def decode() -> None:
        x = torch.randn(BATCH, PROMPT, WIDTH)
        for _ in range(TOKENS):
            x = model(x)[:, -1:].contiguous()

    return decode


def record_decoding(directory: Path, *, cache: str = "grown", kv_heads: int = HEADS) -> Run:
    """Return the run of `make_decoding`."""
    decode = make_decoding(cache, kv_heads)
    with attnprof.trace(directory, samples_per_second=0) as tracer:
        decode()
    return tracer.run
