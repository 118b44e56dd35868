"""Memory that attention kernels and cuBLAS take inside an op: no tensor of the program shows it.

The formulas are those of torch 2.13.0, read in its source and compared, byte for byte, with what
its CUDA build asks of the caching allocator. No GPU was there: the build ran on a stand-in for the
CUDA runtime, which counts memory and computes nothing. They are not yet measured on hardware.

Each function returns buffers by name, in bytes as requested (the allocator rounds them up). They
live together, from before the kernel is launched until the op returns. Sources:
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/attention.cu
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/attention_backward.cu
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/cuda/CublasHandlePool.cpp

Symbols: B batch, H query heads, Hkv key heads, Tq and Tk lengths, D head_dim, Dv that of V.

Known limitations:
    cuDNN asks its own heuristics how much workspace it wants, so there is no formula for it.
    Copies that `scaled_dot_product_attention` makes before the kernel (bool masks to float ones,
    head_dim or masks padded to a multiple of 8) are tensors of the program and not listed here.
"""

import re

from attnprof.theory.sdpa import Capability, SdpaCall

_INT64_BYTES = 8
_FLOAT_BYTES = 4
_HALF_BYTES = 2


def list_flash_forward_buffers(call: SdpaCall, *, multiprocessors: int = 132) -> dict[str, int]:
    """Return what flash attention's forward takes: partial results, if it splits the keys.

    It splits them when B · H · Tq is too small to keep the GPU busy, as in decoding, and nothing is
    dropped. With S splits, each a float32: ``lse_accum`` S · B · H · Tq and ``out_accum``
    S · B · H · Tq · D, D rounded up to 32 (above 128 to 64). A single query of grouped heads counts
    as H / Hkv queries of Hkv heads, which is the same number of floats (``set_params_splitkv``).

    Args:
        call: A call that takes flash attention.
        multiprocessors: Of the GPU; an H100 or H200 has 132, an A100 108.
    """
    if call.dropout:
        return {"random_state": 2 * _INT64_BYTES}  # seed and offset
    batch, heads, q_len, _ = call.q_shape
    kv_heads, k_len = call.k_shape[1:3]
    if q_len == 1 and heads > kv_heads:
        heads, q_len = kv_heads, heads // kv_heads
    head_dim = _round_up(call.q_shape[3], 8)
    key_block = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
    splits = _count_splits(
        tiles=batch * heads * _divide_up(q_len, 64),
        # Blocks have 128 threads, so two of them fit.
        slots=2 * multiprocessors,
        key_blocks=_divide_up(k_len, key_block),
    )
    if splits == 1:
        return {}
    rows = splits * batch * heads * q_len
    return {
        "lse_accum": rows * _FLOAT_BYTES,
        "out_accum": rows * _round_head_dim(head_dim) * _FLOAT_BYTES,
    }


def list_flash_backward_buffers(
    call: SdpaCall,
    *,
    out_contiguous: bool = True,
    grad_contiguous: bool = True,
    deterministic: bool = False,
    multiprocessors: int = 132,
) -> dict[str, int]:
    """Return what flash attention's backward takes (``mha_bwd``).

    With T = Tq rounded up to 128: ``softmax_d`` B · H · T float32, ``dq_accum`` B · T · H · D
    float32, D rounded up to 32 (above 128 to 64). With grouped heads, ``dk_expanded`` and
    ``dv_expanded``: B · Tk · H · D each, in the inputs' dtype.

    Args:
        call: A call that takes flash attention.
        out_contiguous: Whether the output lies in memory as (B, Tq, H, D). It does where Q does; if
            Q lies as (B, H, Tq, D), it is copied: ``out_copy``.
        grad_contiguous: Whether the output's gradient does; if not: ``grad_out_copy``.
        deterministic: Whether ``torch.use_deterministic_algorithms`` is on: there are
            ceil(multiprocessors / (B · H)) of ``dq_accum`` then.
        multiprocessors: Of the GPU; an H100 or H200 has 132, an A100 108.
    """
    batch, heads, q_len, _ = call.q_shape
    kv_heads, k_len = call.k_shape[1:3]
    head_dim = _round_up(call.q_shape[3], 8)
    rows = batch * heads * _round_up(q_len, 128)
    copies = _divide_up(multiprocessors, max(batch * heads, 1)) if deterministic else 1
    buffers = {
        "softmax_d": rows * _FLOAT_BYTES,
        "dq_accum": copies * rows * _round_head_dim(head_dim) * _FLOAT_BYTES,
    }
    if heads != kv_heads:
        expanded_bytes = batch * k_len * heads * head_dim * _HALF_BYTES
        buffers |= {"dk_expanded": expanded_bytes, "dv_expanded": expanded_bytes}
    out_bytes = batch * heads * q_len * head_dim * _HALF_BYTES
    if not out_contiguous:
        buffers["out_copy"] = out_bytes
    if not grad_contiguous:
        buffers["grad_out_copy"] = out_bytes
    return buffers


def list_efficient_forward_buffers(call: SdpaCall) -> dict[str, int]:
    """Return what memory-efficient attention's forward takes.

    ``out_accum``, B · Tq · H · Dv float32, for 16-bit inputs whose D or Dv is above 128: then a
    block's output does not fit into registers (``kNeedsOutputAccumulatorBuffer``).
    """
    batch, heads, q_len, head_dim = call.q_shape
    v_dim = call.v_shape[3]
    if call.dtype == "float32" or max(head_dim, v_dim) <= 128:
        return {}
    return {"out_accum": batch * q_len * heads * v_dim * _FLOAT_BYTES}


def list_efficient_backward_buffers(
    call: SdpaCall,
    *,
    compute_capability: Capability = (9, 0),
    grad_contiguous: bool = True,
    deterministic: bool = False,
) -> dict[str, int]:
    """Return what memory-efficient attention's backward takes (``_efficient_attention_backward``).

    ``delta``, B · H · Tq float32, and ``workspace``: per head, one tile of dQ with a 16-byte lock
    for every I queries and J columns, I · J float32 each; and where dK and dV do not fit into
    registers, S · J · (D + Dv) float32, D and Dv rounded up to I. I and J belong to the kernel;
    S is the number of blocks of J keys, at most 200 / (B · H).

    In float32, ``delta`` is made from a product as large as the output, ``grad_times_out``, which
    is gone before the workspace is taken; the larger of the two is returned.

    Args:
        call: A call that takes memory-efficient attention, with B up to 65535.
        compute_capability: CUDA's (major, minor), from 7.5 on.
        grad_contiguous: Whether the output's gradient lies in memory as (B, Tq, H, Dv); if not, it
            is copied: ``grad_out_copy``.
        deterministic: Whether ``torch.use_deterministic_algorithms`` is on: S is 1 then.
    """
    batch, heads, q_len, _ = call.q_shape
    v_dim = call.v_shape[3]
    is_float = call.dtype == "float32"
    out_bytes = batch * heads * q_len * v_dim * (_FLOAT_BYTES if is_float else _HALF_BYTES)
    delta_bytes = batch * heads * q_len * _FLOAT_BYTES
    workspace_bytes = _count_efficient_workspace(call, compute_capability, deterministic)
    buffers = {"grad_out_copy": out_bytes} if not grad_contiguous else {}
    # (B, Tq, H) -> (B, H, Tq): with one head or one query the order of elements stays.
    transposed_bytes = delta_bytes if heads > 1 and q_len > 1 else 0
    if is_float and out_bytes + transposed_bytes > workspace_bytes:
        buffers |= {"grad_times_out": out_bytes, "delta_transposed": transposed_bytes}
    else:
        buffers["workspace"] = workspace_bytes
    return buffers | {"delta": delta_bytes}


def find_cublas_workspace_bytes(
    compute_capability: Capability, *, workspace_config: str | None = None
) -> int:
    """Return what cuBLAS keeps from the first matrix product on, per thread and stream.

    32 MiB on compute capability 9, 10 and 12, else 8.125 MiB (``parseChosenWorkspaceSize``). It is
    live until the process ends. Autograd multiplies on a thread of its own, so a program that
    trains holds two. cuBLASLt shares it, unless ``TORCH_CUBLASLT_UNIFIED_WORKSPACE=0``.

    Args:
        compute_capability: CUDA's (major, minor).
        workspace_config: The value of ``CUBLAS_WORKSPACE_CONFIG``: ``":SIZE:COUNT"``, any number
            of times, SIZE in KiB. What cannot be read counts as absent, as in torch.
    """
    sizes = re.findall(r":([0-9]+):([0-9]+)", workspace_config or "")
    if sizes:
        return sum(int(size) * int(count) for size, count in sizes) * 1024
    if compute_capability[0] in (9, 10, 12):
        return 32 * 2**20
    return (2 * 4096 + 8 * 16) * 1024


def _count_splits(*, tiles: int, slots: int, key_blocks: int) -> int:
    """Return into how many parts the keys are split (``num_splits_heuristic``).

    The fewest that keep at least 85 % as many slots busy as the best number would.
    """
    if tiles >= 0.8 * slots:
        return 1
    busy = {}
    for splits in range(1, min(128, slots, key_blocks) + 1):
        # Numbers that leave the blocks per split as they were change nothing.
        if splits > 1 and _divide_up(key_blocks, splits) == _divide_up(key_blocks, splits - 1):
            continue
        waves = tiles * splits / slots
        busy[splits] = waves / _divide_up(tiles * splits, slots)
    best = max(busy.values(), default=0.0)
    return next((splits for splits, share in busy.items() if share >= 0.85 * best), 1)


def _count_efficient_workspace(call: SdpaCall, capability: Capability, deterministic: bool) -> int:
    """Follow ``workspace_size`` in kernel_backward.h."""
    batch, heads, q_len, head_dim = call.q_shape
    k_len, v_dim = call.k_shape[2], call.v_shape[3]
    rows, columns, accumulates = _choose_efficient_tile(call, capability)
    splits = _divide_up(k_len, columns)
    if batch * heads >= 256 and k_len <= 2 * columns:
        splits = 1
    if accumulates:
        splits = min(splits, 200 // (batch * heads))
    splits = 1 if deterministic else max(splits, 1)
    tiles = _divide_up(q_len, rows) * _divide_up(head_dim, columns)
    size_bytes = tiles * (16 + rows * columns * _FLOAT_BYTES)
    if accumulates:
        floats = splits * columns * (_round_up(head_dim, rows) + _round_up(v_dim, rows))
        size_bytes += floats * _FLOAT_BYTES
    return batch * heads * size_bytes


def _choose_efficient_tile(call: SdpaCall, capability: Capability) -> tuple[int, int, bool]:
    """Return the kernel's queries and keys per block, and whether it accumulates dK and dV.

    Kernels are tried from the smallest head_dim and the largest block on; each is skipped that
    needs more shared memory than a block can have, which is 99 KiB on compute capability 8.6, 8.9
    and 12 and at least 163 KiB elsewhere from 8.0 on. Which kernels there are:
    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernels/generate_kernels.py
    """
    head_dim = max(call.q_shape[3], call.v_shape[3])
    is_large_chip = capability >= (8, 0) and capability[0] != 12
    is_large_chip = is_large_chip and capability not in ((8, 6), (8, 9))
    if head_dim <= 64:
        return 64, 64, False
    if call.dtype == "float32":
        return 128 if is_large_chip else 64, 64, False
    if head_dim > 128:
        return 128, 64, True
    if capability < (8, 0):
        return 128, 64, False
    if is_large_chip:
        return 128, 128, False
    if capability in ((8, 6), (8, 9)) and head_dim <= 96 and not call.dropout:
        return 128, 64, False
    return 64, 64, True


def _round_head_dim(head_dim: int) -> int:
    return _round_up(head_dim, 32 if head_dim <= 128 else 64)


def _divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _round_up(number: int, multiple: int) -> int:
    return _divide_up(number, multiple) * multiple
