"""What checkpointing repeats in backward, and which op each of its ops repeats.

A module that is called in backward says so itself. The ops of a function, or of a method, only show
that they make autograd nodes while one runs: autograd's own formulas make none, unless backward
builds a graph of its own. What is repeated looks like what ran in forward, op by op, and works for
the same modules. It may end before the second product of attention, whose result nobody needs.
"""

from dataclasses import dataclass

import numpy as np

from attnprof.attribution.facts import Bools, Facts, Ints
from attnprof.store.schema import BACKWARD_BEGIN

_WINDOW = 32
"""Ops of the forward that are passed over, at most, to find the next one that is repeated."""


@dataclass(frozen=True)
class Repeats:
    """What is repeated, per op."""

    is_recompute: Bools
    """Whether it ran in a repeated forward."""
    module: Ints
    """The module that it ran for, as `Facts.op_module`."""
    original: Ints
    """The op in forward that it repeats, or -1."""


def find_repeats(facts: Facts) -> Repeats:
    """Find the ops that repeat a forward, and what they repeat."""
    found = Repeats(
        facts.is_recompute.copy(), facts.op_module.copy(), np.full(facts.count, -1, np.int64)
    )
    marks = facts.stored.columns("marks")
    begins_at = marks["op"][marks["kind"] == BACKWARD_BEGIN]
    for ops in _list_repeating(facts):
        is_whole = int(ops[-1]) + 1 in begins_at
        region = ops if is_whole else _cut_off_formula(facts, ops)
        originals = _find_originals(facts, region, is_whole=is_whole) if len(region) else []
        known = [original for original in originals if original >= 0]
        if 2 * len(known) <= len(region):
            continue
        found.is_recompute[region] = True
        found.original[region] = originals
        module = facts.op_module[known[0]]
        for op, original in zip(region.tolist(), originals, strict=True):
            module = facts.op_module[original] if original >= 0 else module
            if facts.scope[op] < 0:
                found.module[op] = module
    return found


def _list_repeating(facts: Facts) -> list[Ints]:
    """Return the ops that one autograd node ran in a row, where some made nodes."""
    found = []
    for thread in np.unique(facts.thread[facts.node >= 0]):
        ops = np.flatnonzero(facts.thread == thread)
        node, seq = facts.node[ops], facts.seq[ops]
        is_next = np.append(False, (node[1:] == node[:-1]) & (node[1:] >= 0))
        makes_node = is_next & np.append(False, seq[1:] > seq[:-1])
        run = np.cumsum(~is_next)
        repeating = np.unique(run[makes_node])
        borders = np.searchsorted(run, np.stack([repeating, repeating + 1]))
        found += [ops[begin:end] for begin, end in borders.T.tolist()]
    return found


def _cut_off_formula(facts: Facts, ops: Ints) -> Ints:
    """Return those ops of a node that come before its formula, for which they were repeated.

    None where the formula's ops make nodes too: then backward builds a graph.
    """
    last = int(np.flatnonzero(np.diff(facts.seq[ops]) > 0)[-1]) + 1
    return ops[: last + 1] if last + 1 < len(ops) else ops[:0]


def _find_originals(facts: Facts, region: Ints, *, is_whole: bool) -> list[int]:
    """Return per repeated op the one in forward that it repeats, or -1.

    Args:
        facts: The run's tables.
        region: The repeated ops.
        is_whole: Whether the node that ran them stands for all of the function, and was made before
            its first op; a backward pass through what was repeated follows. Else it is one of the
            last ops' that needs what is repeated.
    """
    at = int(facts.find_forward_ops(region[:1])[0])
    if at < 0:
        return [-1] * len(region)
    if is_whole:
        return _follow(facts, region.tolist(), at, 1)
    return _follow(facts, region[::-1].tolist(), at, -1)[::-1]


def _follow(facts: Facts, ops: list[int], at: int, step: int) -> list[int]:
    """Return the originals of ops, looked for from one on in one direction."""
    found = []
    for op in ops:
        original = next(
            (
                other
                for other in range(at, at + _WINDOW * step, step)
                if 0 <= other < op and _are_alike(facts, op, other)
            ),
            -1,
        )
        at = original + step if original >= 0 else at
        found.append(original)
    return found


def _are_alike(facts: Facts, op: int, other: int) -> bool:
    """Return whether two ops do the same to tensors of the same shapes and dtypes."""
    if facts.code[op] != facts.code[other] or facts.thread[op] != facts.thread[other]:
        return False
    mine, others = facts.rows_out(op), facts.rows_out(other)
    return len(mine) == len(others) and all(
        facts.signature[a] == facts.signature[b] for a, b in zip(mine, others, strict=True)
    )
