"""Ranges of addresses that the allocator holds, and what of them is free."""

from bisect import bisect_left
from collections.abc import Iterable

Span = tuple[int, int]
"""First byte and past the last."""


def cut(spans: dict[int, int], begin: int, end: int) -> None:
    """Take a range out of the spans that it meets.

    Segments of ``cudaMalloc`` go whole. Expandable ones are mapped and unmapped in ranges that need
    not be those that others were mapped in.

    Args:
        spans: The end of each span by its beginning; changed in place.
        begin: The first byte of the range.
        end: Past its last byte.
    """
    if spans.get(begin) == end:  # whole: the usual case
        del spans[begin]
        return
    for at, until in [(a, u) for a, u in spans.items() if a < end and begin < u]:
        del spans[at]
        if at < begin:
            spans[at] = begin
        if end < until:
            spans[end] = until


def merge(spans: Iterable[Span]) -> list[Span]:
    """Return spans in order, those that touch as one."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def list_gaps(spans: Iterable[Span], blocks: list[Span]) -> list[int]:
    """Return the sizes of what no block covers, per span in order of addresses.

    Args:
        spans: Disjoint ranges.
        blocks: Disjoint ranges, sorted.
    """
    starts = [begin for begin, _ in blocks]
    gaps = []
    for begin, end in spans:
        at = begin
        position = bisect_left(starts, begin)
        while position < len(blocks) and starts[position] < end:
            gaps.append(starts[position] - at)
            at = max(at, blocks[position][1])
            position += 1
        gaps.append(end - at)
    return [gap for gap in gaps if gap > 0]
