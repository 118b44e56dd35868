"""What one layer's cache is: how it grows, how many tokens it holds, how much of it they fill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np

from attnprof.analysis.block_tables import EMPTY, BlockTables, describe_blocks
from attnprof.analysis.cache_rooms import CacheRooms
from attnprof.analysis.cache_shares import OwnBlocks
from attnprof.analysis.cache_use import CacheUse
from attnprof.analysis.forwards import Forward
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Ints
from attnprof.vocabulary import Category

_ANY = -1
"""Stands for any storage."""
_NARROW = ("int", "uint", "float8", "float4", "bits")
"""Beginnings of dtypes that attention does not compute in."""


class CacheKind(StrEnum):
    """How a layer keeps the past, read from what its ops do with the storages."""

    GROWN = "grown"
    """Made anew, longer, for new tokens: concatenated."""
    WINDOW = "window"
    """Made anew for new tokens; only a window of it is kept for the next one."""
    PREALLOCATED = "preallocated"
    """Written in place, into room that was taken in advance."""
    PAGED = "paged"
    """Written in place and read by position: pages of a pool."""
    QUANTISED = "quantised"
    """Kept in a dtype that attention does not compute in."""
    LATENT = "latent"
    """Something shorter than K and V, from which they are projected whenever they are read."""
    CROSS = "cross"
    """K and V of another sequence, such as an encoder's: made once and read from then on."""
    STATE = "state"
    """A recurrent or convolution state: as large for one token as for a thousand."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a layer's cache holds when a forward has ended."""

    held_bytes: int
    needed_bytes: int
    """What is held, but for what the allocator rounded up."""
    reachable_bytes: int
    used_bytes: int
    newest_bytes: int
    """Of those, what the forward's own tokens are in: other answers' caches may be left, and older
    generations of this one."""
    tokens: int | None
    dtype: str
    blocks: dict[str, int | None]
    """Columns of `block_tables.SCHEMA`."""


class CacheLayer:
    """One layer's cache over a run."""

    def __init__(
        self,
        path: str,
        category: Category,
        blocks: OwnBlocks,
        use: CacheUse,
        calls: Mapping[int, AttentionCall],
        *,
        latent: frozenset[int] = frozenset(),
        tables: BlockTables | None = None,
        is_continued: bool = False,
    ) -> None:
        """Look at one layer.

        Args:
            path: The layer's module path.
            category: ``kv_cache`` or ``recurrent_state``.
            blocks: Its blocks.
            use: What the run's ops do with the storages.
            calls: By number of the forward, the call that read most of its keys.
            latent: Storages of any layer from which K and V are projected.
            tables: What an engine said of the blocks of its paged caches.
            is_continued: Whether its first forward is decode: the trace began in the middle.
        """
        self.path, self.category, self.blocks = path, category, blocks
        self._use, self._calls = use, calls
        self._storages = set(blocks.storage.tolist())
        self._tables, self._is_continued = tables, is_continued
        self._is_latent = bool(latent & self._storages)

    @cached_property
    def _rooms(self) -> CacheRooms:
        return CacheRooms(self.path, self.blocks, self._use, self._calls, is_packed=self._is_packed)

    @cached_property
    def _in_place(self) -> set[int]:
        """Storages that are written in place; a state is written anew, however it is done."""
        return set() if self.category is Category.RECURRENT_STATE else self._rooms.storages

    def has_pool_at(self, place: int) -> bool:
        """Return whether something that is written in place is live just before an event."""
        own = self.blocks
        live = own.storage[(own.start < place) & (own.end >= place)]
        return bool(self._in_place & set(live.tolist()))

    def content_after(self, forward: Forward) -> Content:
        """Return what the layer holds when a forward has ended."""
        own, place = self.blocks, forward.settled_event
        live = np.flatnonzero((own.start < place) & (own.end >= place))
        held, needed = int(own.size_bytes[live].sum()), int(own.needed_bytes[live].sum())
        reachable, taken, by_dtype = 0, dict[int, int](), dict[str, int]()
        for at in live.tolist():
            storage, size = int(own.storage[at]), int(own.needed_bytes[at])
            view = self._use.find_view(storage, forward.exit_op)
            if view is None:
                reachable += size
                continue
            shown = size
            if storage not in self._in_place:
                shown = self._use.count_shown(storage, forward.exit_op) * view.item_bytes
            reachable += min(shown, size)
            if self._use.is_used(storage, forward.enter_op, forward.exit_op):
                taken[storage] = taken.get(storage, 0) + min(shown, size)
            seen = self._dtype_of(storage, view.dtype)
            by_dtype[seen] = by_dtype.get(seen, 0) + size
        call = self._call_before(forward)
        used, tokens = self._count_used(forward, live, needed, reachable, call)
        dtype = max(by_dtype, key=lambda name: by_dtype[name], default="")
        blocks = EMPTY
        table = self._tables.find(self.path, self._storages, forward) if self._tables else None
        if table is not None and self._rooms.slot_bytes:
            tokens = table["tokens"]
            used = tokens * self._rooms.slot_bytes
            blocks = describe_blocks(table, self._rooms.slot_bytes)
        older = self._use.list_older(taken, forward.enter_op, forward.exit_op)
        newest = sum(shown for storage, shown in taken.items() if storage not in older)
        newest = 0 if self._in_place else newest
        return Content(held, needed, reachable, used, newest, tokens, dtype, blocks)

    def _count_used(
        self, forward: Forward, live: Ints, needed: int, reachable: int, call: AttentionCall | None
    ) -> tuple[int, int | None]:
        """Return the bytes that tokens were written to, and how many tokens those are."""
        if call is None or self.category is Category.RECURRENT_STATE:
            return reachable, None
        if not self._in_place:
            tokens = None if self._is_packed else self._count_tokens(forward, live)
            if tokens is None:
                share = reachable / needed if needed and not self._is_packed else 1
                tokens = round(call.k_len * share)
            return reachable, tokens
        token_bytes = self._rooms.slot_bytes
        if not token_bytes:
            return reachable, None
        capacity = needed // token_bytes
        if call.k_len < capacity:  # it reads what was written, and not the room after it
            return call.k_len * token_bytes, call.k_len
        if self._is_unknown(forward, live):
            return reachable, None
        written = self._rooms.count_written(live, forward.exit_op)
        tokens = min(written // token_bytes, capacity)
        return tokens * token_bytes, tokens

    def _is_unknown(self, forward: Forward, live: Ints) -> bool:
        """Return whether tokens were written before the trace began: nobody saw how many."""
        if not self._is_continued:
            return False
        storages = self.blocks.storage[live].tolist()
        cleared = (
            any(w.op < forward.exit_op and not w.size_bytes for w in self._use.writes_of(storage))
            for storage in storages
            if self._use.facts.born_by[storage] < 0
        )
        return not all(cleared)

    def _count_tokens(self, forward: Forward, live: Ints) -> int | None:
        """Return how long live storages are where new tokens are appended, if all agree."""
        counts = set[int | None]()
        for storage in self.blocks.storage[live].tolist():
            view = self._use.find_view(storage, forward.exit_op)
            rank = len(view.shape) if view else 0
            growing = self._growing_dims
            dims = growing.get((storage, rank)) or growing.get((_ANY, rank), set())
            dim = next(iter(dims)) if len(dims) == 1 else rank
            counts.add(view.shape[dim] if view and dim < rank else None)
        return counts.pop() if len(counts) == 1 else None

    @cached_property
    def _growing_dims(self) -> dict[tuple[int, int], set[int]]:
        """Dimensions in which storages are concatenated, by storage (or any) and rank.

        What attention reads is not always what is kept: some tokens may be dropped when it has.
        """
        facts, found = self._use.facts, dict[tuple[int, int], set[int]]()
        readers = {op for s in self._storages for op in self._use.readers_of(s).tolist()}
        for op in sorted(readers):
            own = [row for row in facts.rows_in(op) if int(facts.storage[row]) in self._storages]
            if facts.short_names[facts.code[op]] != "cat" or len(own) != 1:
                continue
            old, (row, *_) = facts.signature_of(own[0]).shape, facts.rows_out(op)
            new = facts.signature_of(row).shape
            longer = {dim for dim, (a, b) in enumerate(zip(old, new, strict=False)) if a != b}
            for storage in (int(facts.storage[own[0]]), int(facts.storage[row]), _ANY):
                key = storage, len(new)
                found[key] = found.get(key, set()) | longer
        return found

    def _call_before(self, forward: Forward) -> AttentionCall | None:
        """Return the layer's newest call, up to and including those of a forward."""
        numbers = self._call_numbers
        at = int(np.searchsorted(numbers, forward.number, "right")) - 1
        return self._calls[int(numbers[at])] if at >= 0 else None

    @cached_property
    def _call_numbers(self) -> Ints:
        return np.array(sorted(self._calls), np.int64)

    def call_of(self, forward: Forward) -> AttentionCall | None:
        """Return the layer's newest call, for its shapes; the first one before there was any."""
        numbers = self._call_numbers
        return self._call_before(forward) or (
            self._calls[int(numbers[0])] if len(numbers) else None
        )

    @cached_property
    def _is_packed(self) -> bool:
        """Whether some of the storages hold K and V in a dtype too narrow to attend in."""
        computes = {call.dtype for call in self._calls.values()}
        return any(
            dtype.startswith(_NARROW) and dtype not in computes
            for storage in self._storages
            for dtype in self._use.dtypes_of(storage)[-1:]
        )

    def _dtype_of(self, storage: int, seen: str) -> str:
        """Return the dtype of what is kept; engines also see their pool as plain bytes."""
        if self._is_packed or not seen.startswith(_NARROW):
            return seen
        others = (d for d in self._use.dtypes_of(storage) if not d.startswith(_NARROW))
        return next(others, seen)

    def name_kind(self, forwards: Sequence[Forward], contents: Sequence[Content]) -> CacheKind:
        """Say how the layer keeps the past, from what it held after its forwards too."""
        if self.category is Category.RECURRENT_STATE:
            return CacheKind.STATE
        if self._is_packed:
            return CacheKind.QUANTISED
        has_table = any(content.blocks is not EMPTY for content in contents)
        if self._in_place and (self._rooms.are_gathered or has_table):
            return CacheKind.PAGED
        if self._is_latent:
            return CacheKind.LATENT
        lengths = {call.k_len for call in self._calls.values()}
        is_constant = len(self._calls) > 1 and len(lengths) == 1 and not self._is_extended
        if is_constant and any(map(self._is_read_again, forwards)):
            return CacheKind.CROSS
        if self._in_place:
            return CacheKind.PREALLOCATED
        # After its own forwards: what is cropped later is no window. Nor are K and V where they
        # keep the Q that was projected with them.
        is_sliced = any(
            content.reachable_bytes < content.needed_bytes
            and (content.tokens or 0) < self._calls[forward.number].k_len
            for forward, content in zip(forwards, contents, strict=True)
            if forward.number in self._calls
        )
        return CacheKind.WINDOW if is_sliced else CacheKind.GROWN

    def _is_read_again(self, forward: Forward) -> bool:
        """Return whether a forward that attends uses what was there before it."""
        begin, end = forward.enter_op, forward.exit_op
        return forward.number in self._calls and any(
            self._use.is_used(storage, begin, end)
            for storage in self._storages
            if not begin <= self._use.facts.born_by[storage] < end
        )

    @cached_property
    def _is_extended(self) -> bool:
        """Whether the layer makes one generation of its cache from another, or adds to it in place.

        An encoder's K and V are written for the first of several calls, and for the next prompt.
        """
        facts = self._use.facts
        if self._in_place and not self._rooms.are_filled_at_once:
            return True
        for storage in self._storages:
            op = int(facts.born_by[storage])
            sources = {int(facts.storage[row]) for row in facts.rows_in(op)} if op >= 0 else set()
            if op >= 0 and self._rooms.is_own(op) and sources & self._storages:
                return True
        return False
