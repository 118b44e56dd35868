"""The free memory of the allocator's large pool by address: what a block takes of it.

A history tells how many bytes were asked for. A block that is not split takes all of the free block
that it was found in, and what that was follows from the addresses.
"""

from bisect import bisect_left
from collections.abc import Sequence

from attnprof.analysis.allocator.segments import Span
from attnprof.analysis.allocator.settings import SMALL_BYTES, AllocatorSettings


class FreeMemory:
    """Free extents, replayed event by event.

    Only of the large pool: blocks of the small one are always split, so that rounding says all
    about them; and not with expandable segments, whose blocks are split to the last 512 bytes.
    """

    def __init__(self, settings: AllocatorSettings) -> None:
        """Begin without a segment."""
        self._max_split_bytes = settings.max_split_size_bytes or 2**62
        self._end_of: dict[int, int] = {}  # of free extents: from the first byte to past the last
        self._start_of: dict[int, int] = {}
        self._borders: set[int] = set()
        """Where segments begin: what is free on both sides does not merge."""

    def begin_anew(self, segments: Sequence[Span], blocks: Sequence[tuple[int, int]]) -> list[int]:
        """Put seeded blocks into seeded segments, of which there are no others; return their sizes.

        Args:
            segments: Where they lie.
            blocks: Address and rounded request of each block, in the order of addresses.
        """
        for known in (self._end_of, self._start_of, self._borders):
            known.clear()
        starts = [start for start, _ in blocks]
        sizes = [rounded for _, rounded in blocks]
        for begin, end in segments:
            at = begin
            self._borders.add(at)
            first, last = bisect_left(starts, begin), bisect_left(starts, end)
            for position in range(first, last):
                start, rounded = blocks[position]
                self._add(at, start)
                following = starts[position + 1] if position + 1 < last else end
                if not self._is_split(rounded, following - start):
                    sizes[position] = max(following - start, rounded)
                at = start + sizes[position]
            self._add(at, end)
        return sizes

    def take(self, start: int, rounded: int) -> int:
        """Take a block and return its size.

        Args:
            start: Its address.
            rounded: What was asked for, rounded.
        """
        end = self._end_of.get(start)
        if end is None or end - start < rounded:  # not seen being free
            return rounded
        self._remove(start, end)
        if self._is_split(rounded, end - start):
            self._add(start + rounded, end)
            return rounded
        return end - start

    def give(self, start: int, end: int) -> None:
        """Let a block go; what is free beside it joins it."""
        if start not in self._borders and (before := self._start_of.get(start)) is not None:
            self._remove(before, start)
            start = before
        if end not in self._borders and (after := self._end_of.get(end)) is not None:
            self._remove(end, after)
            end = after
        self._add(start, end)

    def open(self, start: int, end: int) -> None:
        """Add a segment."""
        self._borders.add(start)
        self._add(start, end)

    def close(self, start: int) -> None:
        """Remove a segment, all of which is free."""
        self._borders.discard(start)
        if (end := self._end_of.get(start)) is not None:
            self._remove(start, end)

    def _is_split(self, rounded: int, extent: int) -> bool:
        return rounded < self._max_split_bytes and extent - rounded > SMALL_BYTES

    def _add(self, start: int, end: int) -> None:
        if start < end:
            self._end_of[start] = end
            self._start_of[end] = start

    def _remove(self, start: int, end: int) -> None:
        del self._end_of[start], self._start_of[end]
