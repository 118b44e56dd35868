"""What lies between QKᵀ and PV: by hand, as a table, and byte for byte against real attention."""

from typing import Any

import pytest
import torch
from attention_runs import (
    BATCH,
    HEADS,
    LENGTH,
    Mix,
    call_sdpa,
    materialise,
    peak_of,
    row_of,
    saved_bytes,
    scale,
    see_past,
    soften_in_float32,
    trace_attention,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from attnprof.theory.recipes import Mask, ScorePath, list_ops
from attnprof.theory.scores import ScoreMemory, keys_per_query, predict_scores
from attnprof.vocabulary import Category, Phase

FLOAT, HALF, BOOL = 4, 2, 1  # bytes

paths = st.sampled_from(ScorePath)
masks = st.sampled_from(Mask)
dtypes = st.sampled_from(["float32", "bfloat16", "float16"])
sizes = st.integers(1, 64)


def predict(path: ScorePath, dtype: str = "float32", **options: Any) -> ScoreMemory:
    shape = {"batch": 1, "heads": HEADS, "q_len": LENGTH, "k_len": LENGTH} | options
    return predict_scores(path, dtype=dtype, **shape)


# The table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "dtype", "mask", "forward", "saved", "backward"),
    [
        # scores and masked, and a quarter byte for each of two bool masks that 4 heads share;
        # softmax and its mask; softmax, mask, and two gradients
        (ScorePath.MATERIALISED, "float32", Mask.CAUSAL, 8.5, 4.25, 12.25),
        (ScorePath.MATERIALISED, "bfloat16", Mask.CAUSAL, 4.5, 2.25, 6.25),
        # masked, its upcast copy, the softmax, half a byte of mask; softmax and its cast
        (ScorePath.FP32_SOFTMAX, "bfloat16", Mask.FLOAT, 10.5, 6.0, 12.0),
        # scores and softmax in float32, and a float32 mask
        (ScorePath.MATH, "float32", Mask.CAUSAL, 9.0, 4.0, 12.0),
        (ScorePath.MATH, "bfloat16", Mask.CAUSAL, 9.0, 4.0, 12.0),
        (ScorePath.FUSED, "bfloat16", Mask.CAUSAL, 0.0, 0.0, 0.0),
    ],
)
def test_bytes_per_score_of_tensors(
    path: ScorePath, dtype: str, mask: Mask, forward: float, saved: float, backward: float
) -> None:
    held = predict(path, dtype, mask=mask)
    peaks = [held.peak_bytes(phase, workspace=False) for phase in (Phase.FORWARD, Phase.BACKWARD)]
    found = tuple(held.per_score(size) for size in (peaks[0], held.saved_bytes, peaks[1]))
    assert found == (forward, saved, backward)


def test_the_safe_softmax_takes_a_byte_per_score_inside_itself() -> None:
    held = predict(ScorePath.MATH)
    tensors = held.peak_bytes(Phase.FORWARD, workspace=False)
    assert held.peak_bytes(Phase.FORWARD) == tensors + held.scores * BOOL


def test_dropout_in_one_op_keeps_a_bool_mask_and_the_dropped_copy() -> None:
    held = predict(ScorePath.MATERIALISED, "bfloat16", mask=Mask.NONE, dropout=True)
    assert held.saved == {
        "softmax": held.scores * HALF,
        "dropout_mask": held.scores * BOOL,
        "dropped": held.scores * HALF,
    }


def test_instants_name_what_is_live() -> None:
    held = predict(ScorePath.MATERIALISED, mask=Mask.NONE)
    names = [(instant.op, *sorted(instant.tensors)) for instant in held.instants]
    assert names == [
        ("QKᵀ", "product"),
        ("scale", "product", "scores"),
        ("softmax", "scores", "softmax"),
        ("PV", "softmax"),
        ("PV", "softmax", "∂softmax"),
        ("softmax", "softmax", "∂scores", "∂softmax"),
        ("scale", "∂product", "∂scores"),
        ("QKᵀ", "∂product"),
    ]


def test_masks_of_the_caller_count_once_for_all_layers() -> None:
    held = predict(ScorePath.MATERIALISED, mask=Mask.BOOL)
    mask = LENGTH * LENGTH * BOOL
    assert held.saved_bytes == held.scores * FLOAT + mask
    assert held.saved_by_layers(32) == 32 * held.scores * FLOAT + mask


def test_a_fused_kernel_keeps_a_float_copy_of_a_bool_mask_per_layer() -> None:
    held = predict(ScorePath.FUSED, mask=Mask.BOOL)
    assert held.saved_by_layers(32) == 32 * LENGTH * LENGTH * FLOAT


def test_sequences_padded_differently_have_a_mask_each() -> None:
    held = predict(ScorePath.MATERIALISED, mask=Mask.BOOL, batch=3, mask_count=3)
    assert held.saved_of_caller == {"mask": 3 * LENGTH * LENGTH * BOOL}


def test_a_band_has_the_keys_of_its_blocks() -> None:
    assert keys_per_query(before=128, after=128, block=128) == 3 * 128
    assert keys_per_query(before=127) == 128


@pytest.mark.parametrize("size", ["batch", "heads", "q_len", "k_len"])
def test_sizes_below_one_are_refused(size: str) -> None:
    with pytest.raises(ValueError, match=f"{size} must be at least 1, got 0"):
        predict(ScorePath.MATH, **{size: 0})


@given(paths, dtypes, masks, st.booleans(), st.booleans(), sizes, sizes)
def test_what_is_saved_is_live_where_backward_begins(
    path: ScorePath, dtype: str, mask: Mask, dropout: bool, fused: bool, heads: int, length: int
) -> None:
    held = predict(
        path, dtype, mask=mask, dropout=dropout, fused_dropout=fused, heads=heads, k_len=length
    )
    assert held.peak_bytes(Phase.BACKWARD) >= held.saved_bytes
    assert held.saved_by_layers(1) == held.saved_bytes


@given(paths, dtypes, masks, st.booleans(), sizes)
def test_without_autograd_nothing_is_saved_and_no_more_is_live(
    path: ScorePath, dtype: str, mask: Mask, dropout: bool, heads: int
) -> None:
    training = predict(path, dtype, mask=mask, dropout=dropout, heads=heads)
    inference = predict(path, dtype, mask=mask, dropout=dropout, heads=heads, training=False)
    assert (inference.saved_bytes, inference.peak_bytes(Phase.BACKWARD)) == (0, 0)
    assert inference.peak_bytes(Phase.FORWARD) <= training.peak_bytes(Phase.FORWARD)


@given(paths, dtypes, masks, sizes, sizes, sizes)
def test_bytes_double_with_either_length(
    path: ScorePath, dtype: str, mask: Mask, heads: int, queries: int, keys: int
) -> None:
    once = predict(path, dtype, mask=mask, heads=heads, q_len=queries, k_len=keys)
    for longer in ({"q_len": 2 * queries}, {"k_len": 2 * keys}):
        lengths = {"q_len": queries, "k_len": keys} | longer
        twice = predict(path, dtype, mask=mask, heads=heads, **lengths)
        assert twice.saved_bytes == 2 * once.saved_bytes
        assert twice.peak_bytes(Phase.FORWARD) == 2 * once.peak_bytes(Phase.FORWARD)


@given(paths, dtypes, masks, st.booleans())
def test_every_saved_copy_was_made_or_given(
    path: ScorePath, dtype: str, mask: Mask, dropout: bool
) -> None:
    ops = list_ops(path, dtype=dtype, mask=mask, dropout=dropout)
    made = {copy for op in ops.ops for copy in (op.makes, op.beside)} | {*ops.masks}
    assert {copy for op in ops.ops for copy in op.saves} <= made


# Against real attention --------------------------------------------------------------------------

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
MATH, FLASH = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
CASES: list[tuple[str, Mix, torch.dtype, ScorePath, Mask, bool]] = [
    ("plain", materialise(causal=False), FLOAT32, ScorePath.MATERIALISED, Mask.NONE, False),
    ("plain-bf16", materialise(causal=False), BFLOAT16, ScorePath.MATERIALISED, Mask.NONE, False),
    ("dropout", materialise(causal=False, dropout=0.1), FLOAT32, ScorePath.MATERIALISED, Mask.NONE,
     True),
    ("fp32", soften_in_float32(), BFLOAT16, ScorePath.FP32_SOFTMAX, Mask.NONE, False),
    ("fp32-dropout", soften_in_float32(dropout=0.1), BFLOAT16, ScorePath.FP32_SOFTMAX,
     Mask.NONE, True),
    ("math", call_sdpa(MATH), FLOAT32, ScorePath.MATH, Mask.NONE, False),
    ("math-bf16", call_sdpa(MATH), BFLOAT16, ScorePath.MATH, Mask.NONE, False),
    ("math-causal", call_sdpa(MATH, is_causal=True), FLOAT32, ScorePath.MATH, Mask.CAUSAL, False),
    ("math-causal-bf16", call_sdpa(MATH, is_causal=True), BFLOAT16, ScorePath.MATH, Mask.CAUSAL,
     False),
    ("math-dropout", call_sdpa(MATH, dropout_p=0.1), FLOAT32, ScorePath.MATH, Mask.NONE, True),
    ("math-dropout-bf16", call_sdpa(MATH, dropout_p=0.1), BFLOAT16, ScorePath.MATH, Mask.NONE,
     True),
    ("math-causal-dropout", call_sdpa(MATH, is_causal=True, dropout_p=0.1), FLOAT32,
     ScorePath.MATH, Mask.CAUSAL, True),
    ("flash", call_sdpa(FLASH, is_causal=True), FLOAT32, ScorePath.FUSED, Mask.CAUSAL, False),
    ("flash-bf16", call_sdpa(FLASH), BFLOAT16, ScorePath.FUSED, Mask.NONE, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mix", "dtype", "path", "mask", "dropout"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_paths_take_what_theory_says(
    mix: Mix, dtype: torch.dtype, path: ScorePath, mask: Mask, dropout: bool, training: bool
) -> None:
    run = trace_attention(mix, dtype=dtype, training=training)
    held = predict(
        path, str(dtype).removeprefix("torch."), batch=BATCH, mask=mask, dropout=dropout,
        fused_dropout=False, training=training,
    )  # fmt: skip
    measured = [peak_of(run, phase) for phase in ("forward", "backward")]
    assert measured == [
        held.peak_bytes(p, workspace=False) for p in (Phase.FORWARD, Phase.BACKWARD)
    ]
    assert saved_bytes(run, Category.ATTENTION_SCORES, Category.SOFTMAX) == held.saved_bytes
    assert row_of(run)["saved_softmax_bytes"] == held.saved_bytes


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_triangle_built_in_the_layer_takes_what_theory_says(dtype: torch.dtype) -> None:
    run = trace_attention(materialise(), dtype=dtype)
    held = predict(ScorePath.MATERIALISED, str(dtype).removeprefix("torch."), batch=BATCH)
    # the example keeps the name ``scores`` bound until the masked copy replaces it, as theory does
    assert peak_of(run, "forward") == held.peak_bytes(Phase.FORWARD)
    assert peak_of(run, "backward") == held.peak_bytes(Phase.BACKWARD)
    saved = (Category.ATTENTION_SCORES, Category.SOFTMAX, Category.ATTENTION_MASK)
    assert saved_bytes(run, *saved) == held.saved_bytes


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_an_additive_mask_takes_what_theory_says(dtype: torch.dtype) -> None:
    held = predict(
        ScorePath.FP32_SOFTMAX, str(dtype).removeprefix("torch."), batch=BATCH, mask=Mask.FLOAT
    )
    run = trace_attention(soften_in_float32(masked=True), dtype=dtype)
    assert peak_of(run, "forward") == held.peak_bytes(Phase.FORWARD)
    assert peak_of(run, "backward") == held.peak_bytes(Phase.BACKWARD)
    assert saved_bytes(run, Category.SOFTMAX) == held.saved_bytes


@pytest.mark.parametrize("backend", [MATH, FLASH], ids=["math", "flash"])
def test_a_bool_mask_for_sdpa_becomes_a_float_copy_in_every_layer(backend: SDPBackend) -> None:
    path = ScorePath.MATH if backend is MATH else ScorePath.FUSED
    held = predict(path, batch=BATCH, mask=Mask.BOOL)
    run = trace_attention(call_sdpa(backend, attn_mask=see_past(LENGTH)))
    copied = LENGTH * LENGTH * FLOAT
    kept = saved_bytes(run, Category.ATTENTION_MASK)
    assert kept == (copied if backend is FLASH else 0)
    assert held.saved_bytes == kept + saved_bytes(run, Category.SOFTMAX)
    assert peak_of(run, "forward") == held.peak_bytes(Phase.FORWARD, workspace=False)


def test_the_allocator_sees_what_the_safe_softmax_takes_inside_itself() -> None:
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, 12, requires_grad=True) for _ in range(3))
    # torch 2.11 warns where nobody says whether cycles (there is one) add up.
    options = {"profile_memory": True, "acc_events": True}
    with profile(activities=[ProfilerActivity.CPU], **options) as profiled:
        call_sdpa(MATH)(q, k, v)
    taken = [e.cpu_memory_usage for e in profiled.events() if e.name == "aten::isneginf"]
    assert taken == [BATCH * HEADS * LENGTH * LENGTH * BOOL]


def test_dropout_in_one_op_takes_what_theory_says() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scale(q, k).softmax(-1)
        return torch.native_dropout(weights, 0.1, True)[0] @ v

    run = trace_attention(mix)
    held = predict(ScorePath.MATERIALISED, batch=BATCH, mask=Mask.NONE, dropout=True)
    assert peak_of(run, "backward") == held.peak_bytes(Phase.BACKWARD)
    assert saved_bytes(run, Category.SOFTMAX) == held.saved_bytes


def test_a_name_that_is_kept_keeps_its_copy() -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scale(q, k)
        weights = scores.softmax(-1)
        return (weights * 1.0) @ v

    run = trace_attention(mix, training=False)
    held = predict(ScorePath.MATERIALISED, batch=BATCH, mask=Mask.NONE, training=False)
    assert peak_of(run, "forward") == held.peak_bytes(Phase.FORWARD) + held.scores * FLOAT
