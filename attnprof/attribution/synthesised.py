"""Attention without keys: weights over positions that a projection makes, or that are learned.

Synthesizers make the scores of a query from the query alone, a number per position, or keep them as
a parameter. No product of activations makes them, so they are found from the other end: a softmax
whose result is multiplied by values along an axis of tokens, each query by all of them. Routers,
mixtures and codebooks have softmaxes too, but these weigh experts, features or parameters, and a
kernel per token (dynamic convolution) weighs neighbours of that token alone.
"""

from dataclasses import dataclass, field

from attnprof.attribution.axes import FEATURE, TOKEN
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts
from attnprof.attribution.flow import Flow
from attnprof.attribution.origins import Origin
from attnprof.attribution.pairs import Pattern
from attnprof.attribution.paths import common_path
from attnprof.attribution.products import (
    DROPOUT,
    INTEGERS,
    OVERWRITING,
    classify,
    factors,
    is_product,
)
from attnprof.vocabulary import AttentionKind

_MOST_STEPS = 12
"""Ops that are followed from a softmax, at most: dropout, casts and copies one way, masks and
scaling the other."""


@dataclass(slots=True)
class _Weights:
    """Normalised weights, and what is made of them up to products with values."""

    softmax: int
    ops: list[int]
    """The softmax and the ops that keep its size, in order."""
    seconds: list[tuple[int, int]] = field(default_factory=list)
    """Products, and the operand row through which they take the weights."""


def find_synthesised(facts: Facts, flow: Flow, softmaxes: list[int]) -> list[AttentionCall]:
    """Return the calls of attention whose scores come from no keys.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        softmaxes: Forward ops of no other attention call.
    """
    calls = []
    for softmax in softmaxes:
        weights = _follow(facts, softmax)
        weights.seconds = [s for s in weights.seconds if _weighs_tokens(facts, flow, *s)]
        if not weights.seconds:
            continue
        scores = _find_scores(facts, flow, softmax)
        if scores is not None:
            calls.append(_describe(facts, weights, *scores))
    return calls


def _follow(facts: Facts, softmax: int) -> _Weights:
    """Follow a softmax's result to the products that take it in."""
    weights = _Weights(softmax, [softmax])
    size = facts.signature_of(facts.rows_out(softmax)[0]).numel
    for op in weights.ops:  # grows on the way
        for user in dict.fromkeys(facts.users_of(op)):
            if facts.is_backward[user] or not facts.writes[user] or user in weights.ops:
                continue
            if classify(facts.short_names[facts.code[user]]) >= 0:
                taken = [r for r in factors(facts, user) if _is_made_by(facts, r, op)]
                weights.seconds += [(user, row) for row in taken]
            elif len(weights.ops) < _MOST_STEPS and _keeps_size(facts, user, size):
                weights.ops.append(user)
    return weights


def _is_made_by(facts: Facts, row: int, op: int) -> bool:
    made = int(facts.producer_row[row])
    return made >= 0 and int(facts.row_op[made]) == op


def _keeps_size(facts: Facts, op: int, size: int) -> bool:
    """Return whether an op's result is as large as the weights, or repeats them."""
    name = facts.short_names[facts.code[op]]
    out = facts.signature_of(facts.rows_out(op)[0])
    is_plain = name not in OVERWRITING and out.dtype not in INTEGERS
    return is_plain and out.numel % size == 0 and not is_product(facts, op)


def _weighs_tokens(facts: Facts, flow: Flow, second: int, row: int) -> bool:
    """Return whether a product sums up all tokens of its other factor for many queries at once.

    The weights' axis is as wide as a parameter says, and meets one of tokens. Learned weights
    belong to no token: they are a matrix over all of them.
    """
    left, right = factors(facts, second)
    values = right if row == left else left
    if flow.origin_of_input(values) is not Origin.ACTIVATION:
        return False
    met, queries = _split(flow.bits_of_input(row), is_left=row == left)
    tokens, width = _split(flow.bits_of_input(values), is_left=values == left)
    if met != FEATURE or tokens != TOKEN or not width & FEATURE:
        return False
    if flow.origin_of_input(row) is Origin.PARAMETER:
        k_len, q_len = _split(facts.signature_of(row).shape, is_left=row == left)
        return q_len == k_len
    return queries == TOKEN


def _split(dimensions: tuple[int, ...], *, is_left: bool) -> tuple[int, int]:
    """Return what is known of a factor's contracted dimension, and of its free one."""
    if len(dimensions) < 2:
        return 0, 0
    return (dimensions[-1], dimensions[-2]) if is_left else (dimensions[-2], dimensions[-1])


def _find_scores(facts: Facts, flow: Flow, softmax: int) -> tuple[set[int], set[int]] | None:
    """Return the projections that make a softmax's scores, and what lies between; None if unknown.

    There is neither if the scores are a parameter.
    """
    firsts: set[int] = set()
    between: set[int] = set()
    todo = list(facts.rows_in(softmax))
    size = facts.signature_of(todo[0]).numel
    while todo and len(between) < _MOST_STEPS:
        row = todo.pop()
        made = int(facts.producer_row[row])
        if flow.origin_of_input(row) is not Origin.ACTIVATION and made < 0:
            continue
        if made < 0:
            return None
        op = int(facts.row_op[made])
        if classify(facts.short_names[facts.code[op]]) >= 0:
            origins = {flow.origin_of_input(r) for r in factors(facts, op)}
            if origins != {Origin.ACTIVATION, Origin.PARAMETER}:
                return None
            firsts.add(op)
        elif op not in between:
            between.add(op)
            todo += [r for r in facts.rows_in(op) if _is_score(facts, r, size)]
    is_learned = flow.origin_of_input(facts.rows_in(softmax)[0]) is Origin.PARAMETER
    return (firsts, between) if is_learned != bool(firsts) else None


def _is_score(facts: Facts, row: int, size: int) -> bool:
    signature = facts.signature_of(row)
    return signature.numel == size and "float" in signature.dtype


def _describe(
    facts: Facts, weights: _Weights, firsts: set[int], between: set[int]
) -> AttentionCall:
    seconds = {op for op, _ in weights.seconds}
    ops = sorted({*firsts, *between, *weights.ops, *seconds})
    layer = common_path([facts.module_paths[facts.op_module[op]] for op in ops])
    call = AttentionCall(AttentionKind.MATERIALISED, layer, ops, pattern=Pattern.LEARNED)
    call.firsts, call.seconds = firsts, seconds
    call.score_ops, call.softmax_ops = firsts | between, set(weights.ops)
    call.result_rows = [facts.rows_out(weights.softmax)[0]]
    result = facts.signature_of(call.result_rows[0])
    call.score_numel, call.dtype = result.numel, result.dtype
    call.path_rows = [facts.rows_out(op)[0] for op in sorted(call.score_ops | call.softmax_ops)]
    for op, row in weights.seconds:
        left, right = factors(facts, op)
        call.key_rows.append(right if row == left else left)
        call.io_rows.append(facts.rows_out(op)[0])
    call.io_rows += call.key_rows
    call.is_recompute = bool(facts.is_recompute[ops[0]])
    call.has_normaliser = True
    names = [facts.short_names[facts.code[op]] for op in weights.ops]
    call.has_dropout = any(DROPOUT.search(name) for name in names)
    call.backend = facts.short_names[facts.code[weights.softmax]]
    _read_shapes(facts, weights, call)
    return call


def _read_shapes(facts: Facts, weights: _Weights, call: AttentionCall) -> None:
    """Read lengths and widths from the product with values; learned weights have no batch."""
    second, row = weights.seconds[0]
    is_left = row == factors(facts, second)[0]
    call.k_len, call.q_len = _split(facts.signature_of(row).shape, is_left=is_left)
    matrices = max(1, call.score_numel // (call.q_len * call.k_len))
    outer = max(1, *facts.data_shape(weights.softmax)[:1], 1)
    call.batch = outer if call.firsts and matrices % outer == 0 else 1
    call.heads = call.kv_heads = matrices // call.batch
    values = facts.signature_of(call.key_rows[0]).numel
    call.value_dim = call.head_dim = values // (outer * call.k_len * call.heads)


def is_mask(facts: Facts, flow: Flow, call: AttentionCall, row: int) -> bool:
    """Return whether what joins such scores is a mask, and not what they are made of."""
    if int(facts.row_op[row]) in call.firsts:
        return False
    return bool(call.firsts) or flow.origin_of_input(row) is not Origin.PARAMETER
