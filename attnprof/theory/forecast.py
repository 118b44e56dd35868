"""All that theory says of a model at some lengths, gathered once for every reporter."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnprof.theory.activations import Setting, predict_layer_scores
from attnprof.theory.architecture import Architecture
from attnprof.theory.cache import cache_bytes, cache_bytes_per_token
from attnprof.theory.capacity import max_seq_len, predict_inference, predict_training
from attnprof.theory.devices import Device
from attnprof.theory.dtypes import item_bytes, name_dtype
from attnprof.theory.flops import Flops, count_forward, find_crossing
from attnprof.theory.recipes import Mask, ScorePath
from attnprof.theory.traffic import TimeBound, bound_decode, bound_prefill
from attnprof.vocabulary import Phase


@dataclass(frozen=True, slots=True)
class PathForecast:
    """One way of computing attention, at one length."""

    path: ScorePath
    dtype: str
    """Of weights and activations."""
    mask: Mask
    saved_bytes_per_score: float
    forward_peak_bytes: int
    """Between QKᵀ and PV of one layer, in a training step."""
    saved_bytes: int
    """What one layer keeps of that for backward."""
    backward_peak_bytes: int
    saved_by_layers_bytes: int
    """What all layers keep."""
    training_bytes: int
    """The whole model's footprint, trained with AdamW."""
    inference_bytes: int
    """The whole model's footprint, serving that context."""


@dataclass(frozen=True, slots=True)
class LengthForecast:
    """A model at one length."""

    seq_len: int
    scores_per_head: int
    """Scores of one head in one layer, for one sequence: n²."""
    score_bytes_per_head: int
    """One copy of them in the model's dtype."""
    score_bytes_per_layer: int
    """The same for all heads and the whole batch."""
    score_bytes: int
    """The same for all layers."""
    kv_cache_bytes: int
    flops: Flops
    """Of one forward, with kernels that compute what the mask hides."""
    total_flops: int
    prefill: TimeBound | None
    """On the device, with a kernel that skips what the mask hides."""
    decode: TimeBound | None
    """Of one more token after so many."""
    paths: tuple[PathForecast, ...]


@dataclass(frozen=True, slots=True)
class Wall:
    """The largest lengths whose footprints fit a device."""

    path: ScorePath
    dtype: str
    training_len: int
    """0 if not even one token fits."""
    inference_len: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """A model, how it is run, and what follows."""

    architecture: Architecture
    parameters: int
    weights_bytes: int
    batch: int
    dtype: str
    device: Device | None
    capacity_bytes: int | None
    """What a program can have of the device's memory."""
    cache_bytes_per_token: int
    ffn_crossing_len: int | None
    """From this n on, attention takes more flops than the FFNs; None: never."""
    layer_crossing_len: int | None
    """From this n on, more than FFNs and projections together."""
    skipping_crossing_len: int | None
    """`ffn_crossing_len` with kernels that skip what mask and window hide."""
    lengths: tuple[LengthForecast, ...]
    walls: tuple[Wall, ...]
    """Empty without a device."""


def forecast_model(
    arch: Architecture,
    *,
    seq_lens: Sequence[int],
    batch: int = 1,
    dtype: str = "bfloat16",
    device: Device | None = None,
) -> Forecast:
    """Return all that theory says of a model.

    Args:
        arch: The model.
        seq_lens: The lengths to look at.
        batch: B.
        dtype: Of weights, activations and cache.
        device: Where it is to run; without one there are no times and no walls.

    Raises:
        ValueError: The dtype cannot be computed with, or a length or the batch is below 1.
    """
    if batch < 1:
        raise ValueError(f"the batch must be at least 1, got {batch}")
    dtype = name_dtype(dtype)
    return Forecast(
        architecture=arch,
        parameters=arch.parameters,
        weights_bytes=arch.parameters * item_bytes(dtype),
        batch=batch,
        dtype=dtype,
        device=device,
        capacity_bytes=None if device is None else device.available_bytes,
        cache_bytes_per_token=cache_bytes_per_token(arch, dtype=dtype),
        ffn_crossing_len=find_crossing(arch),
        layer_crossing_len=find_crossing(arch, with_projections=True),
        skipping_crossing_len=find_crossing(arch, skip_masked=True),
        lengths=tuple(_at_length(arch, n, batch, dtype, device) for n in seq_lens),
        walls=() if device is None else _find_walls(arch, batch, dtype, device),
    )


def list_settings(seq_len: int, batch: int, dtype: str) -> tuple[Setting, ...]:
    """Return the ways of running attention that are worth comparing, most memory first.

    Each with the mask that goes with it: a triangle built in the layer where attention is written
    out, transformers' additive one, ``is_causal`` for the rest.
    """
    full = Setting(seq_len, batch, "float32", ScorePath.MATERIALISED)
    ways = [
        Setting(seq_len, batch, dtype, ScorePath.FP32_SOFTMAX, Mask.FLOAT),
        Setting(seq_len, batch, dtype, ScorePath.MATERIALISED),
        Setting(seq_len, batch, dtype, ScorePath.MATH),
        Setting(seq_len, batch, dtype, ScorePath.FUSED),
    ]
    if dtype == "float32":  # a float32 softmax is no way of its own then
        ways = ways[1:]
    return tuple(dict.fromkeys([full, *ways]))


def _find_walls(arch: Architecture, batch: int, dtype: str, device: Device) -> tuple[Wall, ...]:
    settings = list_settings(1, batch, dtype)
    capacity = device.available_bytes
    return tuple(
        Wall(
            path=setting.path,
            dtype=setting.dtype,
            training_len=max_seq_len(arch, setting, capacity_bytes=capacity, training=True),
            inference_len=max_seq_len(arch, setting, capacity_bytes=capacity, training=False),
        )
        for setting in settings
    )


def _at_length(
    arch: Architecture, seq_len: int, batch: int, dtype: str, device: Device | None
) -> LengthForecast:
    per_head = seq_len * seq_len * item_bytes(dtype)
    flops = count_forward(arch, seq_len=seq_len, batch=batch)
    return LengthForecast(
        seq_len=seq_len,
        scores_per_head=seq_len * seq_len,
        score_bytes_per_head=per_head,
        score_bytes_per_layer=batch * arch.heads * per_head,
        score_bytes=arch.layers * batch * arch.heads * per_head,
        kv_cache_bytes=cache_bytes(arch, seq_len=seq_len, batch=batch, dtype=dtype),
        flops=flops,
        total_flops=flops.total,
        prefill=None
        if device is None
        else bound_prefill(
            arch, device, seq_len=seq_len, batch=batch, dtype=dtype, skip_masked=True
        ),
        decode=None
        if device is None
        else bound_decode(arch, device, past_len=seq_len, batch=batch, dtype=dtype),
        paths=tuple(_on_path(arch, s) for s in list_settings(seq_len, batch, dtype)),
    )


def _on_path(arch: Architecture, setting: Setting) -> PathForecast:
    scores = predict_layer_scores(arch, setting)
    return PathForecast(
        path=setting.path,
        dtype=setting.dtype,
        mask=setting.mask,
        saved_bytes_per_score=scores.per_score(scores.saved_bytes),
        forward_peak_bytes=scores.peak_bytes(Phase.FORWARD),
        saved_bytes=scores.saved_bytes,
        backward_peak_bytes=scores.peak_bytes(Phase.BACKWARD),
        saved_by_layers_bytes=scores.saved_by_layers(arch.layers),
        training_bytes=predict_training(arch, setting).total_bytes,
        inference_bytes=predict_inference(arch, setting).total_bytes,
    )
