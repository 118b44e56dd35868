"""Pairs of products: what a first product makes, and what belongs to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from attnprof.attribution.axes import FEATURE, LEFT, RIGHT, SIDES, TOKEN, Bits


class Pattern(IntEnum):
    """What the first product of a pair makes, by what it contracts."""

    SCORES = 0
    """(tokens, features) @ (features, tokens): one score per pair of tokens."""
    LOW_RANK = 1
    """(tokens, features) @ (features, fixed): scores against a fixed set, as in Linformer; or among
    the members of one, such as learned queries."""
    STATE = 2
    """(features, tokens) @ (tokens, features): the state of linear attention."""
    SUMS = 3
    """tokens + tokens, broadcast against each other: the scores of additive attention."""
    LEARNED = 4
    """Scores of positions, made without keys: a projection of queries, or a parameter."""


@dataclass(slots=True)
class Pair:
    """Products that belong together: first ones, what lies between, and second ones."""

    pattern: Pattern
    firsts: list[int] = field(default_factory=list)
    """Ops that make scores (several where content and position scores are added)."""
    sides: int = SIDES
    """The sides that what is still a score has to keep."""
    seconds: list[tuple[int, int]] = field(default_factory=list)
    """(op, input row): the product that consumes them, and through which operand."""
    between: list[int] = field(default_factory=list)
    """Ops whose output keeps both sides: as large as the scores, give or take a layout."""
    aside: set[int] = field(default_factory=set)
    """Of all these, ops of scores that an element-wise op added to others: position scores."""
    is_chain: bool = False
    """Whether scores are multiplied by scores on the way, as with landmarks."""
    beside: list[int] = field(default_factory=list)
    """Ops that take in a score and give something smaller: a row maximum, a gathered column."""

    @property
    def ops(self) -> set[int]:
        """All its ops."""
        return {*self.firsts, *self.between, *self.beside, *(op for op, _ in self.seconds)}

    def keeps_sides(self, bits: Bits) -> bool:
        """Return whether a tensor with these bits is still a score."""
        have = 0
        for bit in bits:
            have |= bit
        return have & self.sides == self.sides

    def has_features_in(self, bits: Bits, kept: Bits) -> bool:
        """Return whether a factor of a product has a token's features times its own, and no state.

        Those are in one dimension. So is a state that is handed on from chunk to chunk, by a matrix
        of decays.

        Args:
            bits: Where the factor's dimensions come from.
            kept: Where that comes from which the product keeps of it, and of the other factor.
        """
        is_handed_on = bool(kept) and kept[0] & SIDES == SIDES and not kept[1] & (SIDES | FEATURE)
        in_one = any(bit & SIDES == SIDES for bit in bits)
        return self.pattern is Pattern.STATE and in_one and not is_handed_on


def pattern_of(
    free: Bits, contracted: tuple[int, int], depth: int, *, is_certain: Sequence[bool]
) -> Pattern | None:
    """Say what a product of activations makes, if it can be the first of a pair.

    Args:
        free: The bits of the result's rows and columns.
        contracted: The bits of the contracted dimension, in the left factor and in the right one.
        depth: Its size.
        is_certain: Per factor, whether its bits are known, and not those of what nobody made.
    """
    either = contracted[0] | contracted[1]
    # What stems from nothing (one query; rows of a constant) may be tokens as well.
    tokens = [bit != FEATURE for bit in free]
    features_only = all(bit == FEATURE for bit in free)
    if features_only and (either & TOKEN or depth == 1):
        return Pattern.STATE
    if (either & TOKEN and not either & FEATURE) or depth == 1:
        return Pattern.SCORES if all(tokens) else None
    if all(tokens):
        return Pattern.SCORES
    # A matrix of all tokens that was given (neighbours in a graph) mixes features of tokens.
    is_mixing = (TOKEN, True) in zip(contracted, is_certain, strict=True)
    return None if is_mixing else Pattern.LOW_RANK


def has_clean_sides(bits: Bits) -> bool:
    """Return whether one dimension is the left side alone and another the right side alone."""
    return sorted(b & SIDES for b in bits if b & SIDES) == [LEFT, RIGHT]


class Pairs:
    """All pairs of a run; some turn out to be parts of one."""

    def __init__(self) -> None:
        """Begin without any."""
        self._pairs: list[Pair] = []
        self._parent: list[int] = []
        self._aside: set[int] = set()
        self._read: set[int] = set()
        """Of those that stand for others, those with second products."""
        self._open: set[int] = set()
        """Of those that stand for others, those that may be projections by a weight."""

    def __getitem__(self, number: int) -> Pair:
        """Return a pair as it was begun."""
        return self._pairs[number]

    def begin(self, pair: Pair, *, is_open: bool = False) -> int:
        """Enter a pair, which may be a projection by a weight if ``is_open``; return its number."""
        if is_open:
            self._open.add(len(self._pairs))
        self._parent.append(len(self._pairs))
        self._pairs.append(pair)
        return len(self._pairs) - 1

    def find(self, number: int) -> int:
        """Return the number that stands for all pairs that ``number`` was joined with."""
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, numbers: set[int]) -> int:
        """Make one of several; return its number."""
        first, *rest = sorted(self.find(n) for n in numbers)
        for number in rest:
            self._parent[number] = first
        if not self._read.isdisjoint(rest):
            self._read.add(first)
        if not self._open.issuperset(rest):
            self._open.discard(first)
        return first

    def is_open(self, number: int) -> bool:
        """Return whether a pair may be a projection by a weight, unless a softmax follows."""
        return self.find(number) in self._open

    def read(self, number: int, op: int, row: int) -> None:
        """Note that an op is a second product of a pair, through an input row."""
        self._pairs[number].seconds.append((op, row))
        self._read.add(self.find(number))

    def is_read(self, number: int) -> bool:
        """Return whether a pair has a second product by now."""
        return self.find(number) in self._read

    def put_aside(self, number: int, chosen: int) -> None:
        """Note that the scores of a pair were added to those of another."""
        self._parent[number] = chosen
        self._aside.add(number)

    def merge(self) -> list[Pair]:
        """Return what they are in the end, in program order."""
        merged: dict[int, Pair] = {}
        for number, pair in enumerate(self._pairs):
            whole = merged.setdefault(self.find(number), Pair(pair.pattern, sides=pair.sides))
            whole.pattern = min(whole.pattern, pair.pattern)
            whole.firsts += pair.firsts
            whole.seconds += pair.seconds
            whole.between += pair.between
            whole.beside += pair.beside
            whole.is_chain |= pair.is_chain
            if number in self._aside:
                whole.aside |= {*pair.firsts, *pair.between}
        return list(merged.values())
