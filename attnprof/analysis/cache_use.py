"""How a run's ops use the storages of its caches: what reads them, what writes into them."""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnprof.attribution.facts import Facts, Ints, Signature
from attnprof.attribution.growing import count_slots
from attnprof.attribution.products import is_product
from attnprof.attribution.sharing import CacheWriters

_GATHERING = re.compile(r"^(index|index_select|gather|take|embedding)$")
"""Ops that pick tokens by number: how pages are read."""
_NUMBERS = frozenset({"int64", "int32", "bool"})
"""Dtypes of positions and masks, which are never what is written into a cache in place."""


@dataclass(frozen=True)
class Write:
    """One op's writing into a storage that was there before."""

    op: int
    size_bytes: int
    """Bytes of the storage that it wrote; 0 for an op that only clears."""
    slots: int = 0
    """Tokens that it wrote, where its operands differ from the storage in one dimension; else 0."""


class CacheUse:
    """The operand rows of some storages, in the order of ops."""

    def __init__(
        self,
        facts: Facts,
        storages: set[int],
        layers: Iterable[str] = (),
        ends: Sequence[int] = (),
    ) -> None:
        """Index the rows of some storages.

        Args:
            facts: The run's tables.
            storages: The storages.
            layers: The paths of the attention layers that write into them.
            ends: Where forwards end: the first ops after them, in order.
        """
        self.facts = facts
        self._ends = ends
        self.writers = CacheWriters(facts, layers)
        wanted = np.zeros(facts.storage_count + 1, np.bool_)
        wanted[list(storages)] = True
        rows = np.flatnonzero(wanted[facts.storage])
        rows = rows[np.argsort(facts.storage[rows], kind="stable")]
        self._rows: Ints = rows
        self._ops: Ints = facts.row_op[rows]
        places = np.where(facts.is_input[rows], np.arange(len(rows)), len(rows))
        self._next_input: Ints = np.minimum.accumulate(np.append(places, len(rows))[::-1])[::-1]
        """Per place among the rows, the first from there on that is an operand's."""
        self._starts: Ints = np.searchsorted(
            facts.storage[rows], np.arange(facts.storage_count + 1), "left"
        )
        self._writes: dict[int, list[Write]] = {}
        self._made: dict[int, dict[int, list[int]]] = {}
        self._left: dict[int, Signature] = {}

    def _place_of(self, storage: int, op: int) -> tuple[int, int]:
        """Return among the rows the first of a storage that ``op`` or a later one has, and an end.

        A room has rows of every token's ops, so that not all of them are looked at each time.
        """
        begin, end = int(self._starts[storage]), int(self._starts[storage + 1])
        return begin + int(np.searchsorted(self._ops[begin:end], op, "left")), end

    def rows_of(self, storage: int) -> Ints:
        """Return the operand rows of a storage, in the order of ops."""
        return self._rows[self._starts[storage] : self._starts[storage + 1]]

    def readers_of(self, storage: int) -> Ints:
        """Return the ops that take a storage as an operand."""
        rows = self.rows_of(storage)
        return np.unique(self.facts.row_op[rows[self.facts.is_input[rows]]])

    def is_used(self, storage: int, begin: int, end: int) -> bool:
        """Return whether an op from ``begin`` on and before ``end`` takes or returns a storage."""
        return self._place_of(storage, begin) < self._place_of(storage, end)

    def list_older(self, storages: Iterable[int], begin: int, end: int) -> set[int]:
        """Return those of some storages that a forward made others of them from, to go on with.

        A caller that still has the cache that it handed in holds both. What a product makes of a
        storage, such as K of a latent, does not take its place.

        Args:
            storages: The storages.
            begin: The forward's first op.
            end: The first op after it.
        """
        born = {storage: int(self.facts.born_by[storage]) for storage in storages}
        before = {storage for storage, op in born.items() if op < begin}
        if not before:
            return set()
        facts, sources = self.facts, set[int]()
        todo = [op for op in born.values() if begin <= op < end]
        seen = set(todo)
        while todo:
            op = todo.pop()
            if is_product(facts, op):
                continue
            rows = np.array(facts.rows_in(op), np.int64)
            sources.update(facts.storage[rows].tolist())
            made = facts.producer_row[rows]
            makers = set(facts.row_op[made[made >= 0]].tolist())
            todo += [maker for maker in makers - seen if maker >= begin]
            seen |= makers
        return before & sources

    def dtypes_of(self, storage: int) -> list[str]:
        """Return the dtypes through which modules see a storage, in order of first use.

        Those that the program sees it through where no module does: ``copy.deepcopy`` copies bytes.
        """
        rows = self.rows_of(storage)
        inside = rows[self.facts.op_module[self.facts.row_op[rows]] >= 0]
        numbers = self.facts.signature[inside if len(inside) else rows].tolist()
        signatures = (self.facts.signatures[number] for number in dict.fromkeys(numbers))
        return list(dict.fromkeys(signature.dtype for signature in signatures))

    def find_view(self, storage: int, op: int) -> Signature | None:
        """Return the view of a storage that is left when ``op`` begins.

        That is what the next op to read the storage takes; a program that kept a slice can only
        take that slice. Where nothing reads it any more, the last view that was made of the
        storage and that nothing took counts as the one that was kept for later. An op that makes
        the view it takes once more (torch 2.8 slices a ``:`` too) does not take it.
        """
        at, end = self._place_of(storage, op)
        reading = int(self._next_input[at])
        if reading < end:
            return self.facts.signature_of(int(self._rows[reading]))
        earlier = self._rows[int(self._starts[storage]) : at]
        if at not in self._left and len(earlier):
            self._left[at] = self._find_left(earlier)
        return self._left[at] if len(earlier) else None

    def _find_left(self, earlier: Ints) -> Signature:
        """Return the view of a storage, by all of its rows, that was made last and not taken."""
        facts = self.facts
        made = earlier[~facts.is_input[earlier]]
        if not len(made):
            return facts.signature_of(int(earlier[-1]))
        taking = self._pair_up(earlier[facts.is_input[earlier]]) - self._pair_up(made)
        taken = {signature for _op, signature in taking}
        for row in made[::-1].tolist():
            if int(facts.signature[row]) not in taken:
                return facts.signature_of(row)
        return facts.signature_of(int(made[0]))

    def count_shown(self, storage: int, op: int) -> int:
        """Return how many elements of a storage can be seen when ``op`` begins.

        Those of `find_view`, and of the other views that the same forward takes: K and V may be
        views of what one projection returned, with Q beside them. Views that look alike are as many
        as were made, and no more than are taken.
        """
        view = self.find_view(storage, op)
        if view is None:
            return 0
        at, end = self._place_of(storage, op)
        reading = int(self._next_input[at])
        if reading >= end:
            return count_distinct(view)
        last = bisect_right(self._ends, int(self._ops[reading]))
        if last < len(self._ends):
            end, _ = self._place_of(storage, self._ends[last])
        later = self._rows[at:end]
        anew = self._count_views(later, False)
        shown = sum(
            min(count, self._count_made(storage, number, at))
            * count_distinct(self.facts.signatures[number])
            for number, count in self._count_views(later, True).items()
            if number not in anew
        )
        return max(shown, count_distinct(view))

    def _count_made(self, storage: int, number: int, place: int) -> int:
        """Return how many rows before a place are results that have a signature."""
        found = self._made.get(storage)
        if found is None:
            self._made[storage] = found = {}
            begin, end = int(self._starts[storage]), int(self._starts[storage + 1])
            rows = self._rows[begin:end]
            outputs = np.flatnonzero(~self.facts.is_input[rows])
            for at, made in zip(
                outputs.tolist(), self.facts.signature[rows[outputs]].tolist(), strict=True
            ):
                found.setdefault(made, []).append(begin + at)
        return bisect_left(found.get(number, []), place)

    def count_bytes(self, number: int) -> int:
        """Return how many bytes of memory a view shows, by the number of its signature."""
        signature = self.facts.signatures[number]
        return count_distinct(signature) * signature.item_bytes

    def _count_views(self, rows: Ints, is_input: bool) -> Counter[int]:
        """Return how often each signature is among the operands, or the results, in some rows."""
        facts = self.facts
        return Counter(facts.signature[rows[facts.is_input[rows] == is_input]].tolist())

    def _pair_up(self, rows: Ints) -> set[tuple[int, int]]:
        """Return the op and the signature of every row."""
        facts = self.facts
        return set(zip(facts.row_op[rows].tolist(), facts.signature[rows].tolist(), strict=True))

    def writes_of(self, storage: int) -> list[Write]:
        """Return the in-place writes into a storage, in the order of ops."""
        found = self._writes.get(storage)
        if found is None:
            facts, rows = self.facts, self.rows_of(storage)
            outs = rows[~facts.is_input[rows]]
            outs = outs[facts.are_written_in_place(outs)]
            found = [self._read_write(row) for row in outs.tolist()]
            self._writes[storage] = found
        return found

    def _read_write(self, row: int) -> Write:
        """Return how much an op wrote into the view in one of its output rows.

        Of a view that an op writes into by position, it writes as much as it takes from beside.
        """
        facts = self.facts
        op = int(facts.row_op[row])
        region = facts.signature_of(row)
        sources = [
            facts.signature_of(r)
            for r in facts.rows_in(op)
            if facts.storage[r] != facts.storage[row]
        ]
        sources = [source for source in sources if source.dtype not in _NUMBERS]
        largest = max(sources, key=lambda source: source.numel, default=None)
        written = min(largest.numel if largest else 0, count_distinct(region))
        whole = facts.signature_of(int(self._rows[self._starts[facts.storage[row]]]))
        slots = count_slots(whole, region, *sources) if written else 0
        return Write(op, written * region.item_bytes, slots)

    @cached_property
    def gathers(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Per op code, whether the op picks elements by number."""
        return np.array([bool(_GATHERING.match(n)) for n in self.facts.short_names], np.bool_)

    def is_gathered(self, storage: int) -> bool:
        """Return whether some op of a module reads a storage by the numbers of its elements.

        Beam search does so between forwards, to put sequences in another order.
        """
        readers = self.readers_of(storage)
        readers = readers[self.facts.op_module[readers] >= 0]
        return bool(self.gathers[self.facts.code[readers]].any())


def count_distinct(signature: Signature) -> int:
    """Return how many elements a view has in memory; an expanded one shows some several times."""
    sizes = zip(signature.shape, signature.stride, strict=True)
    return int(np.prod([size for size, stride in sizes if stride or size == 0], dtype=np.int64))
