"""Do in place what autograd would do in place if nobody watched.

While any dispatch mode is active, autograd takes every tensor for a possible subclass and avoids
in-place updates: where several gradients meet it adds out of place, and the gradients of indexing,
gathering and selecting write into a copy of their zeros. The traced program would need memory that
the untraced one does not, up to one more buffer at the peak. So the mode carries out the in-place
form itself, under the conditions autograd would have applied.

Sources, torch 2.13: ``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp;
``index_backward``, ``cummaxmin_backward``, ``masked_select_backward`` and ``put_`` in
torch/csrc/autograd/FunctionsManual.cpp; ``gather_backward``, ``index_select_backward_symint`` and
``value_selecting_reduction_backward`` in aten/src/ATen/native.

Known limitations:
    Which additions autograd itself makes can only be told under nodes whose own formula has
    none; under the others the out-of-place form stays, and is reported as it is.
    The gradients of ``prod``, ``cumprod``, ``max()`` and ``median()`` of all elements, and of
    ``binary_cross_entropy_with_logits`` with ``pos_weight`` follow another formula under a mode,
    which cannot be undone here; the peak moves if it lies in one of these.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from attnprof.capture.dynamo import SKIPPING

aten = torch.ops.aten

_VIEWS = """
    View UnsafeView ReshapeAlias T Transpose Permute Expand Select Slice Squeeze
    Unsqueeze Unbind Split SplitWithSizes Alias Diagonal Unfold
"""
_ELEMENTWISE = """
    Mul Add Sub Rsub Div Neg Exp Exp2 Log Tanh Sigmoid Silu Gelu Relu LeakyRelu Softplus Sqrt
    Rsqrt Pow Reciprocal Sin Cos Abs Erf Clamp Maximum Minimum Lerp Addcmul Addcdiv ToCopy
    Clone MaskedFill Where Tril Triu NativeDropout
"""
_PRODUCTS = """
    Sum Mean Cumsum Logsumexp Mm Bmm Addmm Baddbmm Convolution Softmax LogSoftmax SafeSoftmax
    NativeLayerNorm NativeGroupNorm NllLoss
"""
_FUSED = """
    ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention
    ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention
"""
_MOVES = """
    Embedding Cat Stack Index IndexSelect IndexAdd Gather Scatter ScatterAdd Repeat Flip Roll
    Topk Sort ConstantPadNd
"""
_SELECTIONS = frozenset(
    {
        "MaxBackward0",
        "MinBackward0",
        "SortBackward0",
        "SortBackward1",
        "TopkBackward0",
        "KthvalueBackward0",
        "MedianBackward1",
        "NanmedianBackward1",
        "ModeBackward0",
    }
)

WRITES_TO_ZEROS: dict[Any, tuple[frozenset[str], Any]] = {
    aten.index_put.default: (frozenset({"IndexBackward0"}), aten._index_put_impl_.default),
    aten._unsafe_index_put.default: (frozenset({"IndexBackward0"}), aten._index_put_impl_.default),
    aten.scatter_add.default: (
        frozenset({"GatherBackward0", "CummaxBackward0", "CumminBackward0"}),
        aten.scatter_add_.default,
    ),
    aten.index_add.default: (frozenset({"IndexSelectBackward0"}), aten.index_add_.default),
    aten.put.default: (frozenset({"TakeBackward0"}), aten.put_.default),
    aten.scatter.src: (_SELECTIONS, aten.scatter_.src),
    aten.masked_scatter.default: (
        frozenset({"MaskedSelectBackward0"}),
        aten.masked_scatter_.default,
    ),
}
"""Ops that a node runs on zeros it has just made for the purpose -> the nodes, and what they run
there when nobody watches."""

NODES_WITHOUT_ADDITIONS = frozenset(
    f"{name}Backward{number}"
    for names in (_VIEWS, _ELEMENTWISE, _PRODUCTS, _FUSED, _MOVES)
    for name in names.split()
    for number in range(5)
).union(*(nodes for nodes, _ in WRITES_TO_ZEROS.values()))
"""Nodes whose formula (tools/autograd/derivatives.yaml) calls no ``add``."""

_current_node: Callable[[], Any] = torch._C._current_autograd_node  # None outside backward


class InPlaceForms:
    """Knows which out-of-place ops autograd runs only because it is watched."""

    def __init__(self) -> None:
        """Learn how many owners a gradient has that only autograd holds, in this torch."""
        fake_mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        self._sole_owner = {torch.Tensor: _calibrate(nullcontext())}
        if fake_mode is not None:
            self._sole_owner[FakeTensor] = _calibrate(FakeTensorMode())

    def find(self, func: Any, args: Any) -> tuple[Any, Any] | None:
        """Return the in-place operator and its arguments to run instead, or None.

        Args:
            func: One of `IMITATED`.
            args: Its arguments; keyword arguments it must have none.
        """
        node = _current_node()
        if node is None or torch.is_grad_enabled():
            return None
        name = type(node).__name__
        if func is aten.add.Tensor:
            if name not in NODES_WITHOUT_ADDITIONS or len(args) != 2 or not _are_alike(*args):
                return None
            is_sole = _count_owners(args) == self._sole_owner.get(args[0].__class__)
            return (aten.add_.Tensor, args) if is_sole else None
        nodes, in_place = WRITES_TO_ZEROS[func]
        if name not in nodes or type(args[0]) not in self._sole_owner:
            return None
        if in_place is aten._index_put_impl_.default:
            args = (*args, True)  # unsafe: the indices were checked in forward already
        return in_place, args


IMITATED = frozenset({aten.add.Tensor, *WRITES_TO_ZEROS})
"""The ops to ask `InPlaceForms` about."""


def _calibrate(kind: AbstractContextManager[Any]) -> tuple[int, int, int] | None:
    """Return the owners of a gradient that only autograd holds, among tensors made in ``kind``."""
    # Out of sight of the program's own modes, and of its hooks for saved tensors: nothing here
    # saves one.
    with (
        _disable_current_modes(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        kind,
        _Calibration() as calibration,  # type: ignore[no-untyped-call]  # not annotated
    ):
        both = torch.ones(2, device="cpu", requires_grad=True).neg()
        torch.autograd.backward((both.neg() + both.neg()).sum())
    seen: tuple[int, int, int] | None = calibration.seen
    return seen


def _count_owners(args: Any) -> tuple[int, int, int]:
    """Return the owners of the first tensor: Python's, the tensor's and its storage's."""
    first = args[0]
    storage = torch._C._storage_Use_Count(first.untyped_storage()._cdata)
    return sys.getrefcount(first), first._use_count(), storage


def _are_alike(old: Any, new: Any) -> bool:
    return (
        old.__class__ is new.__class__
        and old.layout is torch.strided
        and new.layout is torch.strided
        and not (old.is_nested or new.is_nested)
        and old.shape == new.shape
        and old.dtype is new.dtype
        and old.device == new.device
        and (old.is_contiguous() or bool(aten.is_non_overlapping_and_dense.default(old)))
    )


class _Calibration(TorchDispatchMode):  # type: ignore[no-untyped-call]  # not annotated
    """Sees one addition that is certainly autograd's own."""

    seen: tuple[int, int, int] | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code alone."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return SKIPPING is None  # see `OpMode`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the addition."""
        if func is aten.add.Tensor and _current_node() is not None:
            self.seen = _count_owners(args)
        return func(*args, **(kwargs or {}))
