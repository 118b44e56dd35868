"""Steps and phases: what the program was doing at each op."""

from dataclasses import dataclass

import numpy as np

from attnprof.attribution.facts import Bools, Facts, Ints
from attnprof.store.schema import (
    BACKWARD_BEGIN,
    GRAD_ENABLED,
    OPTIMIZER_BEGIN,
    OPTIMIZER_END,
    OUTERMOST,
    STEP,
)
from attnprof.vocabulary import Phase

PHASES = list(Phase)
"""Phases by code: `Timeline.phase` holds positions in this list."""
CODE = {phase: code for code, phase in enumerate(PHASES)}


@dataclass(frozen=True)
class Timeline:
    """Steps and phases of a run, per op.

    A step is what lies between two calls of ``tracer.step()``; without such calls, what lies
    between two forwards with an optimizer step between them; without an optimizer, a forward from
    outside and all that follows it.
    """

    step_begin: Ints
    """Per step, its first op; the first step begins at op 0."""
    phase: Ints
    """Per op, the code of its `Phase`."""
    forward_end: Ints
    """Ops at which a forward's saved tensors are settled: the first op after each forward."""
    forward_begin: Ints
    """Per entry of `forward_end`, the first op of that forward."""
    forward_exit: Ints
    """Per entry of `forward_end`, the first op after the outermost module returned."""
    forward_has_grad: Bools
    """Per entry of `forward_end`, whether gradients were enabled and autograd had to do with it."""
    settled_ns: Ints
    """Per entry of `forward_end`, the instant: what is live then, autograd (or the user) holds."""
    counted: Ints
    """Per step, its number among those that were only counted, or -1. Such a step has no ops: it
    begins where the next one does."""

    def step_of(self, op: Ints) -> Ints:
        """Return the step of each op number."""
        return np.searchsorted(self.step_begin, op, "right") - 1


def find_timeline(facts: Facts) -> Timeline:
    """Find the steps and the phase of every op."""
    marks = facts.stored.columns("marks")
    outer = (facts.scopes["flags"] & OUTERMOST) != 0
    order = np.argsort(facts.scopes["enter_op"][outer], kind="stable")
    enters: Ints = facts.scopes["enter_op"][outer][order]
    exits: Ints = facts.scopes["exit_op"][outer][order]
    grads: Bools = (facts.scopes["flags"][outer][order] & GRAD_ENABLED) != 0
    grads &= ~_made_no_nodes(facts, enters, exits)
    step_begin, counted = _insert_counted(
        _find_step_begins(facts.count, enters, marks), facts.stored.columns("counted_steps")
    )
    phase = np.full(facts.count, CODE[Phase.OUTSIDE], np.int64)
    phase[facts.scope >= 0] = CODE[Phase.FORWARD]
    _mark_losses(phase, facts, step_begin)
    phase[facts.is_backward] = CODE[Phase.BACKWARD]
    phase[facts.is_recompute] = CODE[Phase.RECOMPUTE]
    begins = marks["op"][marks["kind"] == OPTIMIZER_BEGIN]
    ends = marks["op"][marks["kind"] == OPTIMIZER_END]
    for begin, end in zip(begins, ends, strict=False):
        phase[begin:end] = CODE[Phase.OPTIMIZER]
    if not len(enters) and facts.is_backward.any():  # no modules at all, but a backward
        exits = np.flatnonzero(facts.is_backward)[:1]
        enters, grads = np.zeros(1, np.int64), np.ones(1, np.bool_)
    ends = _find_forward_ends(facts, phase, enters, exits)
    return Timeline(
        step_begin=step_begin,
        phase=phase,
        forward_end=ends,
        forward_begin=enters,
        forward_exit=exits,
        forward_has_grad=grads,
        settled_ns=_find_settled_times(facts, ends, exits, marks),
        counted=counted,
    )


def _made_no_nodes(facts: Facts, enters: Ints, exits: Ints) -> Bools:
    """Return which forwards left autograd nothing: no parameter of theirs asks for gradients.

    Autograd numbers its nodes per thread, and none was made if the number is what it was. An op
    shows its own node too, the last node may show in the next op only.
    """
    result = np.zeros(len(enters), np.bool_)
    if not len(facts.seq):
        return result
    for thread in np.unique(facts.thread):
        ops = np.flatnonzero(facts.thread == thread)
        first, after = np.searchsorted(ops, enters), np.searchsorted(ops, exits)
        known = np.flatnonzero((after < len(ops)) & (after - first > 1))
        known = known[facts.thread[enters[known]] == thread]
        before = ops[np.maximum(first[known] - 1, 0)]
        result[known] = facts.seq[before] == facts.seq[ops[after[known]]]
    return result


def _find_step_begins(count: int, enters: Ints, marks: dict[str, Ints]) -> Ints:
    explicit = marks["op"][marks["kind"] == STEP]
    if len(explicit):
        begins = explicit[explicit < count]
    else:
        ends = marks["op"][marks["kind"] == OPTIMIZER_END]
        if len(ends):
            # The first forward after each optimizer step; several optimizers in a row share one.
            at = np.searchsorted(enters, np.unique(ends), "left")
            begins = enters[at[at < len(enters)]]
        else:
            begins = enters[1:]
    return np.unique(np.concatenate([[0], begins])).astype(np.int64)


def _insert_counted(begins: Ints, rows: dict[str, Ints]) -> tuple[Ints, Ints]:
    """Return the first op of every step, with those that were only counted, and `Timeline.counted`.

    Args:
        begins: The first ops of steps whose ops were recorded.
        rows: The table ``counted_steps``.
    """
    numbers, first = np.unique(rows["step"], return_index=True)
    op = np.concatenate([rows["op"][first], begins]).astype(np.int64)
    counted = np.concatenate([numbers, np.full(len(begins), -1)]).astype(np.int64)
    order = np.argsort(op, kind="stable")  # counted ones before the step that ended their stretch
    return op[order], counted[order]


def _mark_losses(phase: Ints, facts: Facts, step_begin: Ints) -> None:
    """Count ops outside of modules that lead to a backward pass, such as a loss, as forward."""
    outside = np.flatnonzero((facts.scope < 0) & ~facts.is_backward)
    backward = np.flatnonzero(facts.is_backward)
    inside = np.flatnonzero(facts.scope >= 0)
    if not len(outside) or not len(backward):
        return
    step = np.searchsorted(step_begin, outside, "right") - 1
    end = np.append(step_begin[1:], facts.count)[step]
    following = np.append(backward, facts.count)[np.searchsorted(backward, outside)]
    before = np.insert(inside, 0, -1)[np.searchsorted(inside, outside)]
    after = np.append(inside, facts.count)[np.searchsorted(inside, outside)]
    leads = (following < end) & (before >= step_begin[step]) & (following < after)
    if not len(inside):
        leads = following < end
    phase[outside[leads]] = CODE[Phase.FORWARD]


def _find_forward_ends(facts: Facts, phase: Ints, enters: Ints, exits: Ints) -> Ints:
    """Return for each outermost forward the op at which what it saved is settled.

    That is where backward begins, if nothing but a loss lies between; else where it returned.
    """
    backward = np.flatnonzero(phase == CODE[Phase.BACKWARD])
    following = np.append(backward, facts.count)[np.searchsorted(backward, exits)]
    next_enter = np.append(enters, facts.count)
    next_enter = next_enter[np.searchsorted(enters, exits, "left")]
    return np.where((following < facts.count) & (following <= next_enter), following, exits)


def _find_settled_times(facts: Facts, ends: Ints, exits: Ints, marks: dict[str, Ints]) -> Ints:
    """Return when each forward was over: the beginning of backward, else its last op."""
    if not facts.count:
        return np.zeros(len(ends), np.int64)
    last_op: Ints = facts.time_ns[np.maximum(ends - 1, 0)]
    begins = marks["kind"] == BACKWARD_BEGIN
    mark_op, mark_ns = marks["op"][begins], marks["time_ns"][begins]
    at = np.searchsorted(mark_op, exits, "left")
    found = np.minimum(at, len(mark_op) - 1)
    if not len(mark_op):
        return last_op
    ok = (at < len(mark_op)) & (mark_op[found] <= ends)
    return np.where(ok, mark_ns[found], last_op)
