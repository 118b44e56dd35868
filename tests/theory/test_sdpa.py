"""Which kernel CUDA's attention takes: rule by rule, and against torch's own choices."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnprof.theory.sdpa import Backend, SdpaCall, choose_backend

RECORDED = Path(__file__).parents[1] / "oracle" / "sdpa.json"
CASES = [json.loads(line) for line in RECORDED.read_text().splitlines()]
A100, RTX_3090, RTX_4090, H100, B200, RTX_5090 = (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)
T4, V100, K80 = (7, 5), (7, 0), (3, 7)
HALF_AND_FLOAT = "float16, float32, bfloat16"


def make_call(
    q: tuple[int, ...] = (2, 8, 128, 64),
    k: tuple[int, ...] | None = None,
    v: tuple[int, ...] | None = None,
    *,
    dtype: str = "bfloat16",
    mask: tuple[int, ...] | None = None,
    **rest: Any,
) -> SdpaCall:
    """Return a call that every kernel takes, but for what is given."""
    k = k or q
    if mask is not None:
        rest = {"mask_shape": mask, "mask_dtype": "bool"} | rest
    return SdpaCall(dtype=dtype, q_shape=q, k_shape=k, v_shape=v or k, **rest)


def test_choices_are_torchs_own() -> None:
    """Recorded by tests/oracle/record.py from torch's CUDA build."""
    for case in CASES:
        arguments = {
            name: tuple(value) if name.endswith("_shape") else value
            for name, value in case["call"].items()
        }
        call, enabled = SdpaCall(**arguments), frozenset(map(Backend, case["enabled"]))
        capability = tuple(case["capability"])
        if case["answer"] is None:
            with pytest.raises(ValueError, match="no backend that is switched on"):
                choose_backend(call, compute_capability=capability, enabled=enabled)
        else:
            choice = choose_backend(call, compute_capability=capability, enabled=enabled)
            assert choice.backend == case["answer"], case


@pytest.mark.parametrize(
    ("capability", "first"),
    [
        (H100, Backend.CUDNN),
        (B200, Backend.CUDNN),
        ((10, 3), Backend.CUDNN),
        (A100, Backend.FLASH),
        (RTX_4090, Backend.FLASH),
        (RTX_5090, Backend.FLASH),
        (T4, Backend.MATH),  # bfloat16 needs 8.0
    ],
)
def test_cudnn_is_tried_first_on_hopper_and_data_center_blackwell(
    capability: tuple[int, int], first: Backend
) -> None:
    assert choose_backend(make_call(), compute_capability=capability).backend is first


def test_the_reason_of_a_first_choice_names_the_gpu() -> None:
    choice = choose_backend(make_call(), compute_capability=A100)
    assert choice.reason == "flash is tried first on compute capability 8.0"
    assert choice.rejected == {}


def test_the_reason_of_a_later_choice_is_what_spoke_against_those_before() -> None:
    choice = choose_backend(make_call((1, 1, 128, 264)), compute_capability=H100)
    assert choice.backend is Backend.EFFICIENT
    assert choice.reason == (
        "cudnn takes head_dim up to 256 only, got 264 and 264; "
        "flash takes one head_dim up to 256 for Q, K and V, got 264, 264 and 264"
    )


def test_what_is_switched_off_is_not_taken() -> None:
    choice = choose_backend(make_call(), enabled={Backend.EFFICIENT, Backend.MATH})
    assert choice.backend is Backend.EFFICIENT
    assert choice.rejected == {
        Backend.FLASH: "flash is switched off",
        Backend.CUDNN: "cudnn is switched off",
    }


def test_no_kernel_at_all_is_an_error() -> None:
    message = r"no backend that is switched on .*: flash takes no mask; efficient is switched off"
    with pytest.raises(ValueError, match=message):
        choose_backend(make_call(mask=(128, 128)), compute_capability=A100, enabled={Backend.FLASH})


@pytest.mark.parametrize(
    ("call", "capability", "rule"),
    [
        # check_for_attn_mask
        (make_call(mask=(128, 128)), A100, "takes no mask"),
        # check_head_dim_size_flash
        (make_call((2, 8, 128, 264)), A100, "takes one head_dim up to 256 for Q, K and V, got 264"),
        (make_call((2, 8, 9, 192), v=(2, 8, 9, 128)), A100, "takes one head_dim up to 256"),
        # check_flash_attention_hardware_support
        (make_call(dtype="float16"), T4, "runs on compute capability 8.0 to 12.1 only, got 7.5"),
        (make_call(), (13, 0), "runs on compute capability 8.0 to 12.1 only, got 13.0"),
        # check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120
        (make_call((1, 8, 9, 224), requires_grad=True), RTX_3090, "does not train head_dim 224"),
        (
            make_call((1, 8, 9, 256), requires_grad=True, dropout=0.5),
            RTX_4090,
            "does not train head_dim 256 with dropout 0.5 on compute capability 8.9",
        ),
        (make_call((1, 8, 9, 200), requires_grad=True), RTX_5090, "does not train head_dim 200"),
        # check_flash_causal_non_square_seqlens
        (
            make_call(k=(2, 8, 100, 64), is_causal=True),
            A100,
            "takes is_causal with as many queries as keys only, got 128 and 100",
        ),
        # check_dtypes_low_precision
        (make_call(dtype="float32"), A100, "takes float16, bfloat16 only, got float32"),
        # check_batch_size_and_num_heads_dense
        (
            make_call(k=(1, 8, 128, 64)),
            A100,
            "takes Q, K and V of one batch size only, got 2, 1, 1",
        ),
        (make_call(k=(2, 2, 128, 64)), A100, "takes grouped heads only with enable_gqa"),
        (
            make_call(k=(2, 4, 128, 64), v=(2, 2, 128, 64), enable_gqa=True),
            A100,
            "takes as many heads of K as of V only",
        ),
        (
            make_call(k=(2, 3, 128, 64), enable_gqa=True),
            A100,
            "takes heads of K and V that divide those of Q only",
        ),
        # check_nonzero_sequence_lengths_dense
        (make_call((2, 8, 0, 64)), A100, "takes no empty sequences"),
        # check_last_dim_stride_equals_1_dense
        (make_call(last_dim_contiguous=False), A100, "needs the last dimension of Q, K, V and"),
        # check_tensor_shapes
        (make_call((8, 128, 64)), A100, "takes Q, K and V with 4 dimensions only, got 3, 3, 3"),
    ],
)
def test_flash_rejects(call: SdpaCall, capability: tuple[int, int], rule: str) -> None:
    choice = choose_backend(call, compute_capability=capability)
    assert choice.rejected[Backend.FLASH].startswith(f"flash {rule}")


@pytest.mark.parametrize(
    "call",
    [
        make_call((2, 8, 128, 60)),  # padded to 64
        make_call((2, 8, 128, 256)),
        make_call(dropout=0.1),
        make_call(k=(2, 8, 100, 64)),
        make_call(k=(2, 2, 128, 64), enable_gqa=True),
        make_call(k=(2, 1, 128, 64), enable_gqa=True),
        make_call((2, 8, 128, 1), last_dim_contiguous=False),
        make_call((0, 8, 128, 64)),
    ],
)
def test_flash_takes(call: SdpaCall) -> None:
    assert choose_backend(call, compute_capability=A100).backend is Backend.FLASH


def test_flash_trains_large_heads_where_it_may() -> None:
    without_dropout = make_call((1, 8, 9, 256), requires_grad=True)
    assert choose_backend(without_dropout, compute_capability=RTX_4090).backend is Backend.FLASH
    inference = make_call((1, 8, 9, 224), dropout=0.5)
    assert choose_backend(inference, compute_capability=RTX_4090).backend is Backend.FLASH


@pytest.mark.parametrize(
    ("call", "capability", "rule"),
    [
        # check_mem_efficient_hardware_support
        (make_call(), K80, "runs on compute capability 5.0 to 12.1 only, got 3.7"),
        # check_head_dim_size_mem_efficient, minimum_gemm_alignment
        (make_call((2, 8, 9, 60)), A100, "takes one head_dim for Q and K and multiples of 8 only"),
        (make_call((2, 8, 9, 60), dtype="float16"), T4, "takes one head_dim for Q and K and"),
        (make_call((2, 8, 9, 62), dtype="float32"), A100, "takes one head_dim for Q and K and"),
        (make_call((2, 8, 9, 64), (2, 8, 9, 32)), A100, "takes one head_dim for Q and K and"),
        # check_last_dim_stride_equals_1_dense
        (
            make_call(mask=(128, 128), mask_last_dim_contiguous=False),
            A100,
            "needs the last dimension of Q, K, V and the mask contiguous",
        ),
        (make_call((2, 8, 9, 8), last_dim_contiguous=False), A100, "needs the last dimension"),
        # check_batch_size_and_num_heads_dense<supports_gqa = false>
        (make_call(k=(2, 2, 128, 64), enable_gqa=True), A100, "takes no grouped heads"),
        # less_than_sm80_mem_efficient_dtypes and the other
        (make_call(), T4, "takes float16, float32 only, got bfloat16"),
        (make_call(dtype="float64"), A100, f"takes {HALF_AND_FLOAT} only, got float64"),
        (make_call((2, 8, 0, 64)), A100, "takes no empty sequences"),
        (make_call((8, 128, 64)), A100, "takes Q, K and V with 4 dimensions only"),
    ],
)
def test_efficient_rejects(call: SdpaCall, capability: tuple[int, int], rule: str) -> None:
    choice = choose_backend(call, compute_capability=capability)
    assert choice.rejected[Backend.EFFICIENT].startswith(f"efficient {rule}")


@pytest.mark.parametrize(
    ("call", "capability"),
    [
        (make_call(dtype="float32"), H100),
        (make_call((2, 8, 9, 62), dtype="float32"), T4),  # no tensor cores, no alignment
        (make_call(dtype="float16"), T4),
        (make_call(mask=(128, 128)), A100),
        (make_call(mask=(2, 1, 1, 128), mask_dtype="bfloat16", mask_requires_grad=True), H100),
        (make_call((2, 8, 9, 192), v=(2, 8, 9, 128)), A100),
        (make_call((2, 8, 9, 512)), H100),
        (make_call(k=(2, 8, 100, 64), is_causal=True), A100),
        (make_call(mask=(128, 128), dropout=0.1), H100),
    ],
)
def test_efficient_takes(call: SdpaCall, capability: tuple[int, int]) -> None:
    assert choose_backend(call, compute_capability=capability).backend is Backend.EFFICIENT


@pytest.mark.parametrize(
    ("call", "capability", "rule"),
    [
        # check_dtypes_low_precision
        (make_call(dtype="float32"), H100, "takes float16, bfloat16 only, got float32"),
        # check_attn_mask_shape
        (
            make_call(mask=(128, 128), mask_dtype="bfloat16", mask_requires_grad=True),
            H100,
            "computes no gradient of a mask",
        ),
        (make_call(mask=(8, 128, 128)), H100, "takes masks of shape (Tq, Tk) or (B, H, Tq, Tk)"),
        (make_call(mask=(128, 100)), H100, "takes masks of shape (Tq, Tk) or (B, H, Tq, Tk)"),
        (make_call(mask=(3, 1, 1, 128)), H100, "takes masks of shape (Tq, Tk) or (B, H, Tq, Tk)"),
        # check_cudnn_hardware_support
        (make_call(dtype="float16"), V100, "runs on compute capability 8.0 to 12.1 only, got 7.0"),
        # check_cudnn_dropout
        (make_call(dropout=0.1), H100, "takes dropout in sixteenths only, got 0.1"),
        # check_cudnn_tensor_shapes
        (make_call((65536, 1, 9, 8)), H100, "takes batches and heads up to 65535 only, got 65536"),
        (make_call((2, 8, 9, 264)), H100, "takes head_dim up to 256 only, got 264 and 264"),
        (make_call((2, 8, 9, 136)), B200, "takes head_dim up to 128 only, got 136 and 136"),
        (make_call((2, 8, 9, 60)), H100, "takes multiples of 8 as head_dim only, got 60 and 60"),
        (make_call(k=(2, 8, 1, 64)), H100, "takes no single key"),
        (
            make_call((2, 8, 1, 64), (2, 8, 9, 64), dropout=0.5),
            H100,
            "takes no single query with dropout",
        ),
        (make_call(k=(2, 2, 128, 64)), H100, "takes grouped heads only with enable_gqa"),
        (make_call((2, 8, 0, 64)), H100, "takes no empty sequences"),
    ],
)
def test_cudnn_rejects(call: SdpaCall, capability: tuple[int, int], rule: str) -> None:
    choice = choose_backend(call, compute_capability=capability)
    assert choice.rejected[Backend.CUDNN].startswith(f"cudnn {rule}")


@pytest.mark.parametrize(
    ("call", "capability"),
    [
        (make_call((2, 8, 9, 256)), H100),
        (make_call((2, 8, 9, 192), v=(2, 8, 9, 128)), B200),  # DeepSeek's
        (make_call(mask=(2, 1, 1, 128)), H100),
        (make_call(mask=(1, 128)), H100),
        (make_call(dropout=0.125), H100),
        (make_call(k=(2, 8, 100, 64), is_causal=True), H100),
        (make_call(k=(2, 4, 9, 64), v=(2, 2, 9, 64), enable_gqa=True), H100),
        (make_call((2, 8, 1, 64), (2, 8, 9, 64)), H100),
    ],
)
def test_cudnn_takes(call: SdpaCall, capability: tuple[int, int]) -> None:
    assert choose_backend(call, compute_capability=capability).backend is Backend.CUDNN


def test_math_is_left_for_masked_grouped_heads_before_hopper() -> None:
    call = make_call(k=(2, 2, 128, 64), enable_gqa=True, mask=(128, 128))
    assert choose_backend(call, compute_capability=A100).backend is Backend.MATH
    assert choose_backend(call, compute_capability=H100).backend is Backend.CUDNN


def test_cudnn_comes_after_math_where_it_is_not_preferred() -> None:
    call = make_call(k=(2, 2, 128, 64), enable_gqa=True, mask=(128, 128))
    enabled = frozenset(Backend) - {Backend.MATH}
    assert choose_backend(call, compute_capability=A100, enabled=enabled).backend is Backend.CUDNN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_dtype": "bool"}, r"a mask has a dtype and a shape, got 'bool' and None; give both"),
        ({"mask_shape": (9, 9)}, r"a mask has a dtype and a shape, got None and \(9, 9\)"),
        ({"dropout": 1.5}, r"dropout is a probability from 0 to 1, got 1.5"),
    ],
)
def test_impossible_calls_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_call(**arguments)
