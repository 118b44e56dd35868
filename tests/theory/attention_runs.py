"""Real attention on the CPU, traced by attnprof: what theory is held against."""

from collections.abc import Callable, Iterable
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.run import Run
from attnprof.vocabulary import Category

BATCH, HEADS, HEAD_DIM, LENGTH = 2, 4, 12, 40
WIDTH = HEADS * HEAD_DIM
BETWEEN_PRODUCTS = (Category.ATTENTION_SCORES, Category.SOFTMAX, Category.ATTENTION_MASK)
"""The categories of everything between QKᵀ and PV."""

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Projections around ``mix``, which is given Q (B, H, n, D) and K, V (B, Hkv, n, D)."""

    def __init__(self, mix: Mix, *, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.mix = mix
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, kv_heads * HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return x + self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


def trace_attention(
    mix: Mix,
    *,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    batch: int = BATCH,
    length: int = LENGTH,
    kv_heads: int = HEADS,
) -> Run:
    """Trace one layer, forward and (in training) backward."""
    model = nn.Sequential(Attention(mix, kv_heads=kv_heads)).to(dtype)
    x = torch.randn(batch, length, WIDTH, dtype=dtype)
    with attnprof.trace(samples_per_second=0) as tracer, torch.set_grad_enabled(training):
        output = model(x)
        if training:
            output.float().square().mean().backward()
    return tracer.run


def peak_of(run: Run, phase: str, categories: Iterable[Category] = BETWEEN_PRODUCTS) -> int:
    """Return the most bytes of some categories live at an allocation of a phase."""
    blocks = run.attribution.allocations.filter(
        pl.col("category").cast(pl.String).is_in([c.value for c in categories])
    )
    instants = blocks.filter(pl.col("phase").cast(pl.String) == phase)["start"].to_list()
    live = [
        int(blocks.filter((pl.col("start") <= at) & (pl.col("end") > at))["size_bytes"].sum())
        for at in instants
    ]
    return max(live, default=0)


def saved_bytes(run: Run, *categories: Category, layer: str = "") -> int:
    """Return the bytes that autograd kept, of some categories (or all) and a layer's modules."""
    kept = run.allocations.filter(
        pl.col("saved")
        & (pl.col("phase").cast(pl.String) == "forward")
        & pl.col("layer").cast(pl.String).str.starts_with(layer)
    )
    if categories:
        wanted = [category.value for category in categories]
        kept = kept.filter(pl.col("category").cast(pl.String).is_in(wanted))
    return int(kept["size_bytes"].sum())


def row_of(run: Run) -> dict[str, Any]:
    """Return what is said of the only attention layer."""
    layers = run.layers()
    assert layers.height == 1, layers
    return layers.row(0, named=True)


def scale(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5


def hide_future(length: int, dtype: torch.dtype) -> Tensor:
    """Return an additive causal mask, as transformers makes it."""
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)


def see_past(length: int) -> Tensor:
    """Return a bool causal mask: true where a key may be seen."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def materialise(*, dropout: float = 0.0, causal: bool = True) -> Mix:
    """Attention as everyone writes it, in the dtype of its inputs."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scale(q, k)
        if causal:
            past = see_past(q.shape[-2])
            scores = scores.masked_fill(~past, -torch.inf)
        scores = scores.softmax(-1)
        return functional.dropout(scores, dropout, dropout > 0) @ v

    return mix


def soften_in_float32(*, masked: bool = False, dropout: float = 0.0) -> Mix:
    """The eager attention of transformers: an additive mask, the softmax in float32."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = hide_future(q.shape[-2], q.dtype) if masked else None
        weights = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        if mask is not None:
            weights = weights + mask
        weights = functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return functional.dropout(weights, dropout, dropout > 0) @ v

    return mix


def call_sdpa(backend: Any, **options: Any) -> Mix:
    """``F.scaled_dot_product_attention`` with one backend."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, **options)

    return mix
