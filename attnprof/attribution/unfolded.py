"""How tensors with folded dimensions would have been written unfolded, followed through ops."""

import math
from collections.abc import Callable
from typing import Any

from attnprof.attribution.axes import FEATURE, TOKEN, Bits
from attnprof.attribution.facts import Facts
from attnprof.attribution.layouts import Factors, Layout, fold, unfold
from attnprof.attribution.products import is_index

_JOINING = frozenset({"cat", "stack"})


class Unfolded:
    """The layouts of output rows with folded dimensions."""

    def __init__(
        self, facts: Facts, bits: dict[int, Bits], bits_of_input: Callable[[int], Bits]
    ) -> None:
        """Begin without any.

        Args:
            facts: The run's tables.
            bits: Per output row, the bits of its dimensions; filled by the caller meanwhile.
            bits_of_input: Returns those of an input row.
        """
        self._facts = facts
        self._bits = bits
        self._bits_of_input = bits_of_input
        self._layout: dict[int, Layout] = {}
        self._memo: dict[tuple[Any, ...], tuple[Factors, ...]] = {}

    def written(self, row: int) -> Layout:
        """Return how an output row was written, with folded dimensions unfolded, and its bits."""
        return self._layout.get(row) or (self._facts.signature_of(row), self._bits[row])

    def is_as_written(self, writer: int, signature: int) -> bool:
        """Return whether a tensor with a signature is what an output row wrote, with no fold."""
        return writer not in self._layout and int(self._facts.signature[writer]) == signature

    def carry(self, out: int, rows: list[int]) -> None:
        """Let a result be unfolded as an operand of its shape is, or of its rank where sizes agree.

        What is padded, put together, gathered, broadcast or convolved along some dimensions keeps
        the others.
        """
        facts = self._facts
        shape = facts.signature_of(out).shape
        for row in rows:  # nearly always there is one of the very shape
            if facts.signature_of(row).shape == shape and not is_index(facts, row):
                self.lay_out(out, self._unfold_input(row))
                return
        given = {row: facts.signature_of(row).shape for row in rows if not is_index(facts, row)}
        differing = {
            row: [i for i, (a, b) in enumerate(zip(sizes, shape, strict=True)) if a != b]
            for row, sizes in given.items()
            if len(sizes) == len(shape)
        }
        row = min(differing, key=lambda row: len(differing[row]), default=-1)
        if row < 0 or len(differing[row]) == len(shape):
            return
        parts = list(self._unfold_input(row))
        for dim in differing[row] if parts else ():
            parts[dim] = ((shape[dim], self._bits[out][dim]),)
        self.lay_out(out, tuple(parts))

    def parts_of_input(self, row: int) -> tuple[Factors, ...]:
        """Return the parts of every dimension of the tensor in an input row; often only one."""
        return self._unfold_input(row) or self._list_dimensions(row)

    def repeat(self, op: int) -> None:
        """Let a tensor that is repeated along its dimensions have the repeats as parts of them."""
        facts = self._facts
        rows, outs = facts.rows_in(op), facts.rows_out(op)
        if facts.short_names[facts.code[op]] != "repeat" or len(rows) != 1:
            return
        given, out = (facts.signature_of(row).shape for row in (rows[0], outs[0]))
        parts = ((),) * (len(out) - len(given)) + self.parts_of_input(rows[0])
        sizes = (1,) * (len(out) - len(given)) + given
        self.lay_out(
            outs[0],
            tuple(
                ((whole // size, 0), *own) if whole > size else own
                for whole, size, own in zip(out, sizes, parts, strict=True)
            ),
        )

    def put_together(self, op: int) -> None:
        """Let what is put together from the heads of one tensor have heads, wherever they lie.

        ``torch.cat(x.chunk(heads, -1), 0)`` puts them before the batch, ``torch.stack`` beside it.
        """
        facts = self._facts
        rows, outs = facts.rows_in(op), facts.rows_out(op)
        if facts.short_names[facts.code[op]] not in _JOINING or len(rows) < 2 or not len(outs):
            return
        made = {(int(facts.producer_row[row]), int(facts.signature[row])) for row in rows}
        if len(made) != 1 or not self._are_cut_from_features(rows[0], len(rows)):
            return
        out, piece = facts.signature_of(outs[0]).shape, facts.signature_of(rows[0]).shape
        dimensions = [*self._list_dimensions(rows[0])]
        longer = [i for i, (a, b) in enumerate(zip(out, piece, strict=False)) if a != b]
        heads = (len(rows), FEATURE)
        if len(out) > len(piece):
            dimensions.insert(longer[0] if longer else len(piece), (heads,))
        elif len(longer) == 1 and len(out) == len(piece):
            dimensions[longer[0]] = (heads, *dimensions[longer[0]])
        sizes = tuple(math.prod(size for size, _ in parts) for parts in dimensions)
        if sizes == out:
            self._bits[outs[0]] = tuple(_join_bits(parts) for parts in dimensions)
            self.lay_out(outs[0], tuple(dimensions))

    def _are_cut_from_features(self, row: int, count: int) -> bool:
        """Return whether an input row is one of ``count`` pieces of features."""
        made, piece = int(self._facts.producer_row[row]), self._facts.signature_of(row)
        if made not in self._bits:
            return False
        written, bits = self.written(made)
        sizes = dict(zip(piece.stride, piece.shape, strict=True))
        return any(
            bit == FEATURE and stride in sizes and 1 < count * sizes[stride] <= size
            for size, stride, bit in zip(written.shape, written.stride, bits, strict=True)
            if sizes.get(stride) != size
        )

    def _unfold_input(self, row: int) -> tuple[Factors, ...]:
        """Return the parts of every dimension of the tensor in an input row."""
        facts = self._facts
        writer, read = int(facts.producer_row[row]), int(facts.signature[row])
        if writer not in self._bits:
            return ()
        layout = self._layout.get(writer)
        if layout is None and int(facts.signature[writer]) == read:
            return ()  # as it was written: nothing is folded
        written, bits = self.written(writer)
        if written.item_bytes != facts.signatures[read].item_bytes:
            return ()  # complex numbers as pairs: strides count in other units
        key = (written.shape, written.stride, bits, read)
        found = self._memo.get(key)
        if found is None:
            found = unfold(written, bits, facts.signatures[read])
            self._memo[key] = found
        return found

    def lay_out(self, row: int, dimensions: tuple[Factors, ...]) -> None:
        """Say which parts the dimensions of an output row have."""
        if dimensions and (
            layout := fold(self._facts.signature_of(row), self._bits[row], dimensions)
        ):
            self._layout[row] = layout

    def _list_dimensions(self, row: int) -> tuple[Factors, ...]:
        shape = self._facts.signature_of(row).shape
        return tuple((part,) for part in zip(shape, self._bits_of_input(row), strict=True))

    def lay_out_product(self, out: int, left: int, right: int, *, by_rows: bool = False) -> None:
        """Unfold a product: batch and rows as in the left factor, columns as in the right.

        Args:
            out: Its output row.
            left: The input row of its left factor.
            right: That of its right factor.
            by_rows: Whether its columns are the right factor's rows, as of distances.
        """
        lefts, rights = map(self.parts_of_input, (left, right))
        batch = tuple(map(_choose_clearer, lefts[:-2], rights[:-2]))
        columns = rights[-2:][:1] if by_rows else rights[-1:]
        columns = columns if len(rights) > 1 else ()
        self.lay_out(out, (*(batch or lefts[:-2]), *lefts[-2:-1], *columns))


def _join_bits(parts: Factors) -> int:
    result = 0
    for _, bit in parts:
        result |= bit
    return result


def _choose_clearer(left: Factors, right: Factors) -> Factors:
    """Return the parts of a dimension of Q, or those of K where these say more.

    K may be expanded over heads, which hides whose its dimensions are; queries may be parameters
    that were repeated for every sequence.
    """
    if [size for size, _ in left] == [size for size, _ in right]:
        return tuple(
            a if a[1] == TOKEN or (a[1] == FEATURE and b[1] != TOKEN) else b
            for a, b in zip(left, right, strict=True)
        )
    says_more = len(right) > 1 and any(bit == TOKEN for _, bit in right)
    is_clear = len(left) > 1 or left[0][1] == TOKEN or (left[0][1] == FEATURE and not says_more)
    return left if is_clear else right
