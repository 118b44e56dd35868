"""Attention inside compiled code, where a fused kernel lies between its two products.

The kernel that scales, masks and normalises the scores is no op, so that data flow ends at the
first product. What can be seen: a product of activations whose result no op reads, and after it one
that reads, as its left factor, something of just that shape that no op has made. Whether a softmax
lies between is not known; it is taken for one.

Known limitations:
    Heads that share K are written out for the product, so that ``kv_heads`` is ``heads``.
    Gradients of scores are not told from other temporaries of backward.
"""

import numpy as np

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts
from attnprof.attribution.pairs import Pattern
from attnprof.attribution.paths import common_path
from attnprof.attribution.products import factors, is_product
from attnprof.vocabulary import AttentionKind, Role

FUSED_KERNEL = "a fused kernel"
"""`AttentionCall.backend` of such a call."""

_FORWARD_OPS = 20_000
"""More than the visible ops of a compiled forward."""

_PRODUCTS = frozenset({"bmm", "baddbmm"})


def find_fused_pairs(facts: Facts, calls: list[AttentionCall]) -> list[AttentionCall]:
    """Return the attention calls in compiled code that are two products around a fused kernel.

    Args:
        facts: The run's facts.
        calls: Those that data flow finds, which are left out.
    """
    if not facts.is_compiled.any():
        return []
    parameters = _list_parameters(facts)
    known = {op for call in calls for op in call.ops}
    open_firsts: list[int] = []
    found = []
    for op in _list_products(facts):
        left, right = factors(facts, op)
        if op in known or {int(facts.storage[left]), int(facts.storage[right])} & parameters:
            continue
        first = _find_first(facts, open_firsts, op)
        if first is None:
            open_firsts.append(op)
        else:
            open_firsts.clear()  # what is older is not waited for any more
            found.append(_make_call(facts, first, op))
    return found


def _list_parameters(facts: Facts) -> set[int]:
    table = facts.stored.table("identities")
    rows = zip(table["storage"].to_pylist(), table["role"].to_pylist(), strict=True)
    return {storage for storage, role in rows if role == Role.PARAMETER}


def _list_products(facts: Facts) -> list[int]:
    """Return the batched products of compiled forwards, in order."""
    is_product = np.array([name in _PRODUCTS for name in facts.short_names] or [False])
    wanted = is_product[facts.code] & facts.is_compiled[:-1] & ~facts.is_backward
    ops: list[int] = np.flatnonzero(wanted).tolist()
    return ops


def _find_first(facts: Facts, firsts: list[int], second: int) -> int | None:
    """Return the product whose scores, with a kernel between, are a product's left factor."""
    row = factors(facts, second)[0]
    if facts.producer_row[row] >= 0 and int(facts.row_op[facts.producer_row[row]]) not in firsts:
        return None
    shape = facts.signature_of(row).shape
    for first in reversed(firsts):
        if facts.scope[first] != facts.scope[second]:
            break
        out = facts.rows_out(first)[0]
        if facts.signature_of(out).shape == shape and not _is_read(facts, out, second):
            return first
    return None


def _is_read(facts: Facts, row: int, before: int) -> bool:
    """Return whether an op before another one reads what was made, rather than overwrites it."""
    storage = int(facts.storage[row])
    users = [op for op in facts.users_of(int(facts.row_op[row])) if op < before]
    return any(all(int(facts.storage[r]) != storage for r in facts.rows_out(op)) for op in users)


def _is_used_again(facts: Facts, row: int) -> bool:
    """Return whether memory that an op wrote holds something else later in the same forward."""
    op = int(facts.row_op[row])
    scopes = facts.scope[op : op + _FORWARD_OPS]
    others = np.flatnonzero(scopes != facts.scope[op])
    end = op + (int(others[0]) if len(others) else len(scopes))
    rows = slice(int(facts.first_row[op + 1]), int(facts.first_row[end]))
    is_same = facts.storage[rows] == facts.storage[row]
    return bool((is_same & (facts.signature[rows] != facts.signature[row])).any())


def _count_batch(facts: Facts, second: int, merged: int, q_len: int) -> int:
    """Return B of B · H: the output is projected as a matrix of B · Tq rows; 1 if it is not."""
    output = facts.signature_of(facts.rows_out(second)[0])
    for op in range(second + 1, min(second + 4, facts.count)):
        if is_product(facts, op) and facts.scope[op] == facts.scope[second]:
            left = facts.signature_of(factors(facts, op)[0])
            rows = left.numel // max(1, left.shape[-1])
            batch = rows // q_len
            if left.numel == output.numel and batch and rows % q_len == 0 == merged % batch:
                return batch
    return 1


def _make_call(facts: Facts, first: int, second: int) -> AttentionCall:
    (left, right), (result, values) = factors(facts, first), factors(facts, second)
    merged, q_len, k_len = facts.signature_of(result).shape
    batch = _count_batch(facts, second, merged, q_len)
    paths = [facts.module_paths[facts.op_module[op]] for op in (first, second)]
    call = AttentionCall(AttentionKind.MATERIALISED, common_path(paths), [first, second])
    call.pattern = Pattern.SCORES
    call.score_ops, call.firsts, call.seconds = {first}, {first}, {second}
    call.score_numel = facts.signature_of(result).numel
    call.result_rows = call.softmax_rows = [result]
    scores = facts.rows_out(first)[0]
    call.path_rows = [result] if _is_used_again(facts, scores) else [scores, result]
    call.key_rows = [right, values]
    call.io_rows = [left, right, values, facts.rows_out(second)[0]]
    call.has_normaliser = True
    call.batch, call.heads, call.kv_heads = batch, merged // batch, merged // batch
    call.q_len, call.k_len = q_len, k_len
    call.head_dim = facts.signature_of(left).shape[-1]
    call.dtype = facts.signature_of(result).dtype
    call.backend = FUSED_KERNEL
    return call
