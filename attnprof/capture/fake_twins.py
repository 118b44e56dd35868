"""The real tensors that a program uses in a dry run, each with the one fake that stands for it.

A constant in a closure, a data set in a global, an array read from a file: they were made where
nobody looked, and exist. FakeTensorMode makes another fake of them at every op that meets them, and
each would count as memory of its own.
"""

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from attnprof.capture.fake_failures import refuse_real_parameters

_KINDS = (torch.Tensor, torch.nn.Parameter)
"""Classes of real tensors; to ask for them is faster than to ask what is none of them."""


class Twins:
    """Gives one fake tensor for every real one, for as long as the real one lives."""

    def __init__(self, fake_mode: FakeTensorMode, counted_on: torch.device) -> None:
        """Make fakes of ``fake_mode``.

        Args:
            fake_mode: The mode that the program runs in.
            counted_on: The device whose memory fakes are taken for, which lie on none.
        """
        self._fake_mode = fake_mode
        self.counted_on = counted_on
        self._fakes: dict[int, tuple[weakref.ref[torch.Tensor], FakeTensor]] = {}
        """By the id of the real tensor."""
        self._reals: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        """By the id of the fake one: the real one, and the fake one's version when it was made."""

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """Return arguments of an op with fakes for the real tensors among them."""
        if any(map(_holds_real, args)):
            args = tuple(map(self._replace, args))
        if kwargs and any(map(_holds_real, kwargs.values())):
            kwargs = {name: self._replace(value) for name, value in kwargs.items()}
        return args, kwargs

    def find_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what stands for a tensor: itself, if it is fake or of a kind with own rules."""
        if type(tensor) not in _KINDS or tensor.layout is not torch.strided or tensor.is_nested:
            return tensor
        entry = self._fakes.get(id(tensor))
        return entry[1] if entry is not None else self._make_fake(tensor)

    def find_real(self, fake: torch.Tensor) -> torch.Tensor | None:
        """Return the real tensor that a fake stands for, if it has the values the fake has."""
        ref, version = self._reals.get(id(fake), (None, 0))
        return ref() if ref is not None and self.count_writes(fake) == version else None

    def count_writes(self, fake: torch.Tensor) -> int:
        """Return how often a fake or a view of it was written into; -1 where nobody counts.

        What the program writes into a real tensor goes into the fake one, but autograd counts it
        with the real one.
        """
        if fake.is_inference():
            return -1
        entry = self._reals.get(id(fake))
        real = entry[0]() if entry is not None else None
        return fake._version + (0 if real is None or real.is_inference() else real._version)

    def _make_fake(self, tensor: torch.Tensor) -> FakeTensor:
        with _disable_current_modes():
            fake = self._fake_mode.from_tensor(tensor.detach())
        key, fake_key = id(tensor), id(fake)

        def forget(_: object) -> None:
            del self._fakes[key], self._reals[fake_key]

        ref = weakref.ref(tensor, forget)
        self._fakes[key] = ref, fake
        self._reals[fake_key] = ref, 0
        self._reals[fake_key] = ref, self.count_writes(fake)
        return fake

    def _replace(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            refuse_real_parameters((value,))
            return self.find_fake(value)
        if isinstance(value, list | tuple) and _holds_real(value):
            return type(value)(map(self._replace, value))
        return value


def _holds_real(value: Any) -> bool:
    kind = value.__class__
    return kind in _KINDS or ((kind is list or kind is tuple) and any(map(_holds_real, value)))
