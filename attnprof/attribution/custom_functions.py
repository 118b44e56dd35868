"""What the backward of a `torch.autograd.Function` makes whose forward is attention.

Autograd has one node for all of its ops: which of them a gradient belongs to is not said. A product
that takes in no scores and makes some is one again: of Q and K, or of the output's gradient and V.
What is made of scores, as large, are scores.
"""

import numpy as np

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts
from attnprof.attribution.labels import CODE, Labels
from attnprof.attribution.products import NORMALISING, factors, is_product
from attnprof.vocabulary import Category

_SCORES = (Category.SOFTMAX, Category.ATTENTION_SCORES)


def label_custom_backward(facts: Facts, calls: list[AttentionCall], labels: Labels) -> None:
    """Label what nodes make in backward that stand for whole attention calls."""
    nodes = _find_whole_calls(facts, calls) if facts.is_backward.any() else {}
    if not nodes:
        return
    is_wanted = np.zeros(facts.count + 1, np.bool_)  # the last entry is for ops without a node
    is_wanted[list(nodes)] = True
    for op in np.flatnonzero(is_wanted[facts.forward_op]).tolist():
        own = nodes[int(facts.forward_op[op])]
        for row in facts.rows_out(op):
            storage = int(facts.storage[row])
            if facts.born_by[storage] == op:
                category = _choose_category(facts, own, op, row, labels)
                if category is not None:
                    labels.put(storage, category, own[0].layer)


def _find_whole_calls(facts: Facts, calls: list[AttentionCall]) -> dict[int, list[AttentionCall]]:
    """Return the calls that made no node between their ops, by the first op of the same node."""
    found: dict[int, list[AttentionCall]] = {}
    whole = [
        call
        for call in calls
        if call.score_ops and facts.seq[call.ops[0]] == facts.seq[call.ops[-1]]
    ]
    for thread in {int(facts.thread[call.ops[0]]) for call in whole}:
        ops = np.flatnonzero(facts.thread == thread)
        numbers = np.maximum.accumulate(facts.seq[ops])
        for call in whole:
            if facts.thread[call.ops[0]] == thread:
                at = np.searchsorted(numbers, facts.seq[call.ops[0]], "left")
                found.setdefault(int(ops[at]), []).append(call)
    return found


def _choose_category(
    facts: Facts, calls: list[AttentionCall], op: int, row: int, labels: Labels
) -> Category | None:
    """Return what an op of backward makes in an output row; None if that is nothing of attention.

    Args:
        facts: The run's tables.
        calls: The calls that the op's node stands for.
        op: The op.
        row: Its output row.
        labels: What is known so far.
    """
    codes = {CODE[category]: category for category in _SCORES}
    read = {int(facts.storage[r]): r for r in facts.rows_in(op)}
    scores = {s: codes[c] for s in read if (c := int(labels.category[s])) in codes}
    numel = facts.signature_of(row).numel
    if is_product(facts, op):
        if scores or numel < min(call.score_numel for call in calls):
            return Category.ATTENTION_IO  # dQ, dK or dV
        values = {
            int(facts.storage[r])
            for call in calls
            for second in call.seconds
            for r in factors(facts, second)
        }
        return Category.ATTENTION_SCORES if values.isdisjoint(read) else Category.SOFTMAX
    alike = [c for s, c in scores.items() if facts.signature_of(read[s]).numel == numel]
    is_result = NORMALISING.fullmatch(facts.short_names[facts.code[op]])
    return Category.SOFTMAX if alike and is_result else next(iter(alike), None)
