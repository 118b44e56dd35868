"""Follow data through the forward ops and find pairs of products: attention, without names.

Attention is two matrix products of activations joined by ops that are not products of
activations. The first marks its rows and columns (`axes.LEFT`, `axes.RIGHT`); the marks travel
through every op that keeps both; the product that contracts one of them is the second. What is
contracted first says what it is: features give scores (Tq, Tk), tokens give the state of linear
attention. A product that no second one consumes (a router, a vocabulary head, contrastive
logits) is not attention.
"""

from collections.abc import Iterable
from typing import Any

from attnprof.attribution import axes
from attnprof.attribution.axes import FEATURE, LEFT, RIGHT, SIDES, TOKEN, Bits
from attnprof.attribution.facts import Bools, Facts
from attnprof.attribution.joins import Joins
from attnprof.attribution.layouts import Layout
from attnprof.attribution.made_weights import MadeWeights
from attnprof.attribution.origins import Origin, of_product
from attnprof.attribution.outer import OUTER_OPS, OuterProducts
from attnprof.attribution.output_bits import OutputBits
from attnprof.attribution.pairs import Pair, Pairs, Pattern, has_clean_sides, pattern_of
from attnprof.attribution.products import (
    CONVOLUTION,
    FILLED_ANEW,
    INTEGERS,
    LINEARS,
    NORMALISING,
    OVERWRITING,
    SHAPED_LIKE,
    classify,
    is_distance,
    is_outer_product,
    mixes_heads,
)
from attnprof.attribution.unfolded import Unfolded
from attnprof.attribution.weighted_sums import WeightedSums
from attnprof.vocabulary import Role


class Flow:
    """One pass over the forward ops of a run."""

    def __init__(self, facts: Facts, is_forward: Bools, roles: dict[int, str]) -> None:
        """Follow the data.

        Args:
            facts: The run's tables.
            is_forward: Per op, whether it computes (forward or recompute), rather than
                differentiates or updates.
            roles: Per storage, its `Role`, where it has one.
        """
        self._facts = facts
        self._roles = roles
        self.origin: dict[int, Origin] = {}
        """Per output row that wrote memory."""
        self.bits: dict[int, Bits] = {}
        self.unfolded = Unfolded(facts, self.bits, self.bits_of_input)
        self.pair_of: dict[int, int] = {}
        """Per output row that is a score, the number of its pair (see `find_pair`)."""
        self._projected: set[int] = set()
        """Such rows that went through a product with a parameter, and not through a softmax."""
        self._normalised: set[int] = set()
        """Such rows that went through a softmax: what is made of them is no residual stream."""
        self._pairs = Pairs()
        self._joins = Joins(facts, self._pairs)
        self._view_memo: dict[tuple[Any, ...], Bits] = {}
        self._output_bits = OutputBits(facts)
        self._outer = OuterProducts(facts)
        self._weighted = WeightedSums(facts)
        self.made_weights = MadeWeights(facts)
        self._may_be_outer = [name in OUTER_OPS for name in facts.short_names]
        self._kind = [classify(name) for name in facts.short_names]
        for op in facts.list_writing(is_forward):
            self._visit(op)

    def pairs(self) -> list[Pair]:
        """Return all pairs in program order; those with second products are attention."""
        return self._pairs.merge()

    def find_pair(self, number: int) -> int:
        """Return the number that stands for all pairs that ``number`` was joined with."""
        return self._pairs.find(number)

    def origin_of_input(self, row: int) -> Origin:
        """Return what the tensor in an input row is made from."""
        role = self._roles.get(int(self._facts.storage[row]))
        if role == Role.PARAMETER:  # also one that was filled, loaded or updated in the trace
            return Origin.PARAMETER
        if role in (Role.GRADIENT, Role.OPTIMIZER_STATE):
            return Origin.UPDATE
        producer = int(self._facts.producer_row[row])
        made = self.origin.get(producer)
        if made is not None and not (role == Role.BUFFER and self._is_outside(producer)):
            return made  # what a forward writes into a buffer (a cache) is no constant
        return Origin.CONSTANT if role == Role.BUFFER else Origin.ACTIVATION

    def _is_outside(self, row: int) -> bool:
        """Return whether the op of a row ran outside of any module."""
        return bool(self._facts.scope[self._facts.row_op[row]] < 0)

    def role_of(self, storage: int) -> str | None:
        """Return the `Role` of a storage, if it has one."""
        return self._roles.get(storage)

    def origin_of_row(self, row: int) -> Origin:
        """Return what the tensor in any operand row is made from."""
        if self._facts.is_input[row]:
            return self.origin_of_input(row)
        return self.origin.get(row, Origin.ACTIVATION)

    def bits_of_input(self, row: int) -> Bits:
        """Return where the dimensions of the tensor in an input row come from."""
        facts = self._facts
        writer = int(facts.producer_row[row])
        bits = self.bits.get(writer)
        read = int(facts.signature[row])
        storage = int(facts.storage[row])
        is_parameter = self._roles.get(storage) == Role.PARAMETER
        if is_parameter and storage in facts.loose_parameters:
            return axes.of_source(facts.signatures[read], is_parameter=False)  # maybe an image
        if bits is None or is_parameter:
            return axes.of_source(facts.signatures[read], is_parameter=is_parameter)
        if self.unfolded.is_as_written(writer, read):
            return bits
        written, bits = self.unfolded.written(writer)
        key = (written.shape, written.stride, bits, read)
        found = self._view_memo.get(key)
        if found is None:
            found = axes.through_view(written, bits, facts.signatures[read])
            self._view_memo[key] = found
        return found

    def written(self, row: int) -> Layout:
        """Return how an output row was written, with folded dimensions unfolded, and its bits."""
        return self.unfolded.written(row)

    def _visit(self, op: int) -> None:
        facts = self._facts
        rows = facts.rows_in(op)
        origins = [self.origin_of_input(row) for row in rows]
        bits = [self.bits_of_input(row) for row in rows]
        kind = self._kind[facts.code[op]]
        out = facts.rows_out(op)
        is_product = kind >= 0 and len(rows) >= kind + 2 and len(out) > 0
        self.made_weights.follow(op, origins, is_product=is_product)
        if is_product:
            self._visit_product(op, kind, origins, bits)
            self.unfolded.lay_out_product(
                out[0], rows[kind], rows[kind + 1], by_rows=is_distance(facts, op)
            )
            return
        origin = max(origins, default=Origin.CONSTANT)
        if kind == CONVOLUTION and Origin.PARAMETER in origins:
            origin = Origin.ACTIVATION
        if facts.short_names[facts.code[op]] in FILLED_ANEW:
            origin = Origin.CONSTANT
        if (
            not origins
            and facts.scope[op] < 0
            and not any(int(facts.storage[row]) in self._roles for row in out)
        ):
            for row in out:  # made outside of any module, for none: a batch, not a table
                self.origin[row] = Origin.ACTIVATION
                self.bits[row] = axes.of_source(facts.signature_of(row), is_parameter=False)
            return
        made = facts.producer_row[rows.start : rows.stop].tolist()
        scores = [row for row, writer in zip(rows, made, strict=True) if writer in self.pair_of]
        if scores and facts.short_names[facts.code[op]] not in OVERWRITING:
            self._take_sides_of_one(op, rows, out, bits)
        leading = [row for row, own in zip(rows, origins, strict=True) if own == origin]
        heard = self._output_bits.choose_heard(out, scores, leading)
        for row in out:
            self.origin[row] = origin
            self.bits[row] = self._output_bits.find(row, kind, rows, bits, heard)
        self.unfolded.put_together(op)
        if scores:
            self._carry_pair(op, rows)
        if self._may_be_outer[facts.code[op]]:
            of_data = min(origins, default=Origin.CONSTANT) is Origin.ACTIVATION
            self._follow_outer(op, bits, of_data=of_data)
            self._follow_weighted(op, scores, bits, of_data=of_data)
        if min(origins, default=Origin.CONSTANT) is Origin.ACTIVATION and (
            is_outer_product(facts, op) and self.bits[out[0]][-2:] == (FEATURE, FEATURE)
        ):
            self._begin_pair(op, out[0], Pattern.STATE, set())
        for row in out:
            self.unfolded.carry(row, leading)
        self.unfolded.repeat(op)

    def _follow_outer(self, op: int, bits: list[Bits], *, of_data: bool) -> None:
        """Let the sum over features of queries times keys, all with all, be scores."""
        self._outer.follow(op, bits, of_data=of_data)
        if len(bits) == 1 and (found := self._outer.sum_up(op, bits[0])):
            outer, marked = found
            out = self._facts.rows_out(op)[0]
            ops = [*outer.ops[1:], op]
            pair = Pair(Pattern.SCORES, [outer.ops[0]], sides=outer.sides, between=ops)
            self.pair_of[out] = self._pairs.begin(pair, is_open=outer.sides != SIDES)
            self.bits[out] = marked

    def _follow_weighted(
        self, op: int, scores: list[int], bits: list[Bits], *, of_data: bool
    ) -> None:
        """Let the sum over keys of values times scores end the attention that it belongs to."""
        column = self._weighted.follow(op, scores, bits, of_data=of_data)
        found = self._weighted.sum_up(op) if column is None else (op, column)
        number = self._pair_to_read(found[1], ()) if found else None
        if found and number is not None:
            self._pairs.read(number, *found)
            for row in self._facts.rows_out(op):
                self.pair_of.pop(row, None)
            self._forget_sides(self._facts.rows_out(op))

    def _take_sides_of_one(self, op: int, rows: range, out: range, bits: list[Bits]) -> None:
        """Where an op adds scores of several products, let one of them say which side is which.

        The rows of a transposed position score are keys, a relative shift mixes both sides, and
        distances have no heads before slopes give them some; the operand with the cleanest sides,
        and of those the one that was the largest from the first, speaks. The others are biases.
        """
        numbers = [self._pair_of_input(row) for row in rows]
        found = self._joins.find_going_on(op, rows, numbers)
        if len(found) < 2 or not len(out):
            return
        held = {i: n for i, n in enumerate(numbers) if n is not None and n in found}
        size = self._facts.signature_of(out[0]).numel
        if any(self._facts.signature_of(rows[i]).numel != size for i in held):
            return  # pieces of one score matrix, put together
        own = {
            n: min(size, self._facts.signature_of(self._joins.first_output(n)).numel) for n in found
        }
        speaker = max(held, key=lambda i: (has_clean_sides(bits[i]), own[held[i]], -held[i]))
        chosen = held[speaker]
        for i, number in held.items():
            if number != chosen:
                bits[i] = axes.without_sides(bits[i])
        for number in found - {chosen}:
            self._pairs.put_aside(number, chosen)

    def _carry_pair(self, op: int, rows: range) -> None:
        """Let an op's outputs belong to the pairs of its operands, if they are still scores."""
        name = self._facts.short_names[self._facts.code[op]]
        if name in SHAPED_LIKE:
            self._forget_sides(self._facts.rows_out(op))
            return
        if name in OVERWRITING:
            rows = rows[1:]  # what was there before is gone
        met = [self._pair_of_input(row) for row in rows]
        numbers = self._joins.find_going_on(op, rows, met)
        if not numbers:
            if any(number is not None for number in met):
                self._forget_sides(self._facts.rows_out(op))
            return
        number = self._pairs.join(numbers)
        pair = self._pairs[number]
        is_normalised = bool(NORMALISING.fullmatch(name)) or self._are_all_in(
            self._normalised, rows
        )
        is_projected = not is_normalised and self._are_projected(rows)
        kept = False
        for row in self._facts.rows_out(op):
            # Indices found among scores (a top-k, a sort) are not scores, nor what they gather.
            is_index = self._facts.signature_of(row).dtype in INTEGERS
            is_scaled = pair.sides != SIDES and self._scales_features(row, rows)
            if not (is_index or is_scaled) and pair.keeps_sides(self.bits[row]):
                self.pair_of[row] = number
                if is_normalised:
                    self._normalised.add(row)
                elif is_projected:
                    self._projected.add(row)
                kept = True
            else:
                self._forget_sides([row])
        (pair.between if kept else pair.beside).append(op)

    def _scales_features(self, out: int, rows: range) -> bool:
        """Return whether a number per token, as of a product with one key, scales features."""
        own = [
            self._facts.signature_of(row).shape[-1:]
            for row in rows
            if self._pair_of_input(row) is not None
        ]
        return self.bits[out][-1:] == (FEATURE,) and own == [(1,)] * len(own)

    def _forget_sides(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.bits[row] = axes.without_sides(self.bits[row])

    def _pair_of_input(self, row: int) -> int | None:
        number = self.pair_of.get(int(self._facts.producer_row[row]))
        return None if number is None else self.find_pair(number)

    def _visit_product(self, op: int, at: int, origins: list[Origin], bits: list[Bits]) -> None:
        facts = self._facts
        rows = facts.rows_in(op)
        out = facts.rows_out(op)[0]
        left, right = bits[at], bits[at + 1]
        is_linear = facts.short_names[facts.code[op]] in LINEARS
        if is_distance(facts, op) or (is_linear and len(right) == 2):
            right = (*right[:-2], *right[:-3:-1])
        # Features that a fixed matrix projects (random features) are features, not its rows.
        if origins[at + 1] is Origin.CONSTANT and left and left[-1] == FEATURE and right:
            right = (*right[:-1], FEATURE)
        result = axes.of_product(facts.signature_of(out), left, right)
        pair_left = self._pair_to_read(rows[at], left, (*left[-2:-1], *right[-1:]))
        pair_right = self._pair_to_read(rows[at + 1], right, (*right[-1:], *left[-2:-1]))
        both = origins[at] == origins[at + 1] == Origin.ACTIVATION
        self.origin[out] = of_product(origins[at], origins[at + 1])
        if self.made_weights.holds(out):  # no token is in it
            result = tuple(FEATURE if bit else 0 for bit in result)
        self.bits[out] = result
        if not both or len(left) < 2 or len(right) < 2:
            self._pass_projection(op, rows)
            return
        met = {n for n in (pair_left, pair_right) if n is not None}
        if len(met) == 2 and all(map(self._pairs.is_read, met)):
            self._forget_sides([out])  # how attention adds up over layers, say
            return
        depth = facts.signature_of(rows[at]).shape[-1]
        consumed = set()
        for number, row, contracted in (
            (pair_left, rows[at], left[-1]),
            (pair_right, rows[at + 1], right[-2]),
        ):
            # A contracted dimension of size 1 leaves no bit; it can only be the key of one token.
            if number is not None and (contracted & SIDES or depth == 1):
                self._pairs.read(number, op, row)
                consumed.add(number)
        passing = met - consumed
        if passing:  # contracts heads, say: the scores go on
            self._carry_pair(op, rows)
            return
        self.bits[out] = result = axes.without_sides(result)
        both_ends = (left[-1] & ~SIDES, right[-2] & ~SIDES)
        # What nobody made may be transposed: the last dimension is no more than a guess.
        is_made = [facts.producer_row[rows[i]] in self.bits for i in (at, at + 1)]
        pattern = pattern_of(result[-2:], both_ends, depth, is_certain=is_made)
        # Scores times scores (landmark attention) are scores still; scores times values end here.
        if pattern is not None and (not consumed or all(b & TOKEN for b in result[-2:])):
            self._begin_pair(op, out, pattern, consumed)

    def _pair_to_read(self, row: int, bits: Bits, kept: Bits = ()) -> int | None:
        """Return the pair of an input row of a product, if it is one for sure.

        Args:
            row: The input row.
            bits: Where its dimensions come from.
            kept: Where that comes from which the product keeps of it, and of the other factor.
        """
        number = self._pair_of_input(row)
        if number is None or self._facts.producer_row[row] in self._normalised:
            return number
        is_feature = self._pairs[number].has_features_in(bits, kept)
        return None if is_feature or self._pairs.is_open(number) else number

    def _pass_projection(self, op: int, rows: range) -> None:
        """Let scores pass a product with a parameter (over heads, say), if both sides survive.

        With a side of size 1 only the other is left to go by, and that one, the tokens, survives
        every projection of the residual stream: then it has to mix heads into as many. What goes
        through two of them is no score: a residual stream of pairs of tokens (of residues, in
        models of proteins) goes on like that.
        """
        numbers = {n for row in rows if (n := self._pair_of_input(row)) is not None}
        out = self._facts.rows_out(op)[0]
        weights = [row for row in rows if self._pair_of_input(row) is None]
        both = all(self._pairs[n].sides == SIDES for n in numbers)
        survives = both or any(mixes_heads(self._facts, row) for row in weights)
        if survives and not self._are_projected(rows):
            self._carry_pair(op, rows)
            if out not in self._normalised:
                self._projected.add(out)
            return
        self._forget_sides([out])

    def _are_projected(self, rows: range) -> bool:
        """Return whether all scores among some input rows went through a projection."""
        return self._are_all_in(self._projected, rows)

    def _are_all_in(self, known: set[int], rows: range) -> bool:
        made = {int(self._facts.producer_row[row]) for row in rows} & self.pair_of.keys()
        return bool(made) and made <= known

    def _begin_pair(self, op: int, out: int, pattern: Pattern, consumed: set[int]) -> None:
        bits, sizes = self.bits[out], self._facts.signature_of(out).shape
        left = bits[-2] | LEFT if sizes[-2] > 1 else 0
        right = bits[-1] | RIGHT if sizes[-1] > 1 else 0
        self.bits[out] = (*bits[:-2], left, right)
        # A side of size 1 (one query when decoding) leaves no bit and is not asked for.
        pair = Pair(pattern, [op], sides=(left | right) & SIDES)
        number = self._pairs.begin(pair, is_open=self.made_weights.are_read_by(op))
        if consumed:
            self._pairs[number].is_chain = True
            number = self._pairs.join(consumed | {number})
        self.pair_of[out] = number
