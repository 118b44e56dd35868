"""Views of fake tensors, made without asking FakeTensorMode.

A third of the ops of a training step are views, and the way through the mode's cache takes four
times as long as to make one.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.detach.default, aten.expand.default, aten.permute.default, aten.select.int,
        aten.slice.Tensor, aten.t.default, aten.transpose.int, aten.unsqueeze.default,
        aten._unsafe_view.default, aten.view.default,
    }
)  # fmt: skip
"""Ops that give one view of their first operand, whatever its device."""


def make_view(func: Any, args: Any, kwargs: Any) -> FakeTensor:
    """Make a view as the mode itself does where its cache has none."""
    source = args[0]
    with in_kernel_invocation_manager(source.fake_mode):
        view = func(*args, **kwargs)
    return FakeTensor(source.fake_mode, view, source.fake_device)
