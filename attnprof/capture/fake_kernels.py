"""Give the results of fake kernels the layout and the bytes that the real kernels give them.

Torch's fake kernels promise shape and dtype. Some differ from the kernels they stand for in the
order of dimensions in memory, which decides where a copy is made later, or know nothing of storage
that is larger than the tensor in it, as when a kernel makes its losses in full and then reduces
them in place. Found by running every operator of torch 2.13 both ways.
"""

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes

Mend = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Takes a fake kernel's result and the op's arguments, and returns the result to have."""


def mend_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Return the result of a fake kernel as the kernel for the CPU would leave it."""
    mend = _MENDS.get(func)
    return result if mend is None else mend(result, args, kwargs)


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


_MENDS: dict[Any, Mend] = {
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
