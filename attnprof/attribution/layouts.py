"""Dimensions that were folded into one: batch and heads before bmm, heads and queries in MQA.

Folding loses which part of a dimension was what. A layout keeps it: the signature that an output
would have, had nothing been folded, with bits of its own per dimension. Later views are read
against the layout, and where they unfold again, every part has its own bits back.
"""

from collections.abc import Iterator

from attnprof.attribution.axes import SIDES, TOKEN, Bits
from attnprof.attribution.facts import Signature

Layout = tuple[Signature, Bits]
Factors = tuple[tuple[int, int], ...]
"""(size, bits) of the parts of one dimension, outermost first."""


def unfold(written: Signature, bits: Bits, read: Signature) -> tuple[Factors, ...]:
    """Return the parts of every dimension of a view, as far as its memory layout tells.

    Args:
        written: How the memory was written, with ``bits`` per dimension.
        bits: The bits of the written tensor.
        read: The view; a dimension whose range of strides is tiled by several written dimensions
            has those as its parts, any other is its own only part, with bits if they agree.
    """
    sources = sorted(
        (
            source
            for size, stride, bit in zip(written.shape, written.stride, bits, strict=True)
            if size > 1 and stride
            for source in _split(stride, size, bit, read.stride)
        ),
        reverse=True,
    )
    result = []
    for size, stride in zip(read.shape, read.stride, strict=True):
        parts = [s for s in sources if stride <= s[0] < stride * size] if size > 1 else []
        reach = stride
        for part_stride, part_size, _ in reversed(parts):
            if part_stride != reach:
                break
            reach *= part_size
        tiled = bool(parts) and reach == stride * size
        if tiled:
            result.append(tuple((p, b) for _, p, b in parts))
            continue
        met = {b for s, p, b in sources if s < stride * size and stride < s * p}
        result.append(((size, met.pop() if len(met) == 1 and stride else 0),))
    return tuple(result)


def _split(stride: int, size: int, bit: int, at: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield (stride, size, bit) of the parts of a dimension that a view reads as several.

    A projection writes heads and their features as one dimension; a view of heads beside tokens
    takes the heads alone.
    """
    for border in sorted(set(at)):
        if stride < border < stride * size and border % stride == 0 == stride * size % border:
            yield stride, border // stride, bit
            stride, size = border, stride * size // border
    yield stride, size, bit


def fold(out: Signature, bits: Bits, dimensions: tuple[Factors, ...]) -> Layout | None:
    """Return the unfolded layout of an output, or None if none of its dimensions is folded.

    Args:
        out: The output's signature; it must be contiguous, as results of products are.
        bits: Its bits. Sides that no part has yet go to the parts that are tokens.
        dimensions: The parts of each dimension.
    """
    if len(dimensions) != len(out.shape) or all(len(parts) < 2 for parts in dimensions):
        return None
    shape: list[int] = []
    unfolded: list[int] = []
    for size, bit, parts in zip(out.shape, bits, dimensions, strict=True):
        if len(parts) < 2:
            shape.append(size)
            unfolded.append(bit)
            continue
        own = 0
        for _, part_bit in parts:
            own |= part_bit & SIDES
        new = bit & SIDES & ~own
        any_token = any(part_bit & TOKEN for _, part_bit in parts)
        for part, part_bit in parts:
            takes = new if part_bit & TOKEN or not any_token else 0
            shape.append(part)
            unfolded.append(part_bit & ~SIDES | part_bit & bit & SIDES | takes)
    stride = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        stride[i] = stride[i + 1] * shape[i + 1]
    if stride[0] * shape[0] != out.numel or not _is_contiguous(out):
        return None
    return Signature(tuple(shape), tuple(stride), out.dtype, out.numel), tuple(unfolded)


def _is_contiguous(signature: Signature) -> bool:
    reach = 1
    for size, stride in zip(reversed(signature.shape), reversed(signature.stride), strict=True):
        if size > 1 and stride != reach:
            return False
        reach *= size
    return True
