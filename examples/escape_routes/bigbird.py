"""BigBird: for every block of queries a window, two global and three random blocks of keys.

Eight blocks of keys meet a block of queries, whatever n is; only the first and the last block of
queries attend to everything. Both are linear in n.

`make_step` is written from the paper. `make_public_step` is transformers' model, and it is
quadratic: it computes block by block, and then assembles an (n, n) matrix of all weights in each
layer, whether anybody asked for it or not. Under 2 · (2 + 3 + 3) − 5 blocks it does not even do
the former, but attends to everything.

Zaheer et al., "Big Bird: Transformers for Longer Sequences", 2020,
https://arxiv.org/abs/2007.14062
"""

import random

import torch
from small_model import (
    HEADS,
    LAYERS,
    REACH,
    VOCABULARY,
    WIDTH,
    Attention,
    Step,
    make_training_step,
    make_transformers_step,
    show_growth,
)
from torch import Tensor
from transformers import BigBirdConfig, BigBirdForMaskedLM

KEY_BLOCKS = 8
"""Blocks of keys per block of queries: three in the window, two global, three random."""
BLOCK = REACH // KEY_BLOCKS
"""Tokens per block."""


def plan_blocks(blocks: int) -> Tensor:
    """Return which blocks of keys all blocks of queries but the first and last meet."""
    plan = []
    for block in range(1, blocks - 1):
        met = {0, blocks - 1, block - 1, block, block + 1}
        while len(met) < KEY_BLOCKS:
            met.add(random.randrange(blocks))
        plan.append(sorted(met))
    return torch.tensor(plan)  # (n/b − 2, 8)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax attention of every query to every key given."""
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


class BlockSparseAttention(Attention):
    """Attention by blocks; n must be a multiple of `BLOCK` and at least eight of them."""

    def __init__(self, seq_len: int) -> None:
        super().__init__(self.attend_blocks)
        self.register_buffer("plan", plan_blocks(seq_len // BLOCK))

    def attend_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return block-sparse attention."""
        blocks = q.unflatten(2, (-1, BLOCK))  # (B, H, n/b, b, D)
        met_k, met_v = (
            t.unflatten(2, (-1, BLOCK))[:, :, self.plan].flatten(3, 4) for t in (k, v)
        )  # (B, H, n/b − 2, 8 · b, D)
        middle = attend(blocks[:, :, 1:-1], met_k, met_v).flatten(2, 3)
        first, last = attend(q[:, :, :BLOCK], k, v), attend(q[:, :, -BLOCK:], k, v)
        return torch.cat([first, middle, last], 2)


def make_step(seq_len: int, device: str) -> Step:
    """Block-sparse attention."""
    return make_training_step(lambda: BlockSparseAttention(seq_len), seq_len, device)


def make_public_step(seq_len: int, device: str) -> Step:
    """Block-sparse attention as transformers has it."""
    config = BigBirdConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=seq_len,
        block_size=BLOCK,
        num_random_blocks=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return make_transformers_step(lambda: BigBirdForMaskedLM(config), seq_len, device)


if __name__ == "__main__":
    show_growth(make_step, make_public_step)
