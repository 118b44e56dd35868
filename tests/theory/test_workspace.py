"""What kernels take inside an op: by hand, and against what torch's own code allocated."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnprof.theory.sdpa import SdpaCall
from attnprof.theory.workspace import (
    find_cublas_workspace_bytes,
    list_efficient_backward_buffers,
    list_efficient_forward_buffers,
    list_flash_backward_buffers,
    list_flash_forward_buffers,
)

RECORDED = Path(__file__).parents[1] / "oracle" / "workspace.json"
CASES = [json.loads(line) for line in RECORDED.read_text().splitlines()]
MIB = 2**20
B, H, n = 2, 8, 1000


def make_call(
    head_dim: int = 64,
    *,
    kv_heads: int = H,
    v_dim: int | None = None,
    dtype: str = "bfloat16",
    **rest: Any,
) -> SdpaCall:
    k_shape = (B, kv_heads, n, head_dim)
    v_shape = (B, kv_heads, n, v_dim or head_dim)
    return SdpaCall(
        dtype=dtype, q_shape=(B, H, n, head_dim), k_shape=k_shape, v_shape=v_shape, **rest
    )


def make_decoding(heads: int, kv_heads: int, k_len: int, head_dim: int) -> SdpaCall:
    kv_shape = (1, kv_heads, k_len, head_dim)
    return SdpaCall(
        dtype="bfloat16", q_shape=(1, heads, 1, head_dim), k_shape=kv_shape, v_shape=kv_shape
    )


def sum_blocks(buffers: dict[str, int]) -> int:
    """Return what the allocator gives for the buffers: each in blocks of 512 bytes."""
    return sum(-(-size_bytes // 512) * 512 for size_bytes in buffers.values())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_buffers_are_those_torch_allocates(case: dict[str, Any]) -> None:
    """Recorded by tests/oracle/record.py from torch's CUDA build."""
    call = SdpaCall(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in case["call"].items()},
        requires_grad=True,
    )
    rest = {name: case[name] for name in ("grad_contiguous", "deterministic")}
    if case["backend"] == "flash":
        forward = list_flash_forward_buffers(call, multiprocessors=case["multiprocessors"])
        rest |= {name: case[name] for name in ("out_contiguous", "multiprocessors")}
        backward = list_flash_backward_buffers(call, **rest)
    else:
        forward = list_efficient_forward_buffers(call)
        rest["compute_capability"] = tuple(case["capability"])
        backward = list_efficient_backward_buffers(call, **rest)
    assert [sum_blocks(forward), sum_blocks(backward)] == case["answer"]


def test_flash_forward_takes_nothing_where_the_gpu_is_busy() -> None:
    assert list_flash_forward_buffers(make_call()) == {}


def test_flash_forward_splits_the_keys_in_decoding() -> None:
    # 8 heads on 264 slots: 8192 keys are 64 blocks of 128; 32 parts of 2 keep 256 slots busy.
    call = make_decoding(heads=8, kv_heads=8, k_len=8192, head_dim=128)
    assert list_flash_forward_buffers(call) == {
        "lse_accum": 32 * 8 * 4,
        "out_accum": 32 * 8 * 128 * 4,
    }


def test_flash_forward_counts_grouped_queries_as_queries_of_one_head() -> None:
    call = make_decoding(heads=32, kv_heads=8, k_len=8192, head_dim=128)
    assert list_flash_forward_buffers(call)["out_accum"] == 32 * 8 * (32 // 8) * 128 * 4


def test_flash_forward_does_not_split_with_dropout() -> None:
    call = make_decoding(heads=8, kv_heads=8, k_len=8192, head_dim=128)
    dropping = SdpaCall(
        dtype=call.dtype,
        q_shape=call.q_shape,
        k_shape=call.k_shape,
        v_shape=call.v_shape,
        dropout=0.5,
    )
    assert list_flash_forward_buffers(dropping) == {"random_state": 2 * 8}


def test_flash_backward_accumulates_in_float32() -> None:
    assert list_flash_backward_buffers(make_call()) == {
        "softmax_d": B * H * 1024 * 4,  # 1000 queries, rounded up to 128
        "dq_accum": B * 1024 * H * 64 * 4,
    }


@pytest.mark.parametrize(
    ("head_dim", "rounded"), [(60, 64), (64, 64), (72, 96), (128, 128), (136, 192), (256, 256)]
)
def test_flash_backward_rounds_head_dim_up(head_dim: int, rounded: int) -> None:
    buffers = list_flash_backward_buffers(make_call(head_dim))
    assert buffers["dq_accum"] == B * 1024 * H * rounded * 4


def test_flash_backward_expands_grouped_heads() -> None:
    buffers = list_flash_backward_buffers(make_call(kv_heads=2))
    assert buffers["dk_expanded"] == buffers["dv_expanded"] == B * n * H * 64 * 2


def test_flash_backward_copies_what_lies_otherwise() -> None:
    call = make_call()
    buffers = list_flash_backward_buffers(call, out_contiguous=False, grad_contiguous=False)
    assert buffers["out_copy"] == buffers["grad_out_copy"] == B * n * H * 64 * 2


def test_flash_backward_keeps_more_accumulators_when_deterministic() -> None:
    once = list_flash_backward_buffers(make_call())["dq_accum"]
    buffers = list_flash_backward_buffers(make_call(), deterministic=True, multiprocessors=132)
    assert buffers["dq_accum"] == -(-132 // (B * H)) * once


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (make_call(128), {}),
        (make_call(256), {"out_accum": B * n * H * 256 * 4}),
        (make_call(64, v_dim=256), {"out_accum": B * n * H * 256 * 4}),
        (make_call(256, v_dim=64), {"out_accum": B * n * H * 64 * 4}),
        (make_call(256, dtype="float32"), {}),
    ],
)
def test_efficient_forward_accumulates_large_heads(
    call: SdpaCall, expected: dict[str, int]
) -> None:
    assert list_efficient_forward_buffers(call) == expected


def test_efficient_backward_keeps_a_tile_of_dq_per_64_queries() -> None:
    tile_bytes = 16 + 64 * 64 * 4
    assert list_efficient_backward_buffers(make_call()) == {
        "delta": B * H * n * 4,
        "workspace": B * H * 16 * tile_bytes,  # 1000 queries in 16 blocks
    }


def test_efficient_backward_accumulates_dk_and_dv_of_large_heads() -> None:
    tiles_bytes = 8 * 4 * (16 + 128 * 64 * 4)  # of 128 queries and 64 columns
    splits = 200 // (B * H)
    kv_bytes = splits * 64 * (256 + 256) * 4
    buffers = list_efficient_backward_buffers(make_call(256))
    assert buffers["workspace"] == B * H * (tiles_bytes + kv_bytes)


def test_efficient_backward_takes_smaller_blocks_on_small_chips() -> None:
    large, small = (
        list_efficient_backward_buffers(make_call(128), compute_capability=capability)["workspace"]
        for capability in ((8, 0), (8, 6))
    )
    assert large == B * H * 8 * (16 + 128 * 128 * 4)
    kv_bytes = 12 * 64 * (128 + 128) * 4
    assert small == B * H * (16 * 2 * (16 + 64 * 64 * 4) + kv_bytes)


def test_efficient_backward_multiplies_gradient_and_output_in_float32() -> None:
    # The product is gone before the workspace is taken; the larger of the two counts.
    call = make_call(64, v_dim=256, dtype="float32")
    assert list_efficient_backward_buffers(call) == {
        "grad_times_out": B * n * H * 256 * 4,
        "delta_transposed": B * H * n * 4,
        "delta": B * H * n * 4,
    }
    assert "workspace" in list_efficient_backward_buffers(make_call(dtype="float32"))


@pytest.mark.parametrize(
    ("capability", "config", "expected"),
    [
        ((8, 0), None, (2 * 4096 + 8 * 16) * 1024),
        ((7, 5), None, (2 * 4096 + 8 * 16) * 1024),
        ((9, 0), None, 32 * MIB),
        ((10, 0), None, 32 * MIB),
        ((12, 0), None, 32 * MIB),
        ((11, 0), None, (2 * 4096 + 8 * 16) * 1024),
        ((9, 0), ":4096:2:16:8", (2 * 4096 + 8 * 16) * 1024),
        ((9, 0), ":16:8", 8 * 16 * 1024),
        ((9, 0), "nonsense", 32 * MIB),
    ],
)
def test_cublas_keeps_a_workspace(
    capability: tuple[int, int], config: str | None, expected: int
) -> None:
    assert find_cublas_workspace_bytes(capability, workspace_config=config) == expected
