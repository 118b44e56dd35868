"""The rooms of one layer's cache: storages that were there before tokens were written to them."""

from bisect import bisect_left
from collections.abc import Mapping
from functools import cached_property

from attnprof.analysis.cache_shares import OwnBlocks
from attnprof.analysis.cache_use import CacheUse, Write
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Ints
from attnprof.attribution.paths import is_inside


class CacheRooms:
    """What is written in place among the storages of one layer's cache, and what was written."""

    def __init__(
        self,
        path: str,
        blocks: OwnBlocks,
        use: CacheUse,
        calls: Mapping[int, AttentionCall],
        *,
        is_packed: bool,
    ) -> None:
        """Look at one layer.

        Args:
            path: The layer's module path.
            blocks: Its blocks.
            use: What the run's ops do with the storages.
            calls: By number of the forward, the call that read most of its keys.
            is_packed: Whether K and V are kept in a dtype too narrow to attend in.
        """
        self._path, self._blocks, self._use = path, blocks, use
        self._calls, self._is_packed = calls, is_packed
        self._written: dict[int, tuple[list[int], list[int]]] = {}

    @cached_property
    def storages(self) -> set[int]:
        """Storages that the layer writes into in part, or several times.

        What is packed while it is made is not written in place for that. None where most of what it
        keeps is made anew: then those are only states beside it, such as the last token's share of
        the next one's V. Nor are these rooms, written anew each time, beside rooms that fill up.
        """
        repeated, in_part = set[int](), set[int]()
        sizes: dict[int, int] = {}
        for storage in set(self._blocks.storage.tolist()):
            own = self._list_own_writes(storage)
            if self._is_packed:
                born = self._count_calls(int(self._use.facts.born_by[storage]))
                own = [w for w in own if self._count_calls(w.op) != born]
            sizes[storage] = size = self._size_of(storage)
            if any(w.size_bytes < size for w in own):
                in_part.add(storage)
            elif len(own) > 1:
                repeated.add(storage)
        for found in (in_part, in_part | repeated):
            others = max(
                (size for storage, size in sizes.items() if storage not in found), default=0
            )
            if sum(sizes[storage] for storage in found) > others:
                return found
        return set()

    def _list_own_writes(self, storage: int) -> list[Write]:
        """Return what writes something into a storage, and not only clears it."""
        return [w for w in self._use.writes_of(storage) if w.size_bytes and self.is_own(w.op)]

    def _count_calls(self, op: int) -> int:
        """Return how many of the layer's calls began before an op."""
        return bisect_left(self._call_begins, op)

    @cached_property
    def _call_begins(self) -> list[int]:
        return sorted(call.ops[0] for call in self._calls.values())

    def _size_of(self, storage: int) -> int:
        return int(self._blocks.needed_bytes[self._blocks.storage == storage].max())

    def is_own(self, op: int) -> bool:
        """Return whether an op is the layer's, or writes for it.

        So does one of a module around the layer, such as of a model that projects K and V once for
        all of its layers.
        """
        facts = self._use.facts
        module = facts.module_paths[facts.op_module[op]]
        if is_inside(module, self._path):
            return True
        scope = int(facts.scope[op])
        writer = self._use.writers.find_layer(scope) if scope >= 0 else None
        return writer == self._path or (
            writer is None and scope >= 0 and is_inside(self._path, module)
        )

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes that one token of every sequence takes in storages that are written in place.

        Of a prompt longer than a window only the last tokens are written, and fill all of it: then
        the room has as many slots as later calls read keys. Kernels are given more queries than
        there are tokens where these stand for heads that share a key.
        """
        for _number, call in sorted(self._calls.items()):
            written = room = slots = 0
            for storage in self.storages:
                own = [w for w in self._list_own_writes(storage) if w.op <= call.ops[0]]
                before = sum(w.size_bytes for w in own)
                written += before
                room += self._size_of(storage) if before else 0
                slots = max(slots, sum(w.slots for w in own))
            slots = min(slots or call.q_len, call.q_len)
            if written == call.batch * call.k_len * call.kv_bytes_per_token:
                slots = call.k_len  # of another sequence: as many as are read
            if written == room:
                slots = min(slots, *(other.k_len for other in self._calls.values()))
            if written and slots:
                return written // slots
        return 0

    @property
    def are_filled_at_once(self) -> bool:
        """Whether there are calls that nothing was written for: only the first ones fill a room."""
        rounds = {self._count_calls(w.op) for s in self.storages for w in self._list_own_writes(s)}
        return len(rounds) < len(self._calls)

    @property
    def are_gathered(self) -> bool:
        """Whether tokens are read by their numbers."""
        return any(self._use.is_gathered(storage) for storage in self.storages)

    def count_written(self, positions: Ints, op: int) -> int:
        """Return the bytes written into some of the layer's blocks, by their rows, before an op."""
        return sum(
            min(self._written_before(int(self._blocks.storage[at]), op), size)
            for at in positions.tolist()
            if (size := int(self._blocks.needed_bytes[at]))
        )

    def _written_before(self, storage: int, op: int) -> int:
        """Return the bytes written into a storage since it was last cleared.

        What was made from an older one has that one's tokens too: beams in another order, say.
        """
        sums = self._written.get(storage)
        if sums is None:
            self._written[storage] = sums = self._add_writes(storage)
        ops, written = sums
        return written[bisect_left(ops, op)]

    def _add_writes(self, storage: int) -> tuple[list[int], list[int]]:
        """Return the ops that write into a storage; what was written before each, and in all."""
        born_by = int(self._use.facts.born_by[storage])
        older = self._find_older(born_by)
        ops, written = [], [self._written_before(older, born_by) if older >= 0 else 0]
        for write in self._use.writes_of(storage):
            own = write.size_bytes if self.is_own(write.op) else 0
            ops.append(write.op)
            written.append(written[-1] + own if write.size_bytes else 0)
        return ops, written

    def _find_older(self, op: int) -> int:
        """Return which storage of the layer an op that makes another one takes, or -1."""
        facts = self._use.facts
        sources = (int(facts.storage[row]) for row in (facts.rows_in(op) if op >= 0 else ()))
        return next((source for source in sources if source in self.storages), -1)
