"""Which ops are matrix products, and where their factors are."""

import re

from attnprof.attribution.facts import Facts

PRODUCTS = {
    "mm": 0, "bmm": 0, "mv": 0, "dot": 0, "vdot": 0, "matmul": 0, "addmm": 1, "baddbmm": 1,
    "addbmm": 1, "addmv": 1, "_addmm_activation": 1, "_scaled_mm": 0, "_int_mm": 0,
    "_grouped_mm": 0, "_scaled_grouped_mm": 0, "_scaled_mm_v2": 0, "linalg_solve_triangular": 0,
    "linalg_solve": 0, "_linalg_solve_ex": 0, "linalg_lu_solve": 0,
}  # fmt: skip
"""Matrix products, and the position of their left factor among the tensor operands. To solve a
linear system is to multiply by an inverse."""

LINEARS = frozenset({"linear", "_linear_pointwise", "_mkl_linear", "mkldnn_linear"})
"""Products with a transposed weight in second place."""

DISTANCES = frozenset({"_cdist_forward", "_euclidean_dist"})
"""Distances of every row of one operand to every row of the other: scores by another measure."""

CONVOLUTIONS = frozenset(
    {"convolution", "_convolution", "mkldnn_convolution", "_convolution_pointwise"}
)

MULTIPLICATIONS = frozenset({"mul", "mul_"})

OVERWRITING = frozenset({"copy_", "fill_", "zero_"})
"""Ops after which nothing is left of their first operand."""

SHAPED_LIKE = frozenset({"new_ones", "ones_like"})
"""Ops that take from their operand nothing but its shape. What is made empty, or of another number,
is more often a place to write to."""

FILLED_ANEW = frozenset({"new_zeros", "zeros_like"})
"""Ops that take from their operand nothing but its shape or dtype: states begin with them."""

UNFILLED = FILLED_ANEW | {"zeros", "empty", "empty_like", "empty_strided", "new_empty"}
"""Ops that make a tensor which says nothing: a place to write to, or to add to."""

INDEXING = re.compile(r"^(index|gather|scatter|embedding|take)")
"""Ops whose integer operands are places in another operand."""

DROPOUT = re.compile(r"dropout|bernoulli")
"""Ops that drop elements at random, or draw which."""

NORMALISING = re.compile(r"_?(safe_)?softmax|exp_?")
"""Ops that make scores positive: a softmax, or the first step of one written out."""

INTEGERS = frozenset({"int64", "int32"})
"""The dtypes of indices, lengths and tables of blocks."""

OTHER, EMBEDDING, CONVOLUTION = -1, -2, -3


def classify(name: str) -> int:
    """Return the position of a product's left factor, or a negative number for other ops."""
    if name in PRODUCTS:
        return PRODUCTS[name]
    if name in LINEARS or name in DISTANCES:
        return 0
    if name == "embedding":
        return EMBEDDING
    return CONVOLUTION if name in CONVOLUTIONS else OTHER


def is_product(facts: Facts, op: int) -> bool:
    """Return whether an op is a matrix product or a convolution."""
    name = facts.short_names[facts.code[op]]
    return name in PRODUCTS or name in LINEARS or name in DISTANCES or name in CONVOLUTIONS


def is_matrix_product(facts: Facts, op: int) -> bool:
    """Return whether an op is a product, and no convolution."""
    return is_product(facts, op) and facts.short_names[facts.code[op]] not in CONVOLUTIONS


def is_distance(facts: Facts, op: int) -> bool:
    """Return whether an op takes the distances of all rows of two operands."""
    return facts.short_names[facts.code[op]] in DISTANCES


def is_index(facts: Facts, row: int) -> bool:
    """Return whether an op takes the integers in an operand row for places in another operand."""
    name = facts.short_names[facts.code[facts.row_op[row]]]
    return facts.signature_of(row).dtype in INTEGERS and bool(INDEXING.match(name))


def is_outer_product(facts: Facts, op: int) -> bool:
    """Return whether an op multiplies a column by a row, broadcast over the other dimensions."""
    rows = facts.rows_in(op)
    if facts.short_names[facts.code[op]] not in MULTIPLICATIONS or len(rows) != 2:
        return False
    left, right = (facts.signature_of(row).shape for row in rows)
    if min(len(left), len(right)) < 2:
        return False
    (a, b), (c, d) = left[-2:], right[-2:]
    return (b == c == 1 and min(a, d) > 1) or (a == d == 1 and min(b, c) > 1)


def factors(facts: Facts, op: int) -> tuple[int, int]:
    """Return the operand rows of a product's left and right factor."""
    first = int(facts.first_row[op]) + PRODUCTS.get(facts.short_names[facts.code[op]], 0)
    return first, first + 1


def mixes_heads(facts: Facts, weight: int) -> bool:
    """Return whether the weight in an input row makes as many of several heads."""
    shape = facts.signature_of(weight).shape
    return len(shape) > 1 and shape[-1] == shape[-2] > 1
