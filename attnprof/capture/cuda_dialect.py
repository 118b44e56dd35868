"""Make a program on fake CPU tensors call the kernels that it would call on CUDA.

Where torch takes another kernel on CUDA, other tensors exist: `scaled_dot_product_attention` has
fused kernels with rules of their own, dropout keeps a bool mask instead of a float one, and
optimizers work on all parameters at once. CUDA's own fused operators have fake kernels, so a
program can be led to them without a GPU and makes exactly the tensors that CUDA would make.

Source of the steps around each kernel, torch 2.13: ``scaled_dot_product_attention`` and
``_scaled_dot_product_attention_math`` in aten/src/ATen/native/transformers/attention.cpp,
``dropout_impl`` in aten/src/ATen/native/Dropout.cpp.

Known limitations:
    Autocast follows the CPU's list of operators; it is said when it was on.
    Dropout that C++ code applies by itself (inside a recurrent layer, say) stays the CPU's.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from attnprof.theory.sdpa import Backend, SdpaCall, choose_backend

aten = torch.ops.aten

_FLASH_ALIGNMENT = 8
"""Flash attention pads the head dimension to a multiple of this (``pad_last_dim<8>``)."""
_MASK_ALIGNMENT = 8
"""Memory-efficient attention pads a mask whose rows are no multiple of this (``pad_bias<8>``)."""


class CudaDialect(TorchFunctionMode):
    """Leads functions that CUDA carries out differently to CUDA's operators."""

    def __init__(self, compute_capability: tuple[int, int], assumed: dict[str, None]) -> None:
        """Choose kernels as a GPU of this compute capability would.

        Args:
            compute_capability: CUDA's (major, minor).
            assumed: Gets a line for everything chosen, in order.
        """
        super().__init__()
        self._assumed = assumed
        self._compute_capability = compute_capability
        self._adds_batch = _adds_batch()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call what CUDA calls for ``func``."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in (functional.dropout, torch.dropout):
            return _drop_out(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if self._adds_batch and {query.dim(), key.dim(), value.dim()} == {3}:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            if attn_mask is not None and attn_mask.dim() == 3:
                attn_mask = attn_mask.unsqueeze(0)
            options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
            return self._attend(query, key, value, *options).squeeze(0)
        call = _describe(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        choice = choose_backend(
            call, compute_capability=self._compute_capability, enabled=_list_enabled()
        )
        self._assumed[f"scaled_dot_product_attention: {choice.backend} ({choice.reason})"] = None
        if torch.is_autocast_enabled("cpu"):
            self._assumed["autocast followed the CPU's list of operators, not CUDA's"] = None
        mask = _to_float_mask(attn_mask, query.dtype)
        keeps_lse = call.requires_grad
        if choice.backend is Backend.FLASH:
            return _attend_flash(query, key, value, dropout_p, is_causal, scale)
        if choice.backend is Backend.EFFICIENT:
            mask = _align_mask(mask, query, key)
            op = aten._scaled_dot_product_efficient_attention.default
            rest = {"scale": scale}
            return op(query, key, value, mask, keeps_lse, dropout_p, is_causal, **rest)[0]
        if choice.backend is Backend.CUDNN:
            op = aten._scaled_dot_product_cudnn_attention.default
            rest = {"scale": scale}
            return op(query, key, value, mask, keeps_lse, dropout_p, is_causal, False, **rest)[0]
        if dropout_p:
            return _attend_math(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
        math_op = aten._scaled_dot_product_attention_math.default
        rest = {"scale": scale, "enable_gqa": enable_gqa}
        return math_op(query, key, value, mask, 0.0, is_causal, None, **rest)[0]


@cache
def _adds_batch() -> bool:
    """Return whether this torch gives Q, K and V of three dimensions a batch of one.

    Torch 2.15 does, before it chooses a kernel, on every device; 2.13 and older send them to math.
    """
    with _disable_current_modes():
        q = torch.zeros(1, 1, 1)
        choice: int = torch._fused_sdp_choice(q, q, q)
    return choice != SDPBackend.MATH.value


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    enable_gqa: bool,
) -> SdpaCall:
    is_training = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return SdpaCall(
        dtype=_name(query.dtype),
        q_shape=tuple(query.shape),
        k_shape=tuple(key.shape),
        v_shape=tuple(value.shape),
        mask_dtype=None if mask is None else _name(mask.dtype),
        mask_shape=None if mask is None else tuple(mask.shape),
        mask_requires_grad=mask is not None and mask.requires_grad,
        dropout=dropout,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        requires_grad=is_training,
        last_dim_contiguous=all(t.stride(-1) == 1 for t in (query, key, value)),
        mask_last_dim_contiguous=mask is None or mask.stride(-1) == 1,
    )


def _list_enabled() -> list[Backend]:
    """Return the backends that the program has not switched off (``sdpa_kernel``)."""
    switches: dict[Backend, Callable[[], bool]] = {
        Backend.FLASH: torch.backends.cuda.flash_sdp_enabled,
        Backend.EFFICIENT: torch.backends.cuda.mem_efficient_sdp_enabled,
        Backend.CUDNN: torch.backends.cuda.cudnn_sdp_enabled,
        Backend.MATH: torch.backends.cuda.math_sdp_enabled,
    }
    return [backend for backend, is_on in switches.items() if is_on()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_float_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return 0 where a bool mask lets through and −inf elsewhere; other masks as they are."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    zero = torch.scalar_tensor(0.0, dtype=dtype, device=mask.device)
    barred = torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device)
    return torch.where(mask, zero, barred)


def _align_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    k_len = key.shape[-2]
    missing = -mask.shape[-1] % _MASK_ALIGNMENT
    if missing:
        mask = functional.pad(mask, (0, missing))[..., :k_len]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], k_len)


def _attend_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    head_dim = query.shape[-1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    missing = -head_dim % _FLASH_ALIGNMENT
    if missing:
        query, key, value = (functional.pad(t, (0, missing)) for t in (query, key, value))
    op = aten._scaled_dot_product_flash_attention.default
    result: Tensor = op(query, key, value, dropout, is_causal, False, scale=scale)[0]
    return result[..., :head_dim] if missing else result


def _attend_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Do what the math path does, with the dropout of CUDA in it."""
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = (t.to(torch.float32) for t in (query, key, value))
    q_len, k_len = query.shape[-2], key.shape[-2]
    if is_causal:
        allowed = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril()
        mask = _to_float_mask(allowed, query.dtype)
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(group, dim=-3) for t in (key, value))
    factor = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    # (B, H, Tq, D) @ (B, H, D, Tk) -> (B, H, Tq, Tk)
    scores = (query * factor).matmul((key * factor).transpose(-2, -1))
    if mask is not None:
        scores.add_(mask)
    weights = aten._safe_softmax.default(scores, -1)
    dropped: Tensor = aten.native_dropout.default(weights, dropout, True)[0]
    return dropped.matmul(value).to(dtype)


def _drop_out(
    func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Keep a bool mask, as CUDA's fused kernel does where there is something to drop."""
    if not training or not 0 < p < 1 or inplace or not input.numel():
        return (
            func(input, p, training) if func is torch.dropout else func(input, p, training, inplace)
        )
    return aten.native_dropout.default(input, p, True)[0]
