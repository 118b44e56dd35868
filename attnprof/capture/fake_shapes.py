"""Shapes that depend on values, where the values that matter are known and the others are not.

A result of boolean indexing has as many rows as the mask has ones, whatever it indexes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes

Find = Callable[[torch.Tensor], torch.Tensor | None]
"""Returns the values of a fake tensor, in its shape or as one number, or None."""


def run_by_values(func: Any, args: Any, kwargs: Any, find: Find) -> Any:
    """Run an op whose shape its fake kernel cannot tell; return None if that takes unknown values.

    Args:
        func: The op.
        args: Its arguments.
        kwargs: Its keyword arguments.
        find: Returns what is known of a tensor.
    """
    run = _RULES.get(func)
    return None if run is None else run(func, args, kwargs, find)


def _expand(tensor: torch.Tensor, find: Find) -> torch.Tensor | None:
    """Return the values of a tensor in its own shape."""
    values = find(tensor)
    if values is None:
        return None
    with _disable_current_modes():
        return values.expand(tensor.shape)


def _run_masked_select(func: Any, args: Any, kwargs: Any, find: Find) -> Any:
    data, mask = args
    values = _expand(mask, find)
    if values is None:
        return None
    with _disable_current_modes():
        shape = broadcast_shapes(data.shape, mask.shape)
        count = int(values.count_nonzero()) * (shape.numel() // max(values.numel(), 1))
    return torch.empty(count, dtype=data.dtype, device=data.device)


def _run_indexing(func: Any, args: Any, kwargs: Any, find: Find) -> Any:
    """Index by the positions of a mask's ones, as the kernel itself does."""
    indices: list[torch.Tensor | None] = []
    for index in args[1]:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            indices.append(index)
            continue
        values = _expand(index, find)
        if values is None:
            return None
        with _disable_current_modes():
            count, dimensions = int(values.count_nonzero()), index.ndim
        indices += [
            torch.empty(count, dtype=torch.int64, device=index.device) for _ in range(dimensions)
        ]
    return func(args[0], indices, *args[2:], **kwargs)


def _run_ctc(func: Any, args: Any, kwargs: Any, find: Find) -> Any:
    # (T, B, classes) log-probabilities -> (B,) losses and (B, T, 2 * longest target + 1) alphas:
    # aten/src/ATen/native/LossCTC.cpp, ctc_loss_allocate_outputs
    scores, lengths = args[0], args[3]
    if isinstance(lengths, torch.Tensor):
        values = find(lengths)
        if values is None:
            return None
        with _disable_current_modes():
            longest = int(values.max())
    else:
        longest = max(lengths, default=0)
    steps, batch = (scores.shape[0], scores.shape[1]) if scores.ndim == 3 else (len(scores), 1)
    options = {"dtype": scores.dtype, "device": scores.device}
    return torch.empty(batch, **options), torch.empty(batch, steps, 2 * longest + 1, **options)


_RULES: dict[Any, Callable[[Any, Any, Any, Find], Any]] = {
    aten.masked_select.default: _run_masked_select,
    aten.index.Tensor: _run_indexing,
    aten._ctc_loss.default: _run_ctc,
    aten._ctc_loss.Tensor: _run_ctc,
}
