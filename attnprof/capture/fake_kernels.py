"""Give the results of fake kernels the layout and the bytes that the real kernels give them.

Some operators have no fake kernel. Torch then runs the real one on zeros, which takes the memory
that a dry run is there to save: what attention needs has a kernel here, and others are run so only
where they are small.

Torch's fake kernels promise shape and dtype. Some differ from the kernels they stand for in the
order of dimensions in memory, which decides where a copy is made later, or know nothing of storage
that is larger than the tensor in it, as when a kernel makes its losses in full and then reduces
them in place. Found by running every operator of torch 2.13 both ways.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedOperatorException
from torch.utils._mode_utils import no_dispatch

from attnprof.capture.fake_rules import list_tensors
from attnprof.capture.lines import find_line
from attnprof.errors import DryRunError
from attnprof.units import format_bytes

aten = torch.ops.aten
broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes

Mend = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Takes a fake kernel's result and the op's arguments, and returns the result to have."""

_MOST_REAL_BYTES = 64 << 20
"""An operator without a fake kernel is run on real zeros if its operands are no larger."""

_FEW_STEPS = 128
"""Of an LSTM that is run for real, to learn what it keeps."""
_RNN_OPERANDS = 7
"""Tensors that an LSTM's kernel takes: the inputs, four of weights and biases, and two states."""


def run_kernel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op on fake tensors, in a fake mode that does not fall back to real kernels.

    The result is as the kernel for the CPU would leave it.

    Raises:
        DryRunError: It has no fake kernel, and its real one would need real memory.
    """
    kernel, mend = _KERNELS.get(func), _MENDS.get(func)
    if kernel is not None:
        return kernel(*args, **kwargs)
    try:
        result = func(*args, **kwargs)
        return result if mend is None else mend(result, args, kwargs)
    except UnsupportedOperatorException:
        tensors = list(list_tensors((*args, *kwargs.values())))
        mode = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
        size = sum(t.numel() * t.element_size() for t in tensors)
        if mode is None:
            raise
        if size > _MOST_REAL_BYTES:
            raise DryRunError(
                f"{func.name()} says nothing of the shapes it returns, at {find_line()}, and to "
                f"find out its kernel would need {format_bytes(size)} of real memory; register a "
                "rule with torch.library.register_fake, or measure this model for real"
            ) from None
        mode.allow_fallback_kernels = True
        try:
            return func(*args, **kwargs)
        finally:
            mode.allow_fallback_kernels = False


def _lay_out(result: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return the result contiguous, or channels last if ``like`` is."""
    memory_format = torch.contiguous_format
    if like is not None:
        memory_format = torch._prims_common.suggest_memory_format(like)
    if result.is_contiguous(memory_format=memory_format):
        return result
    return torch.empty_like(result, memory_format=memory_format)


def _hold(result: torch.Tensor, numel: int) -> torch.Tensor:
    """Return the result in a storage of so many elements, if it needs no more by itself."""
    if numel <= result.numel():
        return result
    storage = torch.empty(numel, dtype=result.dtype, device=result.device)
    return storage.as_strided(result.shape, result.stride())


def _mend_contiguous(result: torch.Tensor, args: Any, kwargs: Any) -> Any:
    return _lay_out(result)


def _mend_norm(results: tuple[torch.Tensor, ...], args: Any, kwargs: Any) -> Any:
    # aten/src/ATen/native/Normalization.cpp: empty_like(input, input.suggest_memory_format())
    return (_lay_out(results[0], args[0]), *results[1:])


def _mend_norm_backward(results: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
    first = None if results[0] is None else _lay_out(results[0], args[1])
    return (first, *results[1:])


def _mend_loss(result: torch.Tensor, args: Any, kwargs: Any) -> Any:
    # The losses of all elements, reduced into their own storage; with reduction="none", result
    # and losses have the same shape.
    return _hold(result, broadcast_shapes(args[0].shape, args[1].shape).numel())


def _mend_patches(result: torch.Tensor, args: Any, kwargs: Any) -> Any:
    return _hold(result, args[0].numel())  # made like the operand, and then resized


def _mend_window(result: torch.Tensor, args: Any, kwargs: Any) -> Any:
    is_periodic = args[1] if len(args) > 1 and isinstance(args[1], bool) else True
    return _hold(result, args[0] + 1) if is_periodic and args[0] > 1 else result


def _mend_bags(results: tuple[torch.Tensor, ...], args: Any, kwargs: Any) -> Any:
    # aten/src/ATen/native/EmbeddingBag.cpp, make_offset2bag_out and make_bag_size_out
    output, offset2bag, bag_size, max_indices = results
    if offset2bag.numel():
        offset2bag = _hold(offset2bag, args[1].numel() + 1)
    return output, offset2bag, _hold(bag_size, args[2].numel()), max_indices


def _make_grouped_product(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the result of ``_grouped_mm``, whose fake rule knows bfloat16 only.

    The kernel for the CPU takes other dtypes too; its result is the same:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_meta_registrations.py#L8560
    """
    from torch import _meta_registrations

    make: Any = _meta_registrations._create_grouped_mm_output_tensor
    result: torch.Tensor = make(a, b, offs, out_dtype or a.dtype)
    return result


def _make_masked_softmax(
    scores: torch.Tensor, mask: torch.Tensor, dim: int | None = None, mask_type: int | None = None
) -> torch.Tensor:
    # aten/src/ATen/native/SoftMax.cpp, masked_softmax_cpu: empty_like
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _make_heads(
    qkv: torch.Tensor, bias: torch.Tensor, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # (B, T, 3 * H * D) -> Q, K and V, (B, H, T, D) each, in one storage:
    # aten/src/ATen/native/transformers/attention.cpp, transform_bias_rescale_qkv_cpu
    batch, length, width = qkv.shape
    head_dim = width // 3 // num_heads
    heads = qkv.new_empty((3, batch, num_heads, length, head_dim))
    return heads[0], heads[1], heads[2]


_KERNELS: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _make_grouped_product,
    aten._masked_softmax.default: _make_masked_softmax,
    aten._transform_bias_rescale_qkv.default: _make_heads,
}


def _mend_rnn(results: tuple[torch.Tensor, ...], args: Any, kwargs: Any) -> Any:
    """Give an LSTM the workspace that it keeps for backward, whose size only oneDNN knows.

    It grows linearly with the length, but for pages, so that two short real runs tell it.
    """
    if not args[-1]:
        return (*results[:-1], None)  # in evaluation nothing is kept
    length = args[0].shape[0]
    few = min(length, _FEW_STEPS)
    operands = tuple((tensor.shape, tensor.dtype) for tensor in args[:_RNN_OPERANDS])
    options = tuple(tuple(o) if isinstance(o, list) else o for o in args[_RNN_OPERANDS:])
    size = _measure_workspace(operands, options, few)
    if length > few:
        grown = size - _measure_workspace(operands, options, few // 2)
        size += grown * (length - few) // (few - few // 2)
    return (*results[:-1], results[-1].new_empty(size))


@cache
def _measure_workspace(
    operands: tuple[tuple[torch.Size, torch.dtype], ...], options: tuple[Any, ...], length: int
) -> int:
    """Return the bytes that the real kernel keeps for a length, by running it on zeros.

    Every layer and step of a model asks again.
    """
    with no_dispatch():
        inputs, *others = (torch.zeros(shape, dtype=dtype) for shape, dtype in operands)
        kept = aten.mkldnn_rnn_layer.default(inputs[:length], *others, *options)[-1]
        size: int = kept.untyped_storage().nbytes()
    return size


_MENDS: dict[Any, Mend] = {
    aten.mkldnn_rnn_layer.default: _mend_rnn,
    aten._log_softmax_backward_data.default: _mend_contiguous,
    aten.native_dropout_backward.default: _mend_contiguous,
    aten.mse_loss_backward.default: _mend_contiguous,
    aten.smooth_l1_loss_backward.default: _mend_contiguous,
    aten.huber_loss_backward.default: _mend_contiguous,
    aten.native_batch_norm.default: _mend_norm,
    aten._native_batch_norm_legit.default: _mend_norm,
    aten._native_batch_norm_legit.no_stats: _mend_norm,
    aten._batch_norm_with_update.default: _mend_norm,
    aten.native_batch_norm_backward.default: _mend_norm_backward,
    aten.batch_norm_backward.default: _mend_norm_backward,
    aten.mse_loss.default: _mend_loss,
    aten.smooth_l1_loss.default: _mend_loss,
    aten.binary_cross_entropy.default: _mend_loss,
    aten.soft_margin_loss.default: _mend_loss,
    aten.im2col.default: _mend_patches,
    aten.col2im.default: _mend_patches,
    aten._embedding_bag.default: _mend_bags,
    aten._embedding_bag_forward_only.default: _mend_bags,
    **dict.fromkeys(
        (
            getattr(getattr(aten, f"{name}_window"), overload)
            for name in ("hann", "hamming", "blackman", "bartlett", "kaiser")
            for overload in ("default", "periodic")
        ),
        _mend_window,
    ),
}
