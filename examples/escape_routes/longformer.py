"""Longformer: each token attends to a window around it, and a few tokens to everything.

Scores are (n, window + 1) in a band layout, linear in n. transformers builds them from overlapping
chunks, with several copies on the way.

`make_step` puts transformers' window attention into the small model of the other routes.
`make_public_step` is its whole model with global attention on the first token, and it is quadratic:
it builds an (n, n) mask, takes one row of it, and the row keeps the rest alive until forward has
ended. Which tokens are global is data there, so that a dry run cannot follow.

Beltagy et al., "Longformer: The Long-Document Transformer", 2020,
https://arxiv.org/abs/2004.05150
"""

import torch
from small_model import (
    BATCH,
    HEADS,
    LAYERS,
    REACH,
    VOCABULARY,
    WIDTH,
    Step,
    make_training_step,
    show_growth,
)
from torch import Tensor, nn
from transformers import LongformerConfig, LongformerForMaskedLM
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention


def _configure(seq_len: int) -> LongformerConfig:
    return LongformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_window=[REACH] * LAYERS,
        max_position_embeddings=seq_len + 2,  # positions are counted from the padding token's on
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class WindowAttention(nn.Module):
    """transformers' window attention, with nothing masked and nothing global."""

    def __init__(self, seq_len: int) -> None:
        super().__init__()
        self.attention = LongformerSelfAttention(_configure(seq_len), layer_id=0)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, width) -> (B, n, width)
        """Attend within the window; n must be a multiple of it."""
        unmasked = x.new_zeros(x.shape[:2])
        mixed = self.attention(
            x,
            attention_mask=unmasked,
            is_index_masked=unmasked.bool(),
            is_index_global_attn=None,
            is_global_attn=False,
        )
        return self.out(mixed[0])


def make_step(seq_len: int, device: str) -> Step:
    """Window attention in bands."""
    return make_training_step(lambda: WindowAttention(seq_len), seq_len, device)


def make_public_step(seq_len: int, device: str) -> Step:
    """Window attention and a global token, as transformers has it."""
    with torch.device(device):
        model = LongformerForMaskedLM(_configure(seq_len)).train()
        ids = torch.randint(2, VOCABULARY, (BATCH, seq_len))  # 1 is padding
        is_global = torch.zeros_like(ids)
        is_global[:, 0] = 1

    def step() -> None:
        model(input_ids=ids, labels=ids, global_attention_mask=is_global).loss.backward()
        model.zero_grad()

    return step


if __name__ == "__main__":
    show_growth(make_step, make_public_step)
