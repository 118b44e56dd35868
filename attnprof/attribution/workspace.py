"""Workspace of a dry run: what CUDA's kernels take inside themselves, from their formulas.

A real run's allocator sees it. A dry run has no kernels, but knows which ones would run on which
shapes, and `attnprof.theory.workspace` says what they take. These blocks are not exact.

Known limitations:
    cuDNN's attention chooses its own workspace; none is added for it.
    Dropout is not known to a recorded op; with it, flash attention never splits the keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnprof.attribution.blocks import CUDA_BLOCK_BYTES, Blocks
from attnprof.attribution.facts import Facts
from attnprof.attribution.products import LINEARS, PRODUCTS
from attnprof.theory.sdpa import Capability, SdpaCall
from attnprof.theory.workspace import (
    find_cublas_workspace_bytes,
    list_efficient_backward_buffers,
    list_efficient_forward_buffers,
    list_flash_backward_buffers,
    list_flash_forward_buffers,
)

NO_STORAGE = -1
"""`Blocks.storage` of memory that no tensor holds."""

_FLASH = "_scaled_dot_product_flash_attention"
_EFFICIENT = "_scaled_dot_product_efficient_attention"


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that an op takes inside itself."""

    op: int
    size_bytes: int
    stays: bool
    """Whether it is kept for later ops, as cuBLAS keeps its workspace."""


def find_buffers(facts: Facts, about: dict[str, Any] | None) -> list[Buffer]:
    """Return the workspace of a dry run for CUDA, in the order of ops; none for other runs.

    Args:
        facts: The run's facts.
        about: ``dry_run`` of its run.json, if it has one.
    """
    capability = (about or {}).get("compute_capability")
    if not capability:
        return []
    major, minor = capability
    buffers = [*_list_attention(facts, (major, minor)), *_list_cublas(facts, (major, minor))]
    return sorted(buffers, key=lambda buffer: buffer.op)


def _list_attention(facts: Facts, capability: Capability) -> Iterator[Buffer]:
    names = np.array(facts.short_names, object)[facts.code]
    for op in np.flatnonzero(np.char.startswith(names.astype(str), "_scaled_dot_product")).tolist():
        name, rows = str(names[op]), facts.rows_in(op)
        if name == _FLASH:
            sizes = list_flash_forward_buffers(_read_call(facts, rows[0]))
        elif name == _EFFICIENT:
            sizes = list_efficient_forward_buffers(_read_call(facts, rows[0]))
        elif name == f"{_FLASH}_backward":  # of dO, Q, K, V, O and the log-sum-exp
            sizes = list_flash_backward_buffers(
                _read_call(facts, rows[1]),
                out_contiguous=_is_token_major(facts, rows[4]),
                grad_contiguous=_is_token_major(facts, rows[0]),
            )
        elif name == f"{_EFFICIENT}_backward":
            sizes = list_efficient_backward_buffers(
                _read_call(facts, rows[1]),
                compute_capability=capability,
                grad_contiguous=_is_token_major(facts, rows[0]),
            )
        else:
            continue
        yield from (Buffer(op, size, stays=False) for size in sizes.values() if size)


def _list_cublas(facts: Facts, capability: Capability) -> Iterator[Buffer]:
    """Yield what cuBLAS takes at the first product of each thread: the program's and autograd's."""
    is_product = np.array([n in PRODUCTS or n in LINEARS for n in facts.short_names] or [False])
    ops = np.flatnonzero(is_product[facts.code])
    size = find_cublas_workspace_bytes(capability)
    for own in (ops[~facts.is_backward[ops]], ops[facts.is_backward[ops]]):
        if len(own):
            yield Buffer(int(own[0]), size, stays=True)


def _read_call(facts: Facts, first_row: int) -> SdpaCall:
    q, k, v = (facts.signature_of(first_row + i) for i in range(3))
    return SdpaCall(q.dtype, tuple(q.shape), tuple(k.shape), tuple(v.shape))


def _is_token_major(facts: Facts, row: int) -> bool:
    """Return whether a (B, H, T, D) tensor lies in memory as (B, T, H, D) without gaps."""
    signature = facts.signature_of(row)
    batch, heads, length, head_dim = signature.shape
    expected = (length * heads * head_dim, head_dim, heads * head_dim, 1)
    return all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(
            (batch, heads, length, head_dim), signature.stride, expected, strict=True
        )
    )


def add_buffers(blocks: Blocks, facts: Facts, buffers: list[Buffer]) -> Blocks:
    """Return the blocks with the buffers behind them.

    A buffer is live together with what its op returns: from the op's last event up to the next.
    """
    if not buffers:
        return blocks
    events = facts.events["op"]
    op = np.array([buffer.op for buffer in buffers], np.int64)
    stays = np.array([buffer.stays for buffer in buffers], np.bool_)
    requested = np.array([buffer.size_bytes for buffer in buffers], np.int64)
    start = np.maximum(np.searchsorted(events, op, "right") - 1, 0)
    time_ns = facts.time_ns[op]
    more = {
        "storage": np.full(len(op), NO_STORAGE, np.int64),
        "size_bytes": -(-requested // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES,
        "requested_bytes": requested,
        "address": np.zeros(len(op), np.int64),
        "device": np.full(len(op), _find_cuda(facts), np.int64),
        "start": start,
        "end": np.where(stays, len(events), start + 1),
        "start_ns": time_ns,
        "end_ns": np.where(stays, -1, time_ns),
        "op": op,
        "at_op": op,
        "signature": np.full(len(op), -1, np.int64),
        "is_found": np.zeros(len(op), np.bool_),
        "is_freed": ~stays,
    }
    return replace(
        blocks, **{name: np.concatenate([getattr(blocks, name), own]) for name, own in more.items()}
    )


def _find_cuda(facts: Facts) -> int:
    return next(i for i, name in enumerate(facts.devices) if name.startswith("cuda"))
