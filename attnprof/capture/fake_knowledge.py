"""The values known of fake tensors, for as long as nobody writes something else into them.

Autograd counts writes, but not under ``inference_mode``, nor those through ``.data``.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from attnprof.capture.fake_rules import Guess, is_cheap, shorten
from attnprof.capture.fake_twins import Twins
from attnprof.capture.ledger import storage_address


@dataclass(frozen=True, slots=True)
class _Value:
    """What is known of a fake tensor."""

    data: torch.Tensor
    """Its values; or, if it consists of one number, a tensor with all dimensions 1."""
    storage: int
    """Where its storage is."""
    guess: Guess | None = None
    """On what it rests besides: a real run has other values."""


_Entry = tuple[weakref.ref[torch.Tensor], _Value]


class Knowledge:
    """Knows some tensors by value."""

    def __init__(self, twins: Twins) -> None:
        """Know nothing yet but the real tensors for which fakes stand."""
        self._twins = twins
        self._known: dict[int, _Entry] = {}
        """By the id of the fake tensor, for as long as it lives."""
        self._sharing: defaultdict[int, set[int]] = defaultdict(set)
        """Storage -> the ids of the known tensors that lie in it."""

    def find(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the values of a tensor, or one number with as many dimensions, if known."""
        entry = self._known.get(id(tensor))
        if entry is not None:
            if entry[1].storage == storage_address(tensor):
                return entry[1].data
            self._forget(id(tensor))  # it was given other data, as by ``tensor.data = other``
        is_fake = isinstance(tensor, FakeTensor)
        real = self._twins.find_real(tensor) if is_fake else tensor
        if real is None or not is_cheap(real):
            return None
        with _disable_current_modes():
            # A copy: what holds on to the program's own tensor changes how long it lives.
            return real.detach().clone()

    def find_guess(self, tensors: Iterable[torch.Tensor]) -> Guess | None:
        """Return the boldest guess that values of these tensors rest on."""
        entries = (self._known.get(id(tensor)) for tensor in tensors)
        return max((e[1].guess for e in entries if e and e[1].guess is not None), default=None)

    def keep(self, fake: torch.Tensor, data: torch.Tensor) -> None:
        """Remember the values of a tensor, or one number, with as many dimensions."""
        key, storage = id(fake), storage_address(fake)

        def forget(_: object) -> None:
            self._forget(key)

        self._forget(key)
        self._known[key] = weakref.ref(fake, forget), _Value(data, storage)
        self._sharing[storage].add(key)

    def mark(self, tensors: Iterable[torch.Tensor], guess: Guess | None) -> None:
        """Note that what is known of these tensors rests on a guess."""
        for tensor in tensors:
            if guess is not None and (entry := self._known.get(id(tensor))) is not None:
                self._known[id(tensor)] = entry[0], replace(entry[1], guess=guess)

    def list_sharing(self, written: Iterable[torch.Tensor]) -> dict[int, _Entry]:
        """Return what is known of tensors that are about to be written, and of others in them."""
        return {
            key: self._known[key]
            for tensor in written
            for key in self._sharing.get(storage_address(tensor), ())
        }

    def spread(self, written: Iterable[torch.Tensor], before: dict[int, _Entry]) -> None:
        """Bring what is known of other tensors in the same memory up to date, or forget it.

        Args:
            written: What it wrote; if it is known by now what, that has been kept.
            before: What `list_sharing` gave before that.
        """
        fresh = {}
        for tensor in written:
            self._twins.forget_values(tensor)
            old, now = before.get(id(tensor)), self._known.get(id(tensor))
            if now is not None and (old is None or now[1].data is not old[1].data):
                fresh[id(tensor)] = tensor
        for key, (ref, value) in before.items():
            other = ref()
            if key in fresh or other is None:
                continue
            source = next((t for t in fresh.values() if storage_address(t) == value.storage), None)
            data = None if source is None else self._overwrite(other, value.data, source)
            guess = self.find_guess((other, *fresh.values()))
            self._forget(key)
            if data is not None:
                self.keep(other, data)
                self.mark((other,), guess)

    def _overwrite(
        self, tensor: torch.Tensor, old: torch.Tensor, written: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the values of ``tensor`` after others were written into memory that it shares."""
        new = self._known[id(written)][1].data
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.dtype != written.dtype or not is_cheap(tensor) or size > 2 * tensor.numel():
            return None
        with _disable_current_modes():
            memory = torch.empty(size, dtype=tensor.dtype)

            def view(fake: torch.Tensor) -> torch.Tensor:
                return memory.as_strided(fake.shape, fake.stride(), fake.storage_offset())

            view(tensor).copy_(old.expand(tensor.shape))
            view(written).copy_(new.expand(written.shape))
            return shorten(view(tensor).clone())

    def _forget(self, key: int) -> None:
        entry = self._known.pop(key, None)
        if entry is not None:
            keys = self._sharing[entry[1].storage]
            keys.discard(key)
            if not keys:
                del self._sharing[entry[1].storage]
