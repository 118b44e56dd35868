"""Attention calls: which ops make scores, which make softmax, what is kept on the way."""

import re

import numpy as np

from attnprof.attribution.axes import FEATURE
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Bools, Facts
from attnprof.attribution.flow import Flow
from attnprof.attribution.kinds import find_first_chunks, judge_kinds
from attnprof.attribution.meetings import SumFlow, find_meetings, is_attention, read_sums
from attnprof.attribution.pairs import Pair, Pattern
from attnprof.attribution.paths import common_path
from attnprof.attribution.products import (
    DROPOUT,
    INTEGERS,
    MULTIPLICATIONS,
    NORMALISING,
    OVERWRITING,
    UNFILLED,
    factors,
    is_index,
    is_product,
)
from attnprof.attribution.shapes import count_repeats, read_shapes
from attnprof.attribution.synthesised import find_synthesised, is_mask
from attnprof.vocabulary import AttentionKind

_FUSED = re.compile(
    r"scaled_dot_product_(?!.*(math|backward))|flash_attn|flash_attention|efficient_attention"
    r"|cudnn_attention|flex_attention|fmha|mem_eff|sdpa_fwd"
)
_OPAQUE = re.compile(r"_native_multi_head_attention|_transformer_encoder_layer_fwd")
_SOFTMAX = re.compile(r"softmax")
_SUM = re.compile(r"(cum)?sum")
_LONGEST_DETOUR = 256
"""Ops that are looked through, at most, beside the way from scores to values."""


def find_calls(facts: Facts, flow: Flow) -> list[AttentionCall]:
    """Return all attention calls of a run, in program order."""
    pairs = flow.pairs()
    found = [pair for pair in pairs if pair.seconds and _mixes_tokens(facts, pair)]
    read = [_read_pair(facts, flow, pair) for pair in found]
    # Mixing with a fixed set of slots (experts, streams) looks like low-rank attention but for
    # the softmax between the products.
    calls = [c for c in read if c.has_normaliser or c.pattern is not Pattern.LOW_RANK]
    judge_kinds(facts, flow, calls)
    find_first_chunks(facts, flow, calls, [pair for pair in pairs if not pair.seconds])
    calls += _find_single_ops(facts, flow)
    return sorted(calls, key=lambda call: call.ops[0])


def find_other_calls(
    facts: Facts,
    flow: Flow,
    is_forward: Bools,
    roles: dict[int, str],
    calls: list[AttentionCall],
) -> list[AttentionCall]:
    """Return the calls of attention whose scores are no products of queries and keys.

    They are looked for where a softmax is left that belongs to none of the calls found.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        is_forward: Per op, whether it computes rather than differentiates or updates.
        roles: Per storage, its `Role`, where it has one.
        calls: The attention calls that are known.
    """
    known = {op for call in calls for op in call.ops}
    names = np.array([bool(NORMALISING.fullmatch(n)) for n in facts.short_names], np.bool_)
    starts = np.flatnonzero(names[facts.code] & is_forward).tolist()
    left = [op for op in starts if op not in known]
    if not left:
        return []
    meetings = find_meetings(facts, flow, is_forward)
    found = (
        _find_sums(facts, SumFlow(facts, is_forward, roles, meetings), known) if meetings else []
    )
    known |= {op for call in found for op in call.ops}
    softmaxes = [op for op in left if _SOFTMAX.search(facts.short_names[facts.code[op]])]
    synthesised = find_synthesised(facts, flow, [op for op in softmaxes if op not in known])
    for call in synthesised:
        _find_masks(facts, call)
        call.mask_rows = [row for row in call.mask_rows if is_mask(facts, flow, call, row)]
    return found + [call for call in synthesised if known.isdisjoint(call.ops)]


def _find_sums(facts: Facts, sums: SumFlow, known: set[int]) -> list[AttentionCall]:
    """Return the calls whose scores are sums of queries and keys."""
    pairs = [pair for pair in sums.pairs() if pair.seconds and known.isdisjoint(pair.ops)]
    read = [_read_pair(facts, sums, pair) for pair in pairs if is_attention(facts, sums, pair)]
    # Exponentials of differences that nothing divides are decays.
    found = [c for c in read if _SOFTMAX.search(c.backend) or c.backend.startswith("div")]
    for call in found:
        read_sums(facts, call)
    judge_kinds(facts, sums, found)
    return found


def _mixes_tokens(facts: Facts, pair: Pair) -> bool:
    """Return whether the products of a pair, or what lies between, mix tokens.

    Features times features of the same token do not, unless they are summed up over tokens.
    """
    names = facts.short_names
    return any(names[facts.code[op]] not in MULTIPLICATIONS for op in pair.firsts) or any(
        _SUM.match(names[facts.code[op]]) for op in pair.between
    )


def _read_pair(facts: Facts, flow: Flow, pair: Pair) -> AttentionCall:
    root = flow.find_pair(flow.pair_of[int(facts.producer_row[pair.seconds[0][1]])])
    path = _walk_path(facts, flow, pair, root)
    path |= {op for op, _ in pair.seconds if _is_multiplication(facts, op)}
    ops = sorted(pair.ops)
    end = min(op for op, _ in pair.seconds)  # what a loss makes of scores is no part of the layer
    named = [op for op in ops if op not in pair.beside and op <= end]
    layer = common_path([facts.module_paths[facts.op_module[op]] for op in named])
    call = AttentionCall(AttentionKind.LINEAR, layer, ops)
    call.pattern = pair.pattern
    call.firsts, call.seconds = set(pair.firsts), {op for op, _ in pair.seconds}
    call.score_numel = min(facts.signature_of(row).numel for _, row in pair.seconds)
    call.is_recompute = bool(facts.is_recompute[ops[0]])
    for op in sorted(set(pair.firsts) - call.seconds):
        call.key_rows += factors(facts, op)
    for op, row in pair.seconds:
        call.key_rows.append(next(r for r in factors(facts, op) if r != row))
        call.io_rows.append(_find_result(facts, op))
    call.io_rows += call.key_rows
    if pair.pattern is Pattern.STATE:
        call.path_rows = [row for op in sorted(path) for row in facts.rows_out(op)]
        return call
    stages = _split_at_normaliser(facts, pair, path, sorted(path | {*pair.firsts}))
    call.score_ops, call.softmax_ops, normalisers, call.has_normaliser = stages
    detours = _find_detours(facts, pair, path)
    _add_side_ops(facts, detours.union(pair.between, pair.beside), call)
    call.result_rows = [facts.rows_out(op)[0] for op in normalisers]
    size = facts.signature_of(call.result_rows[0]).numel
    call.score_numel = min(call.score_numel, size)  # a band may be laid out anew for values
    call.path_rows = [
        row
        for op in sorted(path)
        for row in facts.rows_out(op)
        if row in flow.pair_of
        and flow.find_pair(flow.pair_of[row]) == root
        and (op not in pair.aside or facts.signature_of(row).numel == size)
    ]
    call.path_rows += [
        row
        for op in sorted(detours)
        for row in facts.rows_out(op)
        if facts.signature_of(row).numel == size
    ]
    call.has_dropout = any(
        DROPOUT.search(facts.short_names[facts.code[op]]) for op in call.softmax_ops
    )
    call.backend = facts.short_names[facts.code[normalisers[0]]]
    read_shapes(facts, flow, pair, call)
    _find_masks(facts, call)
    return call


def _is_multiplication(facts: Facts, op: int) -> bool:
    return facts.short_names[facts.code[op]] in MULTIPLICATIONS


def _find_result(facts: Facts, second: int) -> int:
    """Return the output row of a second product; where it is written out, of the sum over keys."""
    if _is_multiplication(facts, second):
        sums = (op for op in facts.users_of(second) if facts.short_names[facts.code[op]] == "sum")
        second = next(sums, second)
    return facts.rows_out(second)[0]


def _walk_path(facts: Facts, flow: Flow, pair: Pair, root: int) -> set[int]:
    """Return the ops from first products to second ones, first ones included."""
    todo = [int(facts.producer_row[row]) for _, row in pair.seconds]
    path: set[int] = set()
    while todo:
        row = todo.pop()
        number = flow.pair_of.get(row)
        if number is None or flow.find_pair(number) != root:
            continue
        op = int(facts.row_op[row])
        if op not in path:
            path.add(op)
            todo.extend(int(facts.producer_row[r]) for r in facts.rows_in(op))
    return path


def _find_detours(facts: Facts, pair: Pair, path: set[int]) -> set[int]:
    """Return the ops that make, of scores, something smaller that joins them again.

    Such is the threshold of sparsemax: backward goes through the sort and the sums it is found by.
    """
    own = {*pair.between, *pair.beside} - path
    begin = min(pair.firsts)
    todo = [row for op in path if not is_product(facts, op) for row in facts.rows_in(op)]
    seen: set[int] = set()
    while own and todo and len(seen) < _LONGEST_DETOUR:
        made = int(facts.producer_row[todo.pop()])
        op = int(facts.row_op[made]) if made >= 0 else -1
        if op <= begin or op in path or op in seen or is_product(facts, op):
            continue
        seen.add(op)
        todo += facts.rows_in(op)
    found = seen & own
    for op in sorted(seen):
        if not found.isdisjoint(facts.row_op[facts.producer_row[r]] for r in facts.rows_in(op)):
            found.add(op)
    return found


def _split_at_normaliser(
    facts: Facts, pair: Pair, path: set[int], ops: list[int]
) -> tuple[set[int], set[int], list[int], bool]:
    """Split the ops between two products into scores and softmax; return the normalisers too.

    The normaliser is the softmax where there is one, else an exponential with the division that
    follows, else a sigmoid. If there is none, what enters the second product is normalised.
    """
    names = {op: facts.short_names[facts.code[op]] for op in ops}
    found = True
    starts = [op for op in ops if _SOFTMAX.search(names[op])]
    results = starts
    if not starts:
        starts = [op for op in ops if names[op] in ("exp", "exp_", "exp2")]
        divisions = [op for op in ops if starts and op > starts[0] and names[op] in ("div", "div_")]
        results = divisions[:1] or starts[-1:]
    if not starts:
        starts = results = [op for op in ops if names[op] in ("sigmoid", "sigmoid_")]
    if not starts:
        found = False
        entering = {int(facts.row_op[facts.producer_row[row]]) for _, row in pair.seconds}
        starts = results = sorted(entering & path) or ops[-1:]
    after: set[int] = set()
    for op in ops:
        made_from = {int(facts.row_op[facts.producer_row[r]]) for r in facts.rows_in(op)}
        if op in starts or (made_from & after and op not in pair.firsts):
            after.add(op)
    return set(ops) - after, after, results, found


def _add_side_ops(facts: Facts, ops: set[int], call: AttentionCall) -> None:
    """Sort what passes by, and what is not consumed, into the stage it was made from."""
    for op in sorted(ops - call.score_ops - call.softmax_ops):
        made_from = {int(facts.row_op[facts.producer_row[r]]) for r in facts.rows_in(op)}
        (call.softmax_ops if made_from & call.softmax_ops else call.score_ops).add(op)


def _find_masks(facts: Facts, call: AttentionCall) -> None:
    """Note what joins the scores, or the softmax results, from the side."""
    own = call.score_ops | call.softmax_ops
    # Without a normaliser there is no after: what joins are decays, not dropout. What joins in it
    # is a mask.
    normalisers = {int(facts.row_op[row]) for row in call.result_rows}
    after = call.softmax_ops - normalisers if call.has_normaliser else set()
    for op in sorted(own - call.seconds):
        is_first = op in call.firsts or is_product(facts, op)
        skip = set(factors(facts, op)) if is_first else set()
        if facts.short_names[facts.code[op]] in OVERWRITING:
            skip.add(facts.rows_in(op)[0])  # what was there before is gone
        for row in facts.rows_in(op):
            made = int(facts.producer_row[row])
            is_own = made >= 0 and int(facts.row_op[made]) in own
            if row in skip or is_own or is_index(facts, row):
                continue
            if is_first and _is_unfilled(facts, made):  # what baddbmm has to be given, with beta=0
                call.score_ops.add(int(facts.row_op[made]))
                continue
            if facts.signature_of(row).numel >= max(2, call.k_len):
                (call.softmax_rows if op in after else call.mask_rows).append(row)


def _is_unfilled(facts: Facts, made: int) -> bool:
    """Return whether an output row is a tensor that nothing has been written to."""
    return made >= 0 and facts.short_names[facts.code[facts.row_op[made]]] in UNFILLED


def _find_single_ops(facts: Facts, flow: Flow) -> list[AttentionCall]:
    """Return the calls that are one op: fused kernels, and whole layers in one op."""
    fused = [bool(_FUSED.search(n)) and "backward" not in n for n in facts.short_names]
    opaque = [bool(_OPAQUE.search(n)) for n in facts.short_names]
    calls = []
    for op in range(facts.count) if any(fused) or any(opaque) else ():
        code = facts.code[op]
        if (fused[code] or opaque[code]) and not facts.is_backward[op]:
            layer = facts.module_paths[facts.op_module[op]]
            kind = AttentionKind.FUSED if fused[code] else AttentionKind.OPAQUE
            call = AttentionCall(kind, layer, [op], seconds={op})
            call.is_recompute = bool(facts.is_recompute[op])
            call.backend = facts.short_names[code]
            if fused[code]:
                _read_fused(facts, flow, call)
            calls.append(call)
    return calls


def _read_fused(facts: Facts, flow: Flow, call: AttentionCall) -> None:
    op = call.ops[0]
    rows = [r for r in facts.rows_in(op) if len(facts.signature_of(r).shape) >= 3]
    outs = facts.rows_out(op)
    call.io_rows = [*rows[:3], *outs]
    call.key_rows = list(rows[1:3]) or list(rows)
    call.mask_rows = [
        r
        for r in facts.rows_in(op)
        if r not in rows[:3]
        and facts.signature_of(r).numel > 1
        and facts.signature_of(r).dtype not in INTEGERS
        and len(rows) >= 3
        and len(facts.signature_of(r).shape) >= 2
    ]
    if len(rows) < 3:
        return
    q, k, v = (facts.signature_of(row).shape for row in rows[:3])
    # torch's own kernels take (B, H, T, D); others, such as flash_attn, (B, T, H, D).
    head_at = -3 if facts.code_names[facts.code[op]].startswith("aten::") else -2
    time_at = -2 if head_at == -3 else -3
    call.batch, call.head_dim, call.dtype = q[0], q[-1], facts.signature_of(rows[0]).dtype
    call.heads = q[head_at]
    call.kv_heads = max(1, k[head_at] // count_repeats(facts, rows[1]))
    call.value_dim = v[-1]
    call.q_len, call.k_len = q[time_at], k[time_at]
    call.keys_row = rows[1]
    if _are_heads(facts, flow, rows[0], head_at, time_at):
        call.heads, call.q_len = call.heads * call.q_len, 1


def _are_heads(facts: Facts, flow: Flow, row: int, head_at: int, time_at: int) -> bool:
    """Return whether queries are heads that share a key, given as queries of a single token.

    Then they and the heads were one dimension of features. Learned queries have their own.
    """
    made = int(facts.producer_row[row])
    if made < 0 or flow.bits_of_input(row)[time_at] != FEATURE:
        return False
    read = facts.signature_of(row)
    ends = [read.stride[at] * read.shape[at] for at in (head_at, time_at)]
    least, most = min(read.stride[head_at], read.stride[time_at]), max(ends)
    written, bits = flow.written(made)
    return any(
        bit == FEATURE and stride <= least and stride * size >= most
        for size, stride, bit in zip(written.shape, written.stride, bits, strict=True)
    )
