"""What the values of a tensor are made from."""

from enum import IntEnum


class Origin(IntEnum):
    """In rising order: the highest of an op's operands wins."""

    CONSTANT = 0
    """Buffers, what factory ops make inside a module, and what is made only from them."""
    PARAMETER = 1
    """Parameters, and what is made from them without a product: casts, views, embeddings of
    positions, dequantised weights."""
    UPDATE = 2
    """Gradients of parameters and what optimizers keep, and what is made from them, products
    among them too: some orthogonalise a gradient by multiplying it with itself (Muon)."""
    ACTIVATION = 3


def of_product(left: Origin, right: Origin) -> Origin:
    """Return what a product is made from: with parameters it makes data, of whatever there was."""
    if Origin.PARAMETER in (left, right):
        return Origin.ACTIVATION
    return max(left, right)
