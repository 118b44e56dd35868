"""How many sequences keys are from, read off the data that they were made of.

That is not what a model is given first: CLIP is given texts and images, in numbers of their own; a
multiple-choice question has several texts. What has become features is another matter: a model that
splits its hidden states puts windows of one sequence into the batch.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts, Ints, Signature
from attnprof.attribution.flow import Flow
from attnprof.attribution.origins import Origin
from attnprof.attribution.products import CONVOLUTIONS, INTEGERS, factors, is_index, is_product


@dataclass(frozen=True, slots=True)
class _Data:
    """What keys were made of."""

    shape: tuple[int, ...]
    """As it was given; of tokens' numbers and of images, as the first op with a weight read it."""
    sequences: int
    samples: int = 0
    """The leading dimension of what was given, if others were put into the batch besides."""

    def repeat(self, times: Fraction) -> "_Data":
        """Return the data with every sequence as often, on the average."""
        sequences = self.sequences * times
        if times == 1 or sequences.denominator > 1:
            return self
        return replace(self, sequences=int(sequences), samples=int(self.samples * times))


@dataclass(slots=True)
class _Passed:
    """A tensor on the way from keys to the data that they were made of."""

    made: int = -1
    """The output row that wrote it."""
    times: Fraction = Fraction(1)
    """How often the batch is repeated in it, as an image that texts share."""
    tokens: int = -1
    """How many tokens of all sequences it was projected from; 0 by a convolution, -1 if unknown."""


_JOINING = frozenset({"cat", "stack"})
_WHOLE = frozenset({"repeat", "stack"})
_REPEATING = _JOINING | _WHOLE | {"repeat_interleave", "index_select", "index"}
"""Ops that may put the same sequence into a batch several times, or batches together.

`_JOINING` may also put pieces of one sequence together; `_WHOLE` may add a dimension for that.
"""
_GATHERING = frozenset({"gather", "index", "take_along_dim"})
"""Ops that take other elements for each place of an expanded view."""


class Sequences:
    """The sequences that the keys of attention calls are from."""

    def __init__(self, facts: Facts, flow: Flow, calls: list[AttentionCall]) -> None:
        """Find which data is (tokens, batch, …), as the calls show."""
        self._facts, self._flow = facts, flow
        self._data: dict[int, _Data] = {}
        """By output row, what it was made of."""
        self._first_read = _find_first_reads(facts)
        self._data_of: dict[tuple[object, ...], _Data] = {}
        """By what `_name` says of a call: a layer's data is the same in every step."""
        named = {_name(call): call for call in reversed(calls) if call.keys_row >= 0}
        for name, call in named.items():
            self._data_of[name] = self._find_data(call.keys_row)
        found = [(call, self._data_of[name]) for name, call in named.items()]
        self._tokens_first = {data for call, data in found if _is_tokens_first(facts, call, data)}
        self._mixed = {data for call, data in found if data.samples and _is_mixing(call, data)}
        """Where other layers attend across what was put into the batch, as over the frames of a
        video."""

    def count(self, call: AttentionCall) -> int:
        """Return how many sequences the keys of a call are from; 0 if unknown."""
        data = self._data_of[_name(call)]
        if data in self._mixed:
            return data.samples
        return data.shape[1] if data in self._tokens_first else data.sequences

    def _find_data(self, row: int) -> _Data:
        """Return what the tensor in an input row was made of, along its largest operands."""
        facts, is_inside = self._facts, bool(self._facts.scope[self._facts.row_op[row]] >= 0)
        passed = [_Passed()]  # the keys, then rows that wrote what they were made of
        weighed = -1  # what the earliest op with a weight was given
        while True:
            made = int(facts.producer_row[row])
            if weighed >= 0:
                self._repeat(passed, row, made)
            if made in self._data:
                found = self._data[made]
                break
            op = int(facts.row_op[made]) if made >= 0 else -1
            if made < 0 or (is_inside and facts.scope[op] < 0):
                found = self._read_data(row, weighed, passed[0].times)
                break
            passed.append(_Passed(made))
            following = self._choose_operand(op)
            if following < 0:
                is_data = self._flow.origin.get(made) is Origin.ACTIVATION
                indices = self._find_indices(op)
                given = self._read_data(made, weighed, passed[0].times) if is_data else None
                found = indices or given or _Data((), 0)
                break
            if self._has_weight(op):
                weighed = following
                self._note_tokens(passed, op, following)
            row = following
        for each in passed[1:]:
            self._data[each.made] = found.repeat(each.times)
        return found.repeat(passed[0].times)

    def _note_tokens(self, passed: list[_Passed], op: int, given: int) -> None:
        """Note of how many tokens a projection made what lies between it and the keys."""
        given_to = self._facts.signature_of(given)
        is_convolution = self._facts.short_names[self._facts.code[op]] in CONVOLUTIONS
        tokens = 0 if is_convolution else given_to.numel // max(1, given_to.shape[-1])
        for each in passed:
            each.tokens = each.tokens if each.tokens >= 0 else tokens

    def _repeat(self, passed: list[_Passed], row: int, made: int) -> None:
        """Repeat what was made of a batch as often as this is, unless it was put together again.

        Residual streams are summed up before every layer: there are as many tokens as before.
        """
        times = self._count_repeats(row, made)
        if times == 1:
            return
        given = self._facts.signature_of(row)
        before = given.numel // max(1, given.shape[-1]) / times
        for each in passed:
            each.times *= 1 if each.tokens == before else times

    def _count_repeats(self, row: int, made: int) -> Fraction:
        """Return how often a batch that an output row wrote is repeated in an input row.

        It is repeated in the view that is read, or by the op that wrote it, from what that read.
        """
        facts = self._facts
        times = Fraction(self._count_expanded(row))
        operand = self._choose_operand(int(facts.row_op[made])) if made >= 0 else -1
        if operand < 0:
            return times
        written, given = map(facts.signature_of, (made, operand))
        if len(written.shape) < 3 or not given.numel:
            return times
        name = facts.short_names[facts.code[facts.row_op[made]]]
        before = int(facts.producer_row[operand])
        if name in _JOINING and before >= 0 and facts.signature_of(before).numel > given.numel:
            return times  # pieces of one tensor, as of a sequence that is cut into windows
        if given.shape[0] > 1 and name not in _REPEATING:  # one that meets a batch becomes one
            return times
        longer = max(Fraction(1), Fraction(written.numel, given.numel))
        is_batch = written.shape[1:] == given.shape[1:]
        # Sequences repeated as a whole are read as so many, whichever dimension they are in first.
        is_batch |= name == "repeat" and written.shape[2:] == given.shape[2:]
        is_batch |= name in _WHOLE and given.shape[-2:] == written.shape[-2:] != given.shape
        return times * longer if is_batch else times

    def _count_expanded(self, row: int) -> int:
        """Return how often a view (B, repeats, …, T, D) or (repeats, B, …, T, D) shows a batch.

        What it shows repeatedly behind these two are heads, rows or columns. What is gathered from
        differs, and what one operand repeats another may not, as of pairs of tokens.
        """
        facts, op = self._facts, int(self._facts.row_op[row])
        shape = facts.signature_of(row).shape
        if facts.short_names[facts.code[op]] in _GATHERING:
            return 1
        views = [facts.signature_of(r) for r in facts.rows_in(op)]
        strides = [view.stride for view in views if view.shape == shape]
        return math.prod(
            size
            for i, size in enumerate(shape[: len(shape) - 2][:2])
            if size and not any(stride[i] for stride in strides)
        )

    def _choose_operand(self, op: int) -> int:
        """Return the operand row that is followed: values, not what they are weighed by."""
        facts, flow = self._facts, self._flow
        rows = [
            row
            for row in facts.rows_in(op)
            if facts.signature_of(row).dtype not in INTEGERS
            and flow.origin_of_input(row) is Origin.ACTIVATION
        ]
        if is_product(facts, op) and len(rows) > 1 and (right := factors(facts, op)[1]) in rows:
            return right
        # Of a sum that which is older: a residual stream, not the attention to something else.
        return max(
            rows,
            key=lambda row: (facts.signature_of(row).numel, -int(facts.producer_row[row])),
            default=-1,
        )

    def _has_weight(self, op: int) -> bool:
        facts = self._facts
        return is_product(facts, op) and any(
            self._flow.origin_of_input(row) is Origin.PARAMETER for row in facts.rows_in(op)
        )

    def _find_indices(self, op: int) -> _Data | None:
        """Return the numbers of tokens that an op looks up in a table, if it does."""
        shapes = [
            self._facts.signature_of(row).shape
            for row in self._facts.rows_in(op)
            if is_index(self._facts, row)
        ]
        shape = max(shapes, key=math.prod, default=())
        return _Data(shape, shape[0]) if len(shape) > 1 else None

    def _read_data(self, row: int, weighed: int, times: Fraction) -> _Data:
        """Return how many sequences are in data; images may be put together for a convolution.

        Args:
            row: The data's row.
            weighed: The input row of the earliest op with a weight, or -1.
            times: How often it is known to be repeated in the keys.
        """
        first = int(self._first_read[self._facts.storage[row]])
        given = self._facts.signature_of(first if first >= 0 else row)
        if weighed < 0 or len(given.shape) < 2:
            return _Data(given.shape, given.shape[0] if len(given.shape) > 1 else 0)
        used = self._facts.signature_of(weighed)
        if self._facts.short_names[self._facts.code[self._facts.row_op[weighed]]] in CONVOLUTIONS:
            is_merged = used.shape[0] > given.shape[0]
            return _Data(used.shape, used.shape[0], given.shape[0] if is_merged else 0)
        is_wider = used.shape[-1] != given.shape[-1]  # features were made without a weight
        # Two views of a batch are put together.
        repeats = 1 if is_wider else int(used.numel / (max(1, given.numel) * times))
        return _Data(given.shape, given.shape[0] * max(1, repeats))


def _name(call: AttentionCall) -> tuple[object, ...]:
    return call.layer, call.batch, call.q_len, call.k_len, call.head_dim


def _find_first_reads(facts: Facts) -> Ints:
    """Return per storage the first row through which a module's op reads it, or -1."""
    rows = np.flatnonzero(facts.is_input & (facts.scope[facts.row_op] >= 0))
    storages, first = np.unique(facts.storage[rows], return_index=True)
    result = np.full(facts.storage_count, -1, np.int64)
    result[storages] = rows[first]
    return result


def _is_mixing(call: AttentionCall, data: _Data) -> bool:
    """Return whether a call attends across what was put into the batch, as over frames."""
    is_across = call.k_len == data.sequences // data.samples and call.batch > data.sequences
    return is_across or call.batch % data.sequences > 0


def _is_tokens_first(facts: Facts, call: AttentionCall, data: _Data) -> bool:
    """Return whether sizes and memory of a call say that its data is (tokens, batch, …).

    Sizes alone would not do: a batch of as many sequences as a window has tokens looks alike.
    """
    if len(data.shape) < 2 or data.shape[1] != call.batch:
        return False
    if data.shape[0] not in (call.q_len, call.k_len):
        return False
    row = call.keys_row
    for _ in range(6):
        signature = facts.signature_of(row)
        if _has_outermost(signature, call.k_len):
            return True
        made = int(facts.producer_row[row])
        inputs = facts.rows_in(int(facts.row_op[made])) if made >= 0 else ()
        same = [r for r in inputs if facts.signature_of(r).numel == signature.numel]
        if not same:  # a copy is laid out anew; what it was copied from is what was projected
            return False
        row = same[0]
    return False


def _has_outermost(keys: Signature, tokens: int) -> bool:
    """Return whether the rows or columns of K are what lies furthest apart in memory."""
    dims = range(len(keys.shape))
    furthest = max(dims, key=lambda i: keys.stride[i] if keys.shape[i] > 1 else 0)
    return furthest >= len(dims) - 2 and keys.shape[furthest] == tokens
