"""One small program in many forms: what one predicts can be measured in another."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.run import Run

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Form:
    """What the program is like; the defaults write everything out."""

    attention: str = "written"
    """``"written"``, ``"scaled"`` (Q is, before QKᵀ), ``"fused"``, ``"masked"`` (fused too)."""
    mask: str = "own"
    """``"own"``: every layer makes its own boolean one; ``"bool"`` or ``"float"``: one for all."""
    upcast: bool = False
    """Whether the softmax is taken in float32."""
    dropout: float = 0.0
    """On attention weights."""
    checkpoint: bool = False
    chunked: bool = False
    """Whether the cross entropy is torch's in chunks."""
    dtype: torch.dtype = torch.float32
    vocabulary: int = 50
    width: int = 32
    heads: int = 4
    layers: int = 3
    batch: int = 2
    length: int = 72


class Block(nn.Module):
    """Layer norm, attention, MLP."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        width = form.width
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.out(self.attend(self.first_norm(x), mask))
        return x + self.mlp(self.second_norm(x))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        form = self.form
        split = (*x.shape[:2], form.heads, form.width // form.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))  # (B, H, n, D)
        if mask is None and form.attention != "fused":
            mask = make_mask(x.shape[1])
        if form.attention == "fused":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif form.attention == "masked":
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            mixed = self.weigh(q, k, mask) @ v
        return mixed.transpose(1, 2).reshape(x.shape)

    def weigh(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        scale = q.shape[-1] ** -0.5
        if self.form.attention == "scaled":
            scores = (q * scale) @ k.transpose(-1, -2)
        else:
            scores = q @ k.transpose(-1, -2) * scale
        scores = scores.masked_fill(~mask, -torch.inf)
        if self.form.upcast:
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        else:
            weights = scores.softmax(-1)
        return functional.dropout(weights, self.form.dropout) if self.form.dropout else weights


def make_mask(length: int) -> Tensor:
    """Return the causal triangle, (n, n)."""
    return torch.ones(length, length, dtype=torch.bool).tril()


class Program(nn.Module):
    """A stack of blocks between an embedding and a head; its forward is its loss."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Embedding(form.vocabulary, form.width)
        self.blocks = nn.ModuleList(Block(form) for _ in range(form.layers))
        self.head = nn.Linear(form.width, form.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = self.share_mask(ids.shape[1], x.dtype)
        for block in self.blocks:
            if self.form.checkpoint:
                x = torch.utils.checkpoint.checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        x, ids = x.flatten(0, 1), ids.flatten()
        if self.form.chunked:
            options = nn.LinearCrossEntropyOptions()
            return functional.linear_cross_entropy(x, self.head.weight, ids, options=options)
        return functional.cross_entropy(self.head(x), ids)

    def share_mask(self, length: int, dtype: torch.dtype) -> Tensor | None:
        if self.form.mask == "own":
            return None
        mask = make_mask(length)
        if self.form.mask == "bool":
            return mask
        return torch.zeros(length, length, dtype=dtype).masked_fill_(~mask, -torch.inf)


def make_program(form: Form) -> tuple[Program, Callable[[], Tensor]]:
    """Return a program and a function that makes a batch for it."""
    torch.manual_seed(0)

    def make_batch() -> Tensor:
        return torch.randint(0, form.vocabulary, (form.batch, form.length))

    return Program(form).to(form.dtype), make_batch


def train(
    directory: Path,
    form: Form,
    *,
    steps: int = 2,
    make_optimizer: MakeOptimizer = torch.optim.AdamW,
    zeroing: str = "after",
) -> Run:
    """Return the run of a few training steps.

    Args:
        directory: Where the run is to be.
        form: What the program is like.
        steps: How many.
        make_optimizer: Makes the optimizer from the parameters.
        zeroing: Gradients are freed ``"after"`` the optimizer's step, ``"before"`` backward, or
            filled with ``"zeros"`` after the step.
    """
    program, make_batch = make_program(form)
    optimizer = make_optimizer(program.parameters())
    with attnprof.trace(directory, samples_per_second=0) as tracer:
        for _ in range(steps):
            loss = program(make_batch())
            if zeroing == "before":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if zeroing != "before":
                optimizer.zero_grad(set_to_none=zeroing == "after")
    return tracer.run


def evaluate(directory: Path, form: Form, *, with_gradients: bool = False) -> Run:
    """Return the run of one forward."""
    program, make_batch = make_program(form)
    tracing = attnprof.trace(directory, samples_per_second=0)
    with tracing as tracer, torch.set_grad_enabled(with_gradients):
        program(make_batch())
    return tracer.run
