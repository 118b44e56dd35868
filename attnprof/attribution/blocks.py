"""Blocks of memory: how long each storage had which size, in the exact order of events."""

from dataclasses import dataclass

import numpy as np

from attnprof.attribution.facts import Bools, Facts, Ints
from attnprof.attribution.order import pair_storage_events
from attnprof.store.schema import FOUND, RESIZED


@dataclass(frozen=True)
class Blocks:
    """One row per block. A storage that is resized makes one block per size.

    ``start`` and ``end`` are positions in the order of events, so that a block that is freed as
    an op returns and one that the op made are told apart where clocks could not.
    """

    storage: Ints
    size_bytes: Ints
    """What the allocator takes."""
    requested_bytes: Ints
    """What the storage needs."""
    address: Ints
    device: Ints
    start: Ints
    end: Ints
    """The number of events for a block that is still live."""
    start_ns: Ints
    end_ns: Ints
    """-1 for a block that is still live."""
    op: Ints
    """The op that made the block, or -1."""
    at_op: Ints
    """How many ops had finished when it appeared."""
    signature: Ints
    """Of the tensor through which the storage was first seen, or -1."""
    is_found: Bools
    """Nobody saw it being made: it was there before, or came from outside torch's ops."""
    is_freed: Bools


CUDA_BLOCK_BYTES = 512
"""The caching allocator of CUDA takes multiples of this:
https://github.com/pytorch/pytorch/blob/v2.13.0/c10/core/AllocatorConfig.h (``kMinBlockSize``)"""


def find_blocks(facts: Facts) -> Blocks:
    """Pair the storage events into blocks."""
    events = facts.events
    count = len(events["kind"])
    kind, storage = events["kind"], events["storage"].astype(np.int64)
    starts, end = pair_storage_events(events)
    ended = end < count
    end_ns = np.where(ended, events["time_ns"][np.minimum(end, count - 1)], -1) if count else end
    born = kind[starts] != RESIZED
    requested = events["size_bytes"][starts]
    device = events["device"][starts].astype(np.int64)
    on_cuda = np.array([name.startswith("cuda") for name in facts.devices] or [False])[device]
    rounded = -(-requested // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
    return Blocks(
        storage=storage[starts],
        size_bytes=np.where(on_cuda, rounded, requested),
        requested_bytes=requested,
        address=events["address"][starts],
        device=device,
        start=starts,
        end=end,
        start_ns=events["time_ns"][starts],
        end_ns=end_ns,
        op=np.where(born, facts.born_by[storage[starts]], -1),
        at_op=events["op"][starts],
        signature=events["signature"][starts].astype(np.int64),
        is_found=kind[starts] == FOUND,
        is_freed=ended,
    )
