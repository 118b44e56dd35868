"""How many sequences a forward is given: its data may be (batch, tokens, …) or (tokens, batch, …).

``nn.MultiheadAttention`` and ``nn.Transformer`` take the latter unless they are told otherwise.
"""

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts, Signature


class Sequences:
    """How many sequences the outermost forwards of a run are given."""

    def __init__(self, facts: Facts, calls: list[AttentionCall]) -> None:
        """Find the forwards that are given tokens first, as their attention calls show."""
        self._facts = facts
        self._tokens_first = {
            facts.outermost_of_scope[int(facts.scope[call.ops[0]])]
            for call in calls
            if _is_tokens_first(facts, call)
        }

    def count(self, op: int) -> int:
        """Return how many sequences the outermost forward around an op is given; 0 if unknown."""
        facts = self._facts
        shape = facts.data_shape(op)
        if not shape:
            return 0
        outermost = facts.outermost_of_scope[int(facts.scope[op])]
        return shape[1] if outermost in self._tokens_first else shape[0]


def _is_tokens_first(facts: Facts, call: AttentionCall) -> bool:
    """Return whether sizes and memory of a call say that its forward is given tokens first.

    Sizes alone would not do: a batch of as many sequences as a window has tokens looks alike.
    """
    shape = facts.data_shape(call.ops[0])
    if len(shape) < 2 or call.keys_row < 0:
        return False
    if shape[0] not in (call.q_len, call.k_len) or shape[1] != call.batch:
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
    strides = [
        0 if size == 1 else stride for size, stride in zip(keys.shape, keys.stride, strict=True)
    ]
    furthest = max(range(len(strides)), key=strides.__getitem__)
    return furthest >= len(strides) - 2 and keys.shape[furthest] == tokens
