"""When each storage was born and freed, for every device, by weak references.

On the CPU (and under fake tensors) no allocator trace exists, so this ledger is the record of
lifetimes. On CUDA it maps storages to addresses; sizes and lifetimes then come from the allocator.

Known limitations:
    Memory that an op takes and gives back inside itself never has a storage and is not seen.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from attnprof.capture.recorder import Recorder, pack_event, pack_free
from attnprof.capture.replacements import replacing
from attnprof.store.schema import BORN, FOUND, RESIZED

if TYPE_CHECKING:
    from attnprof.capture.fake_twins import Twins

PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)

storage_address: Callable[[torch.Tensor], int] = torch._C._storage_address  # type: ignore[attr-defined]  # not in the stubs
"""The address of a tensor's StorageImpl: its identity for as long as it lives."""


class StorageRef(weakref.ref):  # type: ignore[type-arg]  # weakref.ref takes no parameter at runtime here
    """A weak reference that knows its storage's number and identity."""

    __slots__ = ("address", "size_bytes", "storage")
    storage: int
    address: int
    size_bytes: int


class Ledger:
    """The live storages, each under a number of its own that is never used again."""

    def __init__(self, recorder: Recorder, *, twins: "Twins | None" = None) -> None:
        """Report births and frees to ``recorder``.

        Args:
            recorder: What writes them down.
            twins: In a dry run, the fakes that stand for real tensors.
        """
        self.live: dict[int, StorageRef] = {}
        """StorageImpl address -> reference; an entry leaves before its address can be reused."""
        self._recorder = recorder
        self._numbers = count()
        self._events = recorder.storage_events
        self._ops = recorder.ops
        self._on_death = self._forget
        self.twins = twins
        self._fake_device = None if twins is None else twins.counted_on
        self._devices: dict[torch.device, tuple[int, bool]] = {}
        """Device -> its number, and whether its storages have addresses."""

    def add(self, tensor: torch.Tensor, signature: int, *, born: bool) -> int:
        """Enter the storage of ``tensor``, which is not live yet, and return its number.

        Args:
            tensor: Any tensor that has a storage.
            signature: The number of its shape, stride and dtype.
            born: An op returned it just now; otherwise it was made where nobody looked.
        """
        storage = tensor.untyped_storage()
        ref = StorageRef(storage, self._on_death)
        ref.storage = number = next(self._numbers)
        ref.address = address = storage_address(tensor)
        ref.size_bytes = size = storage.nbytes()
        entered = self.live.setdefault(address, ref)
        if entered is not ref:
            return entered.storage  # another thread met it at the same time
        device = storage.device
        device_number, has_address = self._devices.get(device) or self._meet(device)
        self._events.append(
            pack_event(
                number,
                perf_counter_ns(),
                self._recorder.committed_ops + len(self._ops),
                BORN if born else FOUND,
                size,
                storage.data_ptr() if has_address else 0,
                device_number,
                signature,
            )
        )
        return number

    def find(self, tensor: torch.Tensor, *, only_live: bool = False) -> int:
        """Return the number of the tensor's storage, or -1 if it has none.

        A storage not met before is entered as found. A tensor made of others (a wrapper subclass,
        a sparse one) stands for the first of them.

        Args:
            tensor: Any tensor.
            only_live: Return -1 for a storage not met before.
        """
        if self.twins is not None:
            tensor = self.twins.find_fake(tensor)
        if tensor.__class__ not in PLAIN_CLASSES:
            first = next(plain_tensors(tensor), None)
            if first is None:
                return -1
            tensor = first
        try:
            ref = self.live.get(storage_address(tensor))
            if ref is not None:
                return ref.storage
            if only_live:
                return -1
            key = (tensor.shape, tensor.stride(), tensor.dtype)
            return self.add(tensor, self._recorder.find_signature(key), born=False)
        except (RuntimeError, NotImplementedError, TypeError):  # as in `OpMode`
            return -1

    def check_size(self, storage: Any) -> None:
        """Record a resize, if ``storage`` is known and no longer has the size it had."""
        address = storage._cdata
        ref = self.live.get(address)
        if ref is None or ref.size_bytes == storage.nbytes():
            return
        ref.size_bytes = size = storage.nbytes()
        device_number, has_address = self._meet(storage.device)
        self._events.append(
            pack_event(
                ref.storage,
                perf_counter_ns(),
                self._recorder.count_ops(),
                RESIZED,
                size,
                storage.data_ptr() if has_address else 0,
                device_number,
                -1,
            )
        )

    def mark(self) -> int:
        """Return a number that lies between those of storages met before and after now."""
        return next(self._numbers)

    def count_bytes(self, *, since: int) -> int:
        """Return the bytes of the live storages that were met after `mark` gave ``since``."""
        return sum(ref.size_bytes for ref in list(self.live.values()) if ref.storage > since)

    def close(self) -> None:
        """Let go of all references; nothing is recorded any more."""
        self.live.clear()

    def _meet(self, device: torch.device) -> tuple[int, bool]:
        # Meta and fake storages have no address to give; asking a fake one warns or raises.
        is_real = device.type != "meta"
        counted_on = device if is_real else self._fake_device or device
        known = self._devices[device] = (self._recorder.find_device(counted_on), is_real)
        return known

    def _forget(self, ref: StorageRef) -> None:
        if self.live.get(ref.address) is ref:
            del self.live[ref.address]
        self._events.append(
            pack_free(ref.storage, perf_counter_ns(), self._recorder.committed_ops + len(self._ops))
        )


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold the data of one that may be a wrapper subclass or sparse."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is not None and not isinstance(tensor, FakeTensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]  # looked up above
            inner = getattr(tensor, name)
            if isinstance(inner, torch.Tensor):  # a DTensor names its mesh of devices too
                yield from plain_tensors(inner)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_nested:
        yield tensor.values()
    elif tensor.layout is torch.strided:
        yield tensor


@contextmanager
def watching_resizes(ledger: Ledger) -> Iterator[None]:
    """See `UntypedStorage.resize_`, which no operator shows and sharded training lives on."""
    original = torch.UntypedStorage.resize_

    def resize_(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        ledger.check_size(self)
        return result

    with replacing(torch.UntypedStorage, resize_=resize_):
        yield
