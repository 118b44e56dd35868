"""A small real GPT-2 at any length, for the tests that run inside the tests of the plugin."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

Run = Callable[..., pytest.RunResult]
"""What the fixtures ``run`` and ``run_apart`` are."""

BATCH, LAYERS, HEADS, WIDTH, VOCABULARY = 2, 2, 4, 32, 61


def make_gpt2(
    attention: str = "eager", *, dropout: float = 0.0, positions: int = 1024
) -> nn.Module:
    """Return a GPT-2 in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=positions, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        attn_pdrop=dropout, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def train(model: nn.Module, seq_len: int) -> None:
    """Run one forward and backward on a batch of the given length."""
    ids = torch.zeros(BATCH, seq_len, dtype=torch.int64)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def make_step(seq_len: int, device: str) -> Callable[[], None]:
    """Build a materialised GPT-2 for a length; for markers and for `attnprof.sweep`."""
    model = make_gpt2(positions=seq_len).to(device)
    return lambda: train(model, seq_len)
