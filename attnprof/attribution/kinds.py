"""Which calls meet every key, which a window of them, and which a few that stand for all.

How many keys a call meets is compared with how many tokens its K was projected from. A program may
do the work of one attention in several calls: block by block of the scores, or sequence by
sequence.
"""

import re

from attnprof.attribution.batches import Sequences
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts
from attnprof.attribution.flow import Flow
from attnprof.attribution.origins import Origin
from attnprof.attribution.pairs import Pair, Pattern
from attnprof.attribution.products import CONVOLUTIONS, INTEGERS, factors, is_product
from attnprof.vocabulary import AttentionKind

_CHOOSING = frozenset({"index", "index_select", "gather", "take", "take_along_dim", "slice"})
"""Ops that leave out elements; others that make less of their operand sum up or pool it."""
_WINDOWS = re.compile(r"(max|avg)_pool\dd")
"""Ops that pool windows of a given size; others (means, adaptive pools) leave a given number."""

_ADAPTIVE = re.compile(r"_?adaptive_(max|avg)_pool\dd")
_FARTHEST = 16
"""Ops between a pool and keys projected from what it left: norms, activations, a convolution."""


def judge_kinds(facts: Facts, flow: Flow, calls: list[AttentionCall]) -> None:
    """Tell bands, windows and pooled keys among the calls that are taken for materialised."""
    together: dict[tuple[str, int], list[AttentionCall]] = {}
    for call in calls:
        if call.kind is AttentionKind.MATERIALISED and call.keys_row >= 0:
            scope = facts.enclosing_call(call.ops[0], call.layer)
            together.setdefault((call.layer, scope), []).append(call)
    sequences = Sequences(facts, flow, [call for group in together.values() for call in group])
    for group in together.values():
        judged = [_judge(facts, flow, call, group, sequences.count(call)) for call in group]
        for call, kind in zip(group, judged, strict=True):
            call.kind = kind


def find_first_chunks(
    facts: Facts, flow: Flow, calls: list[AttentionCall], unread: list[Pair]
) -> None:
    """Tell scores inside the only chunk of linear attention, whose state nothing reads yet.

    The scores look like those of attention without a softmax. But beside them queries read a
    state, which is empty, and keys and values are summed up into one of that shape, for a next
    chunk that does not come.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        calls: The attention calls.
        unread: First products that no second one consumes.
    """
    states: dict[int, set[tuple[int, ...]]] = {}
    for pair in unread:
        if pair.pattern is Pattern.STATE:
            op = pair.firsts[0]
            shape = facts.signature_of(facts.rows_out(op)[0]).shape[-2:]
            states.setdefault(int(facts.scope[op]), set()).add(shape)
    if not states:
        return
    columns = (facts.scopes[name].tolist() for name in ("scope", "enter_op", "exit_op"))
    reading = {
        scope
        for scope, *span in zip(*columns, strict=True)
        if scope in states
        and any(_reads_empty_state(facts, flow, op, states[scope]) for op in range(*span))
    }
    for call in calls:
        is_inner = call.pattern is Pattern.SCORES and not call.has_normaliser
        if is_inner and int(facts.scope[call.ops[0]]) in reading:
            call.kind = AttentionKind.LINEAR


def _reads_empty_state(facts: Facts, flow: Flow, op: int, shapes: set[tuple[int, ...]]) -> bool:
    """Return whether an op multiplies data by a constant of a state's shape."""
    if not is_product(facts, op):
        return False
    left, right = factors(facts, op)
    return (
        facts.signature_of(right).shape[-2:] in shapes
        and flow.origin_of_input(left) is Origin.ACTIVATION
        and flow.origin_of_input(right) is Origin.CONSTANT
    )


def _judge(
    facts: Facts, flow: Flow, call: AttentionCall, group: list[AttentionCall], outer: int
) -> AttentionKind:
    """Return the kind of a call.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        call: The call.
        group: Those of the same layer's call, this one among them.
        outer: How many sequences its keys are from; 0 if unknown.
    """
    if call.k_len < call.q_len and _are_pooled_to_number(facts, flow, call):
        return AttentionKind.LOW_RANK
    tokens, is_pooled = _count_tokens(facts, call, outer)
    if not tokens or call.k_len >= tokens:
        return AttentionKind.MATERIALISED
    scores = _count_scores(facts, call)
    if _has_windows(facts, call, outer):
        is_band = scores < call.batch * call.heads * call.q_len * tokens
    else:
        # One stretch of keys for all queries of the call.
        is_band = 2 * call.k_len < tokens
        if len(group) * call.batch <= outer:  # a call per sequence, each with its own length
            is_band &= call.q_len != call.k_len
        else:
            in_all = sum(_count_scores(facts, each) for each in group)
            is_band &= 2 * in_all < outer * call.heads * tokens * tokens
            is_band |= _are_stretches(group, outer * tokens, tokens)
    if not is_band:
        return AttentionKind.MATERIALISED
    return AttentionKind.LOW_RANK if is_pooled else AttentionKind.BANDED


def _are_stretches(group: list[AttentionCall], queries: int, tokens: int) -> bool:
    """Return whether calls go from one stretch of queries to the next, and none meets all keys.

    A program that goes over blocks of scores asks every query several times.

    Args:
        group: The calls.
        queries: The queries of all sequences.
        tokens: The tokens of one sequence.
    """
    asked = sum(call.batch * call.q_len for call in group)
    return len(group) > 2 and asked <= queries and max(call.k_len for call in group) < tokens


def _count_scores(facts: Facts, call: AttentionCall) -> int:
    """Return the scores of a call: of its softmaxes together, where they differ in size."""
    sizes = [facts.signature_of(row).numel for row in call.result_rows]
    return sum(sizes) if len(set(sizes)) > 1 else sizes[0]


def _has_windows(facts: Facts, call: AttentionCall, outer: int) -> bool:
    """Return whether a product holds several stretches of the keys of one sequence."""
    one_stretch = outer * call.k_len * call.head_dim * call.kv_heads * call.key_repeats
    return call.batch > outer or facts.signature_of(call.keys_row).numel > one_stretch


def _count_tokens(facts: Facts, call: AttentionCall, outer: int) -> tuple[int, bool]:
    """Return how many tokens K was projected from, and if they were pooled since; 0 if unknown.

    Per sequence, of which there are ``outer``. Where a convolution or a
    pool over windows made K, tokens are what it left: a share of those it was given, which grows
    with n.
    """
    row, is_pooled = call.keys_row, False
    for _ in range(12 if outer else 0):
        made = int(facts.producer_row[row])
        if made < 0:
            break
        op = int(facts.row_op[made])
        name = facts.short_names[facts.code[op]]
        signature = facts.signature_of(made)
        if name in CONVOLUTIONS or _WINDOWS.match(name):
            # Heads may be among its channels or among its batch.
            width = max(signature.shape[1], call.head_dim * call.kv_heads)
            return signature.numel // width // outer, is_pooled
        if is_product(facts, op):
            width = signature.shape[-1]
            return (signature.numel // width // outer if width else 0), is_pooled
        # Not the indices of what is gathered.
        inputs = [r for r in facts.rows_in(op) if facts.signature_of(r).dtype not in INTEGERS]
        if not inputs:
            break
        row = max(inputs, key=lambda r: facts.signature_of(r).numel)
        is_smaller = signature.numel < facts.signature_of(row).numel
        is_pooled |= is_smaller and name not in _CHOOSING
    return 0, False


def _are_pooled_to_number(facts: Facts, flow: Flow, call: AttentionCall) -> bool:
    """Return whether K was projected from tokens pooled to a number that the program gives."""
    row = call.keys_row
    for _ in range(_FARTHEST):
        made = int(facts.producer_row[row])
        if made < 0:
            return False
        op = int(facts.row_op[made])
        if _ADAPTIVE.fullmatch(facts.short_names[facts.code[op]]):
            return True
        inputs = [r for r in facts.rows_in(op) if flow.origin_of_input(r) is Origin.ACTIVATION]
        if not inputs:
            return False
        row = max(inputs, key=lambda r: facts.signature_of(r).numel)
    return False
