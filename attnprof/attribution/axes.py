"""Where the dimensions of a tensor come from: tokens, features, and the sides of a product.

Every dimension carries a set of bits. ``TOKEN`` marks what stems from the program's data (batch
and sequence), ``FEATURE`` what stems from parameters (heads, head dimension, hidden size). A
product under examination marks its rows ``LEFT`` and its columns ``RIGHT``. Bits follow views by
memory layout: a view's dimension covers a range of strides, and it stems from those dimensions of
the tensor as it was written whose ranges it meets. This holds through transpose, reshape, split,
slice and windows alike, and where sizes coincide (n equal to the hidden size).
"""

from attnprof.attribution.facts import Signature

TOKEN, FEATURE, LEFT, RIGHT = 1, 2, 4, 8
SIDES = LEFT | RIGHT

Bits = tuple[int, ...]
"""A set of bits per dimension. Dimensions of size 1 have none: they stem from nothing."""


def without_sides(bits: Bits) -> Bits:
    """Return the bits of a tensor that is no score."""
    return tuple(bit & ~SIDES for bit in bits)


def of_source(signature: Signature, *, is_parameter: bool) -> Bits:
    """Return the bits of a tensor that no op made.

    Integers are tokens. Of floating-point data the last dimension is taken for features, as in
    (batch, tokens, features); a projection replaces it in any case. What an expanded view repeats
    (latents, for every sequence of a batch) stems from nothing.
    """
    last = len(signature.shape) - 1
    is_float = "float" in signature.dtype or "complex" in signature.dtype
    bits = []
    for i, (size, stride) in enumerate(zip(signature.shape, signature.stride, strict=True)):
        feature = is_parameter or (is_float and i == last and last > 0)
        bits.append(0 if size == 1 or not stride else FEATURE if feature else TOKEN)
    return tuple(bits)


def through_view(written: Signature, bits: Bits, read: Signature) -> Bits:
    """Return the bits of a tensor that reads memory written through another.

    Args:
        written: How the memory was written, with ``bits`` per dimension.
        bits: The bits of the written tensor.
        read: How it is read: any view of the same storage.
    """
    sources = [
        (stride * written.item_bytes, stride * size * written.item_bytes, bit)
        for size, stride, bit in zip(written.shape, written.stride, bits, strict=True)
        if size > 1 and stride
    ]
    result = []
    for size, stride in zip(read.shape, read.stride, strict=True):
        begin, end = stride * read.item_bytes, stride * size * read.item_bytes
        found = 0
        if size > 1 and stride:
            for source_begin, source_end, bit in sources:
                if begin < source_end and source_begin < end:
                    found |= bit
        result.append(found)
    return tuple(result)


def through_op(out: Signature, inputs: list[tuple[Signature, Bits]]) -> Bits:
    """Return the bits of an op's output when nothing is known of the op but shapes."""
    result = [0] * len(out.shape)
    for signature, bits in inputs:
        for i, bit in enumerate(_align(out, signature, bits)):
            if out.shape[i] > 1:
                result[i] |= bit
    return tuple(result)


def _align(out: Signature, signature: Signature, bits: Bits) -> Bits:
    """Lay an input's bits along the output's dimensions."""
    missing = len(out.shape) - len(bits)
    if missing == 0:
        return bits
    if missing > 0:  # broadcast from the right, if the sizes allow it
        pairs = zip(out.shape[missing:], signature.shape, strict=True)
        if all(size in (1, wide) for wide, size in pairs):
            return (0,) * missing + bits
    result = []  # a reduction, a gather, a stack: match sizes in order
    at = 0
    for size in out.shape:
        match = next((i for i in range(at, len(bits)) if signature.shape[i] == size), None)
        result.append(0 if match is None else bits[match])
        at = at if match is None else match + 1
    return tuple(result)


def of_embedding(out: Signature, indices: Bits) -> Bits:
    """Return the bits of rows looked up in a table: the indices' dimensions, then a feature."""
    return (*indices, FEATURE) if len(indices) + 1 == len(out.shape) else (0,) * len(out.shape)


def of_convolution(out: Signature, data: Bits) -> Bits:
    """Return the bits of a convolution (N, C, *spatial).

    Its channels are new features; what it slides over are positions: time, rows, columns.
    """
    if len(data) != len(out.shape):
        return (0,) * len(out.shape)
    channel = 0 if len(out.shape) < 2 or out.shape[-len(out.shape) + 1] == 1 else FEATURE
    spatial = [
        b | TOKEN if size > 1 else 0 for b, size in zip(data[2:], out.shape[2:], strict=True)
    ]
    return (data[0], channel, *spatial)


def of_product(out: Signature, left: Bits, right: Bits) -> Bits:
    """Return the bits of ``left @ right``: batch dimensions, rows of left, columns of right."""
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    batch = tuple(a | b for a, b in zip(left[:-2], right[:-2], strict=False)) or left[:-2]
    bits = (*batch, *rows, *columns)
    return bits if len(bits) == len(out.shape) else (0,) * len(out.shape)
