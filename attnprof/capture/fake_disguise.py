"""Let a program treat fake tensors as real ones: ask what they are, format them, read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from attnprof.capture.fake_values import FakeValues
from attnprof.capture.replacements import replacing


@contextmanager
def hiding_fakeness(values: FakeValues) -> Iterator[None]:
    """Let tensors whose values are known pass for real ones with programs that ask.

    Libraries ask ``isinstance(x, torch._subclasses.FakeTensor)`` and then spare a program the
    reading of values, by making masks, say, that a real run finds superfluous. Torch itself looks
    the class up where it is defined.
    """

    class Asked(type):
        def __instancecheck__(cls, tensor: Any) -> bool:
            return isinstance(tensor, FakeTensor) and not values.is_known(tensor)

    class Unknown(metaclass=Asked):
        pass

    with replacing(torch._subclasses, FakeTensor=Unknown):
        yield


@contextmanager
def formatting_fake_tensors() -> Iterator[None]:
    """Let ``f"{loss:.3f}"`` format the number in a fake tensor, reading it as ``item()`` does.

    Torch does so for its own class only, and refuses a format for any other:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_tensor.py#L1136
    """

    def format_number(tensor: Any, text: str) -> str:
        if text and tensor.ndim == 0:
            return format(tensor.detach().item(), text)
        return object.__format__(tensor, text)

    with replacing(FakeTensor, __format__=format_number):
        yield


@contextmanager
def reading_arrays(values: FakeValues) -> Iterator[None]:
    """Let ``tensor.numpy()`` give an array: torch refuses it for fakes, and misreads real tensors.

    While fakes are made, torch's own looks for a real tensor's memory where a fake would have it:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/utils/tensor_numpy.cpp#L164
    """
    original: Any = torch.Tensor.numpy

    class Array(np.ndarray[Any, Any]):
        source: torch.Tensor  # its memory is the array's, in a real run

    def read(tensor: Any, *, force: bool = False) -> Any:
        if isinstance(tensor, FakeTensor):
            if tensor.requires_grad and not force:
                raise RuntimeError(
                    "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() "
                    "instead."
                )
            array = values.read_array(tensor).view(Array)
            array.source = tensor
            return array
        tensor.detach()  # as torch's does, by which the tensor is met
        with _disable_current_modes():
            return original(tensor, force=force)

    def read_list(tensor: Any) -> Any:
        return values.read_array(tensor).tolist() if tensor.ndim else tensor.item()

    with replacing(FakeTensor, tolist=read_list), replacing(torch.Tensor, numpy=read):
        yield


class _OpNames(TorchDispatchMode):  # type: ignore[no-untyped-call]  # not annotated
    """Notes the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@cache
def _finds_extremes_in_one_op() -> bool:
    """Return whether this torch's ``one_hot`` checks its classes by ``aminmax``.

    It once took ``min`` and then ``max`` (still in 2.11), whose results never live together.
    """
    with _disable_current_modes(), _OpNames() as names:
        functional.one_hot(torch.zeros(1, dtype=torch.int64))
    return "aminmax" in names.seen


@contextmanager
def making_one_hot() -> Iterator[None]:
    """Let ``one_hot`` run the ops that it runs on real tensors.

    For fake ones it compares with every class, by a mask besides the result:
    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/Onehot.cpp#L24
    """
    original: Any = functional.one_hot
    in_one_op = _finds_extremes_in_one_op()

    def one_hot(tensor: Any, num_classes: int = -1) -> Any:
        if not isinstance(tensor, FakeTensor) or not tensor.numel():
            return original(tensor, num_classes)
        if in_one_op:
            highest = tensor.aminmax().max
        else:
            tensor.min()  # no class is negative
            highest = tensor.max()
        classes = num_classes if num_classes > 0 else int(highest.item()) + 1
        zeros = torch.zeros((*tensor.shape, classes), dtype=torch.int64, device=tensor.device)
        return zeros.scatter_(-1, tensor.unsqueeze(-1), 1)

    with replacing(functional, one_hot=one_hot):
        yield


@contextmanager
def running_as_written(assumed: dict[str, None]) -> Iterator[None]:
    """Let compiled code run uncompiled: a compiler would make kernels for tensors without memory.

    Args:
        assumed: Gets a line if the program compiles something.
    """
    original: Any = torch.compile

    def compile_nothing(*args: Any, **kwargs: Any) -> Any:
        assumed["what torch.compile compiles was run as it is written"] = None
        return original(*args, **kwargs)

    with replacing(torch, compile=compile_nothing), torch.compiler.set_stance("force_eager"):
        yield
