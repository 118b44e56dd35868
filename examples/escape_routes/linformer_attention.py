"""Linformer: project keys and values from n rows down to a fixed number k.

Scores are (n, k), linear in n. The projections are parameters of shape (n, k), so the model itself
grows with n, and with it gradients and optimizer state; and it can read no longer sequence than it
was built for. The implementation is the package ``linformer`` (which is why this file has a longer
name: a script that is called like a package hides it).

Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020,
https://arxiv.org/abs/2006.04768
"""

from linformer import LinformerSelfAttention
from small_model import HEADS, REACH, WIDTH, Step, make_training_step, show_growth


def make_step(seq_len: int, device: str) -> Step:
    """Low-rank attention: n queries against k projected keys."""
    return make_training_step(
        lambda: LinformerSelfAttention(WIDTH, seq_len, k=REACH, heads=HEADS), seq_len, device
    )


if __name__ == "__main__":
    show_growth(make_step)
