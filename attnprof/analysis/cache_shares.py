"""Whose the blocks of caches and states are, where several layers have one tensor together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import polars as pl

from attnprof.analysis.cache_use import CacheUse
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


Part = tuple[int, int, int, int]
"""The row of a block in the frame of allocations, and which part of it: from where, to where, of
how much in all."""


def share_out(attribution: Attribution) -> dict[tuple[str, Category], list[Part]]:
    """Return the parts of the blocks of caches and states per layer and category.

    Layers that write into one cache, as into a pool, have parts as large as what they write and
    read of it; of a state, and where all have the same views, equal ones.
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
    layers = [call.layer for call in attribution.calls]
    sharers = find_sharers(
        attribution.facts, held[Category.KV_CACHE], held[Category.RECURRENT_STATE], layers
    )
    pools = {s: owners for s, owners in sharers.items() if s in held[Category.KV_CACHE]}
    weights = _weigh_rooms(attribution, pools, layers)
    parts: dict[tuple[str, Category], list[Part]] = {}
    for position, storage, path, category in zip(
        positions.tolist(), storages, paths, categories, strict=True
    ):
        owners = sharers.get(storage, (path,))
        bounds = list(accumulate(weights.get(storage, [1] * len(owners)), initial=0))
        for owner, part in zip(owners, pairwise(bounds), strict=True):
            parts.setdefault((owner, category), []).append((position, *part, bounds[-1]))
    return parts


def _weigh_rooms(
    attribution: Attribution, pools: Mapping[int, Sequence[str]], layers: Iterable[str]
) -> dict[int, list[int]]:
    """Return per storage the bytes of the largest view that each owner writes or computes with.

    Views that all of the owners have tell none of them from another; without others, none does.
    """
    if not pools:
        return {}
    facts, found = attribution.facts, dict[int, list[int]]()
    use = CacheUse(facts, set(pools), layers)
    for storage, owners in pools.items():
        rows = use.rows_of(storage)
        rows = rows[facts.writes[facts.row_op[rows]] & (facts.scope[facts.row_op[rows]] >= 0)]
        scopes, views = facts.scope[facts.row_op[rows]].tolist(), facts.signature[rows].tolist()
        seen: dict[str | None, set[int]] = {owner: set() for owner in owners}
        for scope, view in dict.fromkeys(zip(scopes, views, strict=True)):
            seen.setdefault(use.writers.find_layer(scope), set()).add(view)
        common = set.intersection(*(seen[owner] for owner in owners))
        sizes = [max(map(use.count_bytes, seen[owner] - common), default=0) for owner in owners]
        if all(sizes):
            found[storage] = sizes
    return found


def take_blocks(attribution: Attribution, parts: list[Part]) -> OwnBlocks:
    """Return blocks by their rows; of those that are shared parts, to the byte in sum."""
    positions = np.array([position for position, *_ in parts], np.int64)
    frame = attribution.allocations

    def share(column: str) -> Ints:
        wholes = frame[column].gather(positions).to_list()
        bytes_of_parts = [  # numbers as long as they get: bytes times bytes
            whole * end // total - whole * begin // total
            for whole, (_, begin, end, total) in zip(wholes, parts, strict=True)
        ]
        return np.array(bytes_of_parts, np.int64)

    return OwnBlocks(
        storage=attribution.blocks.storage[positions],
        size_bytes=share("size_bytes"),
        needed_bytes=share("requested_bytes"),
        start=frame["start"].to_numpy()[positions],
        end=frame["end"].to_numpy()[positions],
    )
