"""What a whole model takes, and the largest n that fits: an estimate, part by part.

Exact for a program is only a dry run of it (`attnprof.dry_run`): it sees what the program itself
keeps alive, its optimizer, its loss. These forms answer before there is a program, for one device:
nothing is sharded or offloaded.
"""

from dataclasses import dataclass, replace

from attnprof.theory.activations import (
    Setting,
    backward_extra_bytes,
    ffn_width_per_token,
    loss_bytes,
    predict_layer,
    predict_layer_scores,
)
from attnprof.theory.architecture import Architecture
from attnprof.theory.cache import cache_bytes
from attnprof.theory.recipes import ScorePath
from attnprof.theory.scores import predict_scores
from attnprof.vocabulary import Phase


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model holds at the instant of most bytes, by part; they sum to `total_bytes`."""

    weights_bytes: int
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    kv_cache_bytes: int = 0
    softmax_bytes: int = 0
    """Between QKᵀ and PV: kept by all layers in training, held by one in inference."""
    activations_bytes: int = 0
    """What else all layers keep for backward."""
    working_bytes: int = 0
    """What one layer, or the loss, holds for the moment."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return (
            self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
            + self.kv_cache_bytes + self.softmax_bytes + self.activations_bytes
            + self.working_bytes
        )  # fmt: skip


def predict_training(
    arch: Architecture,
    setting: Setting,
    *,
    optimizer_bytes_per_parameter: int | None = None,
    gradients_kept: bool = False,
) -> Footprint:
    """Return what a training step holds at its peak.

    Included: weights, gradients, optimizer state, what every layer keeps for backward
    (`predict_layer`), logits and loss, and the gradients inside one layer. Not included: what
    kernels take inside themselves, copies that a program keeps by name, fragmentation.

    The peak is where backward begins, with all activations and hardly a gradient, or where it ends,
    with all gradients and hardly an activation.

    Args:
        arch: The model.
        setting: How it is run.
        optimizer_bytes_per_parameter: What the optimizer keeps; by default AdamW's two moments in
            the weights' dtype, as torch.optim does. Mixed precision with float32 weights and
            moments keeps 12.
        gradients_kept: Whether gradients live through forward too: accumulated over steps, or
            zeroed instead of dropped.
    """
    weights = arch.parameters * setting.item_bytes
    if optimizer_bytes_per_parameter is None:
        optimizer_bytes_per_parameter = 2 * setting.item_bytes
    optimizer = arch.parameters * optimizer_bytes_per_parameter
    logits = setting.tokens * arch.vocabulary * setting.item_bytes
    begins = Footprint(
        weights_bytes=weights,
        gradients_bytes=weights if gradients_kept else 0,
        optimizer_bytes=optimizer,
        softmax_bytes=predict_layer_scores(arch, setting).saved_by_layers(arch.layers),
        activations_bytes=arch.layers * predict_layer(arch, setting).linear_bytes,
        working_bytes=max(loss_bytes(arch, setting), logits + backward_extra_bytes(arch, setting)),
    )
    ends = Footprint(weights_bytes=weights, gradients_bytes=weights, optimizer_bytes=optimizer)
    return max(begins, ends, key=lambda footprint: footprint.total_bytes)


def predict_inference(
    arch: Architecture,
    setting: Setting,
    *,
    cache_dtype: str | None = None,
    prefill_chunk: int | None = None,
) -> Footprint:
    """Return what serving a context of n tokens takes at its peak: where its prefill ends.

    Included: weights, the KV cache, what one layer holds while it works on the prompt (scores,
    Q, K, V, the FFN's widths). Decoding takes less. Not included: what kernels take inside
    themselves, logits of more than the last token, fragmentation.

    Args:
        arch: The model.
        setting: How it is run; its sequence length is the whole context.
        cache_dtype: How the cache is stored; by default as the model.
        prefill_chunk: Tokens of the prompt that are worked on at a time; by default all.
    """
    chunk = min(setting.seq_len, prefill_chunk or setting.seq_len)
    scores = predict_scores(
        setting.path,
        batch=setting.batch,
        heads=arch.heads,
        q_len=chunk,
        k_len=setting.seq_len,
        dtype=setting.dtype,
        mask=setting.mask,
        training=False,
    ).peak_bytes(Phase.FORWARD)
    cache = cache_bytes(
        arch,
        seq_len=setting.seq_len,
        batch=setting.batch,
        dtype=cache_dtype or setting.dtype,
        windows_kept=False,
    )
    # Hidden states of width d: the embeddings and the layer's input, which the callers' frames
    # keep, the norm's output and, in the FFN, the sum after attention.
    queries, values = arch.heads * arch.qk_dim, arch.heads * arch.value_dim
    repeated = 0 if setting.path is ScorePath.FUSED else queries
    per_chunk = setting.batch * chunk * setting.item_bytes
    attention = per_chunk * (3 * arch.width + queries + repeated + values)
    ffn = per_chunk * (4 * arch.width + (3 if arch.ffn_gated else 2) * ffn_width_per_token(arch))
    weights = arch.parameters * setting.item_bytes
    instants = (
        Footprint(weights, kv_cache_bytes=cache, softmax_bytes=scores, working_bytes=attention),
        Footprint(weights, kv_cache_bytes=cache, working_bytes=ffn),
    )
    return max(instants, key=lambda footprint: footprint.total_bytes)


def max_seq_len(
    arch: Architecture,
    setting: Setting,
    *,
    capacity_bytes: int,
    training: bool,
) -> int:
    """Return the largest n whose footprint fits into a capacity; 0 if not one token does.

    By bisection over `predict_training` or `predict_inference`, whose docstrings say what is
    counted. Give a device's `available_bytes`, and leave room for fragmentation.

    Args:
        arch: The model.
        setting: How it is run; its sequence length does not matter.
        capacity_bytes: What there is.
        training: Whether to train (AdamW) or to serve.
    """
    measure = predict_training if training else predict_inference

    def fits(seq_len: int) -> bool:
        return measure(arch, replace(setting, seq_len=seq_len)).total_bytes <= capacity_bytes

    least, most = 0, 1
    while fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
