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
from attnprof.capture.ledger import PLAIN_CLASSES, storage_address


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
        """By the id of the fake one: the real one, and the fake one's storage."""
        self._written: set[int] = set()
        """The storages of fakes that were written into, while the real ones stayed as they are."""

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """Return arguments of an op with fakes for the real tensors among them."""
        if any(map(_holds_real, args)):
            args = tuple(map(self._replace, args))
        if kwargs and any(map(_holds_real, kwargs.values())):
            kwargs = {name: self._replace(value) for name, value in kwargs.items()}
        return args, kwargs

    def find_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what stands for a tensor: itself, if it is fake or of a kind with own rules."""
        if (
            type(tensor) not in PLAIN_CLASSES
            or tensor.layout is not torch.strided
            or tensor.is_nested
        ):
            return tensor
        entry = self._fakes.get(id(tensor))
        return entry[1] if entry is not None else self._make_fake(tensor)

    def find_real(self, fake: torch.Tensor) -> torch.Tensor | None:
        """Return the real tensor that a fake stands for, if it has the values the fake has."""
        entry = self._reals.get(id(fake))
        return None if entry is None or entry[1] in self._written else entry[0]()

    def forget_values(self, fake: torch.Tensor) -> None:
        """Note that a fake, or one in the same storage, is written into."""
        storage = storage_address(fake)
        if any(storage == known for _, known in self._reals.values()):
            self._written.add(storage)

    def _make_fake(self, tensor: torch.Tensor) -> FakeTensor:
        with _disable_current_modes():
            fake = self._fake_mode.from_tensor(tensor.detach())
        key, fake_key, storage = id(tensor), id(fake), storage_address(fake)

        def forget(_: object) -> None:
            del self._fakes[key], self._reals[fake_key]
            self._written.discard(storage)

        ref = weakref.ref(tensor, forget)
        self._fakes[key] = ref, fake
        self._reals[fake_key] = ref, storage
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
    return kind in PLAIN_CLASSES or (
        (kind is list or kind is tuple) and any(map(_holds_real, value))
    )
