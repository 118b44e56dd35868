"""Let a program treat fake tensors as it does real ones: ask what they are, format them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from attnprof.capture.fake_values import FakeValues


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

    package: Any = torch._subclasses
    package.FakeTensor = Unknown
    try:
        yield
    finally:
        package.FakeTensor = FakeTensor


@contextmanager
def formatting_fake_tensors() -> Iterator[None]:
    """Let ``f"{loss:.3f}"`` format the number in a fake tensor, reading it as ``item()`` does.

    Torch does so for its own class only, and refuses a format for any other:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_tensor.py#L1136
    """
    kind: Any = FakeTensor

    def format_number(tensor: Any, text: str) -> str:
        if text and tensor.ndim == 0:
            return format(tensor.detach().item(), text)
        return object.__format__(tensor, text)

    kind.__format__ = format_number
    try:
        yield
    finally:
        del kind.__format__
