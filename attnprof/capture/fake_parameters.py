"""Let modules and optimizers treat fake parameters as they do real ones."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from attnprof.capture.replacements import replacing


@contextmanager
def converting_fake_parameters() -> Iterator[None]:
    """Let ``module.to(dtype)`` convert fake parameters, which torch refuses to swap.

    `torch.nn.Module._apply` swaps the two tensors where a parameter is fake, and a swap fails on
    tensors with weak references, which all fake ones have. Giving the parameter the new data is
    what it does for real tensors:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L933
    """
    original: Any = torch.utils.swap_tensors

    def swap(old: Any, new: Any) -> None:
        if isinstance(old, FakeTensor) and isinstance(new, FakeTensor):
            old.data = new
            old.fake_device = new.fake_device
        else:
            original(old, new)

    with replacing(torch.utils, swap_tensors=swap):
        yield


@contextmanager
def copying_fake_parameters() -> Iterator[None]:
    """Let ``copy.deepcopy`` copy fake tensors.

    By itself it gives a tensor without a storage of its own, or the same one again:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_subclasses/fake_tensor.py#L3513
    """
    original: Any = torch.Tensor.__deepcopy__

    def copy(tensor: Any, memo: dict[int, Any]) -> Any:
        if id(tensor) in memo:
            return memo[id(tensor)]
        if not tensor.is_leaf:
            return original(tensor, memo)  # which says why it cannot
        copied: Any = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        else:
            copied.requires_grad_(tensor.requires_grad)
        if tensor.grad is not None:
            copied.grad = copy(tensor.grad, memo)
        memo[id(tensor)] = copied
        return copied

    with replacing(FakeTensor, __deepcopy__=copy):
        yield


@contextmanager
def updating_fake_parameters(*, as_on_cuda: bool) -> Iterator[None]:
    """Let optimizers and gradient clipping take all parameters at once where they do for real ones.

    Such a step (``foreach``) needs memory for all parameters where a loop needs it for one. Torch
    takes it for tensors of two exact types; optimizers do so by default on CUDA, not on the CPU.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/optimizer.py#L162

    Args:
        as_on_cuda: Take it in optimizers too.
    """
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    modules: tuple[Any, ...] = (optimizer, _foreach_utils)
    find_devices = modules[0]._get_foreach_kernels_supported_devices

    def find_more() -> list[str]:
        return [*find_devices(), "cpu"]

    with ExitStack() as stack:
        for module in modules:
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(replacing(module, _foreach_supported_types=types))
        if as_on_cuda:
            stack.enter_context(
                replacing(optimizer, _get_foreach_kernels_supported_devices=find_more)
            )
        yield
