"""Whose the blocks of caches and states are, where several layers have one tensor together."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from attnprof.attribution.attribute import Attribution
from attnprof.attribution.facts import Ints
from attnprof.attribution.sharing import find_sharers
from attnprof.vocabulary import Category

_CACHES = (Category.KV_CACHE, Category.RECURRENT_STATE)


@dataclass(frozen=True, slots=True)
class OwnBlocks:
    """The blocks of memory that belong to one layer's cache, or its part of shared ones."""

    storage: Ints
    size_bytes: Ints
    """What the allocator took."""
    needed_bytes: Ints
    """What the tensors need."""
    start: Ints
    end: Ints


Part = tuple[int, int, int]
"""The row of a block in the frame of allocations, which part of it, and of how many."""


def share_out(attribution: Attribution) -> dict[tuple[str, Category], list[Part]]:
    """Return the parts of the blocks of caches and states per layer and category.

    Layers that write into one tensor, as into a pool, have an equal part each.
    """
    frame = attribution.allocations
    names = frame["category"].cast(pl.String)
    positions = np.flatnonzero(names.is_in([c.value for c in _CACHES]).to_numpy())
    storages = attribution.blocks.storage[positions].tolist()
    categories = [Category(name) for name in names.gather(positions).to_list()]
    held: dict[Category, set[int]] = {category: set() for category in _CACHES}
    for storage, category in zip(storages, categories, strict=True):
        held[category].add(storage)
    paths = frame["layer"].cast(pl.String).gather(positions).fill_null("").to_list()
    sharers = find_sharers(
        attribution.facts,
        held[Category.KV_CACHE],
        held[Category.RECURRENT_STATE],
        (call.layer for call in attribution.calls),
    )
    parts: dict[tuple[str, Category], list[Part]] = {}
    for position, storage, path, category in zip(
        positions.tolist(), storages, paths, categories, strict=True
    ):
        owners = sharers.get(storage, (path,))
        for turn, owner in enumerate(owners):
            parts.setdefault((owner, category), []).append((position, turn, len(owners)))
    return parts


def take_blocks(attribution: Attribution, parts: list[Part]) -> OwnBlocks:
    """Return blocks by their rows; of those that are shared parts, to the byte in sum."""
    positions, turn, count = np.array(parts, np.int64).T
    frame = attribution.allocations

    def share(column: str) -> Ints:
        whole = frame[column].to_numpy()[positions]
        part: Ints = whole // count + (turn < whole % count)
        return part

    return OwnBlocks(
        storage=attribution.blocks.storage[positions],
        size_bytes=share("size_bytes"),
        needed_bytes=share("requested_bytes"),
        start=frame["start"].to_numpy()[positions],
        end=frame["end"].to_numpy()[positions],
    )
