"""What one layer keeps from forward to backward, and what else a step holds beside it.

Symbols: B batch, n sequence length, d model width, H query heads, Hkv key heads, D_qk and D_v
lengths of a head's query and value, f FFN width, V vocabulary, e bytes per element.

The sums follow Korthikanti et al. (arXiv 2205.05198, section 4.1): a GPT layer with dropout in
16 bits keeps s b h (34 + 5 a s / h) bytes for s tokens, batch b, width h and a heads. Here they are
taken apart by tensor, so that they hold for other dtypes, gated FFNs, grouped keys and every path
of attention; the tests compare them with PyTorch and transformers byte for byte.
"""

from dataclasses import dataclass

from attnprof.theory.architecture import Architecture
from attnprof.theory.dtypes import item_bytes
from attnprof.theory.recipes import FLOAT32_BYTES, Mask, ScorePath
from attnprof.theory.scores import ScoreMemory, predict_scores
from attnprof.vocabulary import Phase

STATISTIC_BYTES = FLOAT32_BYTES
"""Bytes of a norm's mean or scale per token: kept in float32 whatever the model's dtype."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is run."""

    seq_len: int
    """n."""
    batch: int = 1
    """B."""
    dtype: str = "bfloat16"
    """Of weights and activations."""
    path: ScorePath = ScorePath.FUSED
    """How attention is computed."""
    mask: Mask = Mask.CAUSAL
    """What hides keys."""
    dropout: bool = False
    """Whether softmax results and the outputs of attention and FFN are dropped."""

    @property
    def tokens(self) -> int:
        """B · n."""
        return self.batch * self.seq_len

    @property
    def item_bytes(self) -> int:
        """The bytes of an element (e)."""
        return item_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """What one layer keeps for backward, in bytes."""

    scores_bytes: int
    """Between QKᵀ and PV: scores, softmax, masks. Quadratic in n."""
    attention_io_bytes: int
    """Q, K, V, the output, and a fused kernel's log-sum-exp."""
    projection_bytes: int
    """What the projections of attention and the FFN read: the outputs of the two norms."""
    ffn_bytes: int
    """Between the FFN's products."""
    norm_bytes: int
    """What the two norms keep."""
    dropout_bytes: int
    """Masks of dropout on the outputs of attention and FFN."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.scores_bytes + self.linear_bytes

    @property
    def linear_bytes(self) -> int:
        """All that grows linearly with n."""
        return (
            self.attention_io_bytes + self.projection_bytes + self.ffn_bytes
            + self.norm_bytes + self.dropout_bytes
        )  # fmt: skip


def predict_layer(arch: Architecture, setting: Setting) -> LayerActivations:
    """Return what one layer keeps for backward.

    - Attention: norm's output d; Q H · D_qk; K and V Hkv · (D_qk + D_v), repeated for all H heads
      where the path has no grouped kernel; output H · D_v; fused: 4 bytes of log-sum-exp per head.
    - FFN: norm's output d; then f twice (input of the activation and of the second product), or
      gated f four times (gate, activated gate, up, their product).
    - Norms: their input. RMS norm written out, as in transformers, keeps a float32 copy of it and
      the normalised result.
    - With dropout, a byte per element of both outputs.

    All per token and in the model's dtype unless said otherwise. The latents of latent attention,
    some per cent of its keys and values, are left out.
    """
    item, tokens = setting.item_bytes, setting.tokens
    is_fused = setting.path is ScorePath.FUSED
    heads = arch.heads + (arch.kv_heads if is_fused else arch.heads)  # Q and output, K and V
    per_head = arch.qk_dim + arch.value_dim
    norm = (FLOAT32_BYTES + item if arch.rms_norm else item) * arch.width
    norm += STATISTIC_BYTES * (1 if arch.rms_norm else 2)  # the scale; LayerNorm the mean too
    return LayerActivations(
        scores_bytes=predict_layer_scores(arch, setting).saved_bytes,
        attention_io_bytes=tokens
        * (item * heads * per_head + (STATISTIC_BYTES * arch.heads if is_fused else 0)),
        projection_bytes=tokens * item * 2 * arch.width,
        ffn_bytes=tokens * item * (4 if arch.ffn_gated else 2) * ffn_width_per_token(arch),
        norm_bytes=tokens * 2 * norm,
        dropout_bytes=tokens * 2 * arch.width if setting.dropout else 0,
    )


def predict_layer_scores(
    arch: Architecture, setting: Setting, *, training: bool = True
) -> ScoreMemory:
    """Return what one of a model's layers holds between QKᵀ and PV."""
    return predict_scores(
        setting.path,
        batch=setting.batch,
        heads=arch.heads,
        q_len=setting.seq_len,
        k_len=setting.seq_len,
        dtype=setting.dtype,
        mask=setting.mask,
        dropout=setting.dropout,
        training=training,
    )


def ffn_width_per_token(arch: Architecture) -> int:
    """Return f, or with experts the widths that one token passes; averaged over the layers."""
    if arch.experts is None:
        return arch.ffn_width
    mixed = arch.experts.active * arch.experts.width + arch.experts.shared_width
    total = arch.experts.dense_layers * arch.ffn_width + arch.expert_layers * mixed
    return round(total / arch.layers)


def loss_bytes(arch: Architecture, setting: Setting) -> int:
    """Return what logits and loss hold at backward's first ops: (e + 12) · V per token.

    The logits, kept by who called the model, and in float32 the log-probabilities, their gradient
    and that of the logits. With a vocabulary of 128 256 in 16 bits that is 1.7 MiB a token, and no
    attention kernel makes it less; losses that are computed chunk by chunk do.
    """
    return setting.tokens * arch.vocabulary * (setting.item_bytes + 3 * FLOAT32_BYTES)


def backward_extra_bytes(arch: Architecture, setting: Setting) -> int:
    """Return what the backward of one layer holds beside all that was saved.

    The larger of the gradients between QKᵀ and PV, and of those within the FFN (f, gated 3 f).
    """
    scores = predict_layer_scores(arch, setting)
    of_scores = scores.peak_bytes(Phase.BACKWARD) - scores.saved_bytes
    width = (3 if arch.ffn_gated else 1) * ffn_width_per_token(arch)
    return max(of_scores, setting.tokens * setting.item_bytes * width)
