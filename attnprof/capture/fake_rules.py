"""What is known of ops and tensors without running anything, for `attnprof.capture.fake_values`."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

SMALL = 1024
"""Tensors of up to so many elements are computed for real."""
ROWS = 8
"""So are tensors of up to so many vectors, such as positions or lengths of a batch; what has n²
elements never is."""
MOST = 2**24
"""No tensor of more elements is: a vector may be long for being n² of something flattened."""

aten = torch.ops.aten

FILLED_WITH: dict[str, Any] = {
    "aten::zeros": 0, "aten::zeros_like": 0, "aten::new_zeros": 0, "aten::zero_": 0,
    "aten::ones": 1, "aten::ones_like": 1, "aten::new_ones": 1,
}  # fmt: skip
"""Ops that put one number everywhere -> the number."""
NUMBER_AT = {
    "aten::scalar_tensor": 0, "aten::full": 1, "aten::full_like": 1, "aten::fill_": 1,
    "aten::new_full": 2,
}  # fmt: skip
"""Ops that put one number everywhere -> the position of the number among their arguments."""
DRAWS = frozenset({"aten::randint", "aten::randperm", "aten::random_"})
"""Ops that draw whole numbers: token ids, mostly. One draw is as good as another, but for a program
that reads it."""
MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "_to_copy", "clone", "flip", "gather", "index", "index_select", "repeat", "roll",
    )
)  # fmt: skip
"""Ops whose result holds elements of their first operand and nothing else."""
KEEPERS = frozenset(f"aten::{name}" for name in ("all", "amax", "amin", "any", "mean"))
"""Reductions that give the number of which an operand consists."""


def list_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among values, which may be lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from list_tensors(value)


def shorten(data: torch.Tensor) -> torch.Tensor:
    """Return one element, with as many dimensions, if all are the same; else the data."""
    with _disable_current_modes():
        if data.numel() < 2:
            return data
        first = data.flatten()[:1]
        return first.reshape((1,) * data.ndim).clone() if bool((data == first).all()) else data


def is_cheap(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is small enough for its values to be followed."""
    longest = max(tensor.shape, default=1)
    return tensor.numel() <= max(SMALL, min(ROWS * longest, MOST))


def answer_if_finite(func: Any, args: Any) -> bool | None:
    """Return what a test for NaN or infinity gives if all values are finite; None for other ops.

    ``torch.isfinite`` arrives here as ``x == x`` and ``abs(x) != inf``.
    """
    if func in (aten.isnan.default, aten.isinf.default):
        return False
    if func in (aten.eq.Tensor, aten.ne.Tensor) and args[0] is args[1]:
        return bool(func is aten.eq.Tensor)
    if func in (aten.eq.Scalar, aten.ne.Scalar) and args[1] in (math.inf, -math.inf):
        return bool(func is aten.ne.Scalar)
    return None


def make_grouped_product(
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
