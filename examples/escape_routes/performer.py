"""Performer: replace the softmax kernel by random features (FAVOR+), so that products reassociate.

With φ(x) of M features, φ(Q) (φ(K)ᵀ V) needs no (n, n) matrix: φ(K)ᵀ V is (M, D). That holds for an
encoder. A causal model needs that state at every position; without a fused kernel
``performer-pytorch`` writes all of them, n matrices of (M, D) per head, several times over. That is
linear in n, and still more than the score matrix until n passes a multiple of M · D.

Choromanski et al., "Rethinking Attention with Performers", 2020, https://arxiv.org/abs/2009.14794
"""

from contextlib import redirect_stdout
from functools import partial

from performer_pytorch import SelfAttention
from small_model import HEAD_DIM, HEADS, REACH, WIDTH, Step, make_training_step, show_growth

_make_mixer = partial(SelfAttention, WIDTH, heads=HEADS, dim_head=HEAD_DIM, nb_features=REACH)


def make_step(seq_len: int, device: str) -> Step:
    """Random-feature attention of an encoder."""
    return make_training_step(partial(_make_mixer, causal=False), seq_len, device)


def make_causal_step(seq_len: int, device: str) -> Step:
    """Random-feature attention of a decoder, without a fused kernel."""
    with redirect_stdout(None):  # in which it says, for every layer, that it found no kernel
        return make_training_step(partial(_make_mixer, causal=True), seq_len, device)


if __name__ == "__main__":
    show_growth(make_step, make_causal_step)
