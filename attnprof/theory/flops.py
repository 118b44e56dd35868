"""How many floating-point operations a forward takes, and where attention overtakes the rest.

A product of (m, k) by (k, n) matrices takes 2 m k n flops. Only products are counted: norms,
softmax and element-wise ops are a few per cent, and bound by memory anyway. Sources: Kaplan et al.
(arXiv 2001.08361, table 1), PaLM (arXiv 2204.02311, appendix B).

Symbols: L layers, n sequence length, d model width, H query heads, D_qk and D_v lengths of a head's
query and value, w window.
"""

from dataclasses import dataclass

from attnprof.theory.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Flops:
    """Flops of one forward, by where they go."""

    projections: int
    """Q, K, V and output projections: 2 · parameters per token."""
    attention: int
    """QKᵀ and PV: 2 · (D_qk + D_v) per head and pair of query and key."""
    ffn: int
    """Feed-forward networks: 2 · active parameters per token."""
    head: int
    """The product with the vocabulary: 2 · d · V per token."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.projections + self.attention + self.ffn + self.head


def count_pairs(arch: Architecture, *, seq_len: int, skip_masked: bool = False) -> int:
    """Return over how many pairs of query and key all layers compute, for one head.

    Dense kernels compute all n² of them whatever the mask hides, so a causal mask or a window does
    not make them fewer. Kernels that skip what is hidden compute Σ min(i, w) for i from 1 to n:
    n (n + 1) / 2 in a layer without window.

    Args:
        arch: The model.
        seq_len: n, queries and keys.
        skip_masked: Whether the kernel skips what mask and window hide (flash attention does).
    """
    if not skip_masked:
        return arch.layers * seq_len**2
    return arch.full_layers * _triangle(seq_len) + arch.windowed_layers * _band(arch, seq_len)


def _triangle(seq_len: int) -> int:
    return seq_len * (seq_len + 1) // 2


def _band(arch: Architecture, seq_len: int) -> int:
    """Return Σ min(i, w) for i from 1 to n."""
    inside = seq_len if arch.window is None else min(seq_len, arch.window)
    return _triangle(inside) + (seq_len - inside) * inside


def count_forward(
    arch: Architecture,
    *,
    seq_len: int,
    batch: int = 1,
    skip_masked: bool = False,
    last_logits_only: bool = False,
) -> Flops:
    """Return the flops of a forward over n tokens: training, or the prefill of a prompt.

    Backward takes twice as many (one product for each operand's gradient), so a training step takes
    three times this, four times with every layer recomputed.

    Args:
        arch: The model.
        seq_len: n.
        batch: B.
        skip_masked: See `count_pairs`.
        last_logits_only: Whether only the last token meets the vocabulary, as in a prefill.
    """
    tokens = batch * seq_len
    pairs = batch * count_pairs(arch, seq_len=seq_len, skip_masked=skip_masked)
    return Flops(
        projections=2 * tokens * arch.layers * arch.attention_parameters,
        attention=2 * pairs * arch.heads * (arch.qk_dim + arch.value_dim),
        ffn=2 * tokens * arch.active_ffn_parameters,
        head=2 * (batch if last_logits_only else tokens) * arch.head_parameters,
    )


def count_decode(arch: Architecture, *, past_len: int, batch: int = 1) -> Flops:
    """Return the flops of one token after ``past_len`` cached ones: attention is O(t d).

    With a cache the new query meets t = past + 1 keys (in windowed layers at most w). Latent
    attention is counted in its absorbed form, where queries meet the latents themselves and nothing
    is expanded (DeepSeek-V2, section 2.1.2): H · (2 r + D_rope) instead of H · (D_qk + D_v).
    """
    keys = past_len + 1
    seen = arch.full_layers * keys
    seen += arch.windowed_layers * min(keys, arch.window or keys)
    per_key = arch.qk_dim + arch.value_dim
    if arch.latent is not None:
        per_key = 2 * arch.latent.kv_rank + arch.latent.rope_dim
    return Flops(
        projections=2 * batch * arch.layers * arch.attention_parameters,
        attention=2 * batch * seen * arch.heads * per_key,
        ffn=2 * batch * arch.active_ffn_parameters,
        head=2 * batch * arch.head_parameters,
    )


def count_generation(arch: Architecture, *, new_tokens: int, cached: bool = True) -> int:
    """Return the flops of all attention products while T tokens are generated from nothing.

    With a cache token t meets t keys: Σ t = T (T + 1) / 2, O(T² d). Without one, every token
    repeats the whole forward: Σ t² = T (T + 1) (2 T + 1) / 6, O(T³ d). Windows are not regarded.
    """
    last = new_tokens
    pairs = last * (last + 1) * (2 * last + 1) // 6 if not cached else _triangle(last)
    return 2 * arch.layers * arch.heads * (arch.qk_dim + arch.value_dim) * pairs


def find_crossing(
    arch: Architecture, *, with_projections: bool = False, skip_masked: bool = False
) -> int | None:
    """Return the least n from which attention takes at least as many flops as the FFNs.

    Multi-head attention against an FFN of 4 d, with dense kernels: 4 n² d = 16 n d², so n = 4 d.
    Against FFN and projections together: 4 n² d = 24 n d², so n = 6 d. A kernel that skips what a
    causal mask hides doubles both. Here the exact figure for an architecture's own widths.

    Args:
        arch: The model.
        with_projections: Whether the projections of attention count on the FFN's side.
        skip_masked: See `count_pairs`.

    Returns:
        n, or None if attention never overtakes: every layer has a window.
    """

    def has_crossed(seq_len: int) -> bool:
        flops = count_forward(arch, seq_len=seq_len, skip_masked=skip_masked)
        return flops.attention >= flops.ffn + (flops.projections if with_projections else 0)

    least, most = 0, 1
    while not has_crossed(most):
        least, most = most, 2 * most
        if most > _FARTHEST:
            return None
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if has_crossed(middle) else (middle, most)
    return most


_FARTHEST = 2**40
"""No crossing is looked for beyond; attention that still grows has overtaken long before."""
