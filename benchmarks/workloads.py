"""The programs that the benchmarks run."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Stack(nn.Module):
    """Encoder layers, one after the other."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, n, width) -> (B, n, width)
        """Run all layers."""
        for layer in self.layers:
            x = layer(x)
        return x


def make_toy(*, layers: int = 12, width: int = 16, optimize: bool = False) -> Callable[[], None]:
    """Return a step that does next to no arithmetic: what is left is the launching of ops.

    Args:
        layers: Layers of the model.
        width: Width of the model; it has two heads.
        optimize: Also take a step of AdamW, which is made of many small ops on a CPU.
    """
    torch.manual_seed(0)
    model = Stack(layers, width)
    optimizer = torch.optim.AdamW(model.parameters()) if optimize else None

    def step() -> None:
        x = torch.randn(2, 8, width)  # a new tensor each time, as from a data loader
        model(x).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return step


def make_gpt2(
    *, layers: int, width: int, heads: int, seq_len: int, batch: int, vocabulary: int
) -> Callable[[], None]:
    """Return a training step of GPT-2 with materialised attention and AdamW.

    The model is made from a configuration; nothing is downloaded.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=seq_len,
            vocab_size=vocabulary,
            attn_implementation="eager",
            loss_type="ForCausalLM",
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, vocabulary, (batch, seq_len))

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class NoOpMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # not annotated
    """A dispatch mode that does nothing: the least that seeing every op from Python costs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code alone, as attnprof does."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        return func(*args, **(kwargs or {}))


class CountingMode(NoOpMode):  # type: ignore[no-untyped-call]  # not annotated
    """A dispatch mode that counts ops."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the op and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_ops(step: Callable[[], None]) -> int:
    """Return how many ops one step runs."""
    mode = CountingMode()
    with mode:
        step()
    return mode.count
