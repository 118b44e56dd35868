"""What masks were made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts
from attnprof.vocabulary import Role


class Source(IntEnum):
    """What a mask is made from; of several things, the highest counts."""

    CONSTANTS = 0
    """Factory ops and buffers: every batch gets the same, such as the causal triangle."""
    WINDOW = 1
    """Constants too, but with a second limit, which no flag of a kernel stands for."""
    DATA = 2
    """What the program hands in: padding."""
    PARAMETERS = 3
    """It is learned, or computed by the model: backward wants its gradient."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a mask comes from."""

    source: Source
    storages: frozenset[int]
    """The mask, and all that is as large as it and that it was made from."""
    bool_storage: int | None
    """Of these, the nearest that is boolean: what `scaled_dot_product_attention` would be given."""


class Masks:
    """The lineage of every mask of a run, each found once."""

    def __init__(self, facts: Facts, roles: Mapping[int, str]) -> None:
        """Look at the masks of a run.

        Args:
            facts: The run's tables.
            roles: Per storage that has one, its `Role`.
        """
        self._facts = facts
        self._roles = roles
        self._found: dict[tuple[int, int], Lineage] = {}

    def of_call(self, call: AttentionCall) -> list[tuple[int, Lineage]]:
        """Return the operand rows of a call that are masks, and where each comes from."""
        return [(row, self.of_row(row)) for row in call.mask_rows]

    def source_of(self, call: AttentionCall) -> Source | None:
        """Return what a call's masks are made from, or None if it has none."""
        return max((lineage.source for _, lineage in self.of_call(call)), default=None)

    def of_row(self, row: int) -> Lineage:
        """Return where the mask in an operand row comes from."""
        facts = self._facts
        key = (int(facts.producer_row[row]), int(facts.storage[row]))
        lineage = self._found.get(key)
        if lineage is None:
            lineage = self._found[key] = self._walk(row)
        return lineage

    def _walk(self, row: int) -> Lineage:
        facts = self._facts
        least = facts.signature_of(row).numel
        source, bool_storage = Source.CONSTANTS, None
        storages: set[int] = set()
        todo, seen, limits = [row], {row}, set[int]()
        while todo and len(seen) < _MOST_ROWS:
            at = todo.pop(0)  # the nearest first
            signature = facts.signature_of(at)
            if signature.numel >= least:
                storages.add(int(facts.storage[at]))
                if signature.dtype == "bool" and bool_storage is None:
                    bool_storage = int(facts.storage[at])
            source = max(source, self._judge(at))
            made = int(facts.producer_row[at])
            if made >= 0:
                op = int(facts.row_op[made])
                limits |= {op} if self._limits_distance(op) else set()
                more = [r for r in facts.rows_in(op) if r not in seen]
                seen.update(more)
                todo += more
        if len(limits) > 1:
            source = max(source, Source.WINDOW)
        return Lineage(source, frozenset(storages), bool_storage)

    def _limits_distance(self, op: int) -> bool:
        """Return whether an op leaves out what lies too far to one side of the diagonal.

        A triangle does, and so does comparing every position of a query with every one of a key.
        """
        facts = self._facts
        name = facts.short_names[facts.code[op]].rstrip("_")
        if name in _TRIANGLES:
            return True
        sizes = [facts.signature_of(r).numel for r in facts.rows_in(op)]
        made = max((facts.signature_of(r).numel for r in facts.rows_out(op)), default=0)
        return name in _COMPARISONS and made > max(sizes, default=made)

    def _judge(self, row: int) -> Source:
        """Return what an operand on the way to a mask is by itself."""
        facts = self._facts
        role = self._roles.get(int(facts.storage[row]))
        if role == Role.PARAMETER:
            return Source.PARAMETERS
        made = int(facts.producer_row[row])
        if made < 0:
            is_constant = role == Role.BUFFER or facts.signature_of(row).numel == 1
            return Source.CONSTANTS if is_constant else Source.DATA
        op = int(facts.row_op[made])
        # What one module hands to another is not from outside, though checkpointing says so.
        is_handed_in = role == Role.INPUT and facts.scope[op] < 0
        is_random = facts.short_names[facts.code[op]].startswith("rand")
        return Source.DATA if is_handed_in or is_random else Source.CONSTANTS


_TRIANGLES = frozenset({"tril", "triu"})
_COMPARISONS = frozenset({"lt", "le", "gt", "ge"})
_MOST_ROWS = 512
"""How far back a mask is followed; those of real models are made by some thirty ops."""
