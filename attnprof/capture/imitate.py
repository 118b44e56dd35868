"""Do in place what autograd would do in place if nobody watched.

While any dispatch mode is active, autograd takes every tensor for a possible subclass and avoids
in-place updates: where several gradients meet it adds out of place, and the gradient of indexing
copies its result. The traced program would need memory that the untraced one does not, up to one
more buffer at the peak. So the mode carries out the in-place form itself, under the conditions
autograd would have applied.

Sources, torch 2.13: ``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp,
``index_backward`` in torch/csrc/autograd/FunctionsManual.cpp.

Known limitations:
    Which additions autograd itself makes can only be told under nodes whose own formula has
    none; under the others the out-of-place form stays, and is reported as it is.
"""

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

NODES_WITHOUT_ADDITIONS = frozenset(
    f"{name}Backward{number}"
    for number in range(5)
    for name in (
        # views
        "View UnsafeView Reshape ReshapeAlias T Transpose Permute Expand Select Slice Squeeze "
        "Unsqueeze Unbind Split SplitWithSizes Alias Diagonal Unfold "
        # element by element
        "Mul Add Sub Div Neg Exp Exp2 Log Tanh Sigmoid Silu Gelu Relu LeakyRelu Softplus Sqrt "
        "Rsqrt Pow Sin Cos Abs Erf Clamp ToCopy Clone MaskedFill Where NativeDropout "
        # reductions and products
        "Sum Mean Cumsum Logsumexp Mm Bmm Addmm Baddbmm Convolution Softmax LogSoftmax SafeSoftmax "
        "NativeLayerNorm NativeGroupNorm NllLoss "
        "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention "
        "ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention "
        # moving data
        "Embedding Cat Stack Index IndexSelect Gather Repeat ConstantPadNd"
    ).split()
)
"""Nodes whose formula (tools/autograd/derivatives.yaml) calls no ``add``."""

_current_node = torch._C._current_autograd_node


class InPlaceForms:
    """Knows which out-of-place ops autograd runs only because it is watched."""

    def __init__(self) -> None:
        """Learn how many owners a gradient has that only autograd holds, in this torch."""
        with _Calibration() as calibration, torch.enable_grad():
            shared = torch.ones(2, requires_grad=True) * 1.0
            (shared.exp() * shared.tanh()).sum().backward()
        self._sole_owner = calibration.seen

    def find(self, func: Any, args: Any) -> tuple[Any, Any] | None:
        """Return the in-place operator and its arguments to run instead, or None.

        Args:
            func: ``aten.add.Tensor`` or ``aten._unsafe_index_put.default``.
            args: Its arguments; keyword arguments it must have none.
        """
        node = _current_node()
        if node is None or torch.is_grad_enabled():
            return None
        name = type(node).__name__
        if func is aten._unsafe_index_put.default:
            if name != "IndexBackward0":
                return None
            return aten._index_put_impl_.default, (*args, True)  # checked in forward already
        if name not in NODES_WITHOUT_ADDITIONS or len(args) != 2 or not _are_alike(*args):
            return None
        return (aten.add_.Tensor, args) if _count_owners(args) == self._sole_owner else None


IMITATED = frozenset({aten.add.Tensor, aten._unsafe_index_put.default})
"""The ops to ask `InPlaceForms` about."""


def _count_owners(args: Any) -> tuple[int, int, int]:
    """Return the owners of the first tensor: Python's, the tensor's and its storage's."""
    first = args[0]
    storage = torch._C._storage_Use_Count(first.untyped_storage()._cdata)
    return sys.getrefcount(first), first._use_count(), storage


def _are_alike(old: Any, new: Any) -> bool:
    return (
        type(old) is torch.Tensor
        and type(new) is torch.Tensor
        and old.layout is torch.strided
        and new.layout is torch.strided
        and not (old.is_nested or new.is_nested)
        and old.shape == new.shape
        and old.dtype is new.dtype
        and old.device == new.device
        and bool(aten.is_non_overlapping_and_dense.default(old))
    )


class _Calibration(TorchDispatchMode):
    """Sees one addition that is certainly autograd's own."""

    seen: tuple[int, int, int] | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code alone."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the addition."""
        if func is aten.add.Tensor:
            self.seen = _count_owners(args)
        return func(*args, **(kwargs or {}))
