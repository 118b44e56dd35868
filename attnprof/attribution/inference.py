"""Which forwards of inference are prefill, and which are decode."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from attnprof.attribution.cache import Kept, starts_anew
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts
from attnprof.attribution.phases import CODE as PHASE
from attnprof.attribution.phases import Timeline
from attnprof.vocabulary import Phase

_TRACING = 0
"""Number of the thread that opened the trace."""


@dataclass(frozen=True, slots=True)
class _Forward:
    """A forward without gradients that fills a cache or a state, or extends one."""

    ops: slice
    extends: bool
    """Whether there was something in it before."""
    follows: bool
    """Whether nobody asked a forward of the prefill before it for an answer."""
    has_one: bool
    """Whether it is given a single token."""


def name_inference_phases(
    facts: Facts, timeline: Timeline, calls: list[AttentionCall], kept: Kept
) -> None:
    """Call forwards that fill a cache prefill, and those that extend it decode.

    A forward that extends a cache belongs to the prefill still, if nobody has asked the one before
    it for an answer: a long prompt is put in chunk by chunk. The last chunk may be a single token;
    one single token after the other is decode all the same, as of a benchmark that makes them up.
    """
    forwards = _find_forwards(facts, timeline, calls, kept)
    is_single = [each.extends and each.follows and each.has_one for each in forwards]
    for number, forward in enumerate(forwards):
        around = is_single[max(number - 1, 0) : number] + is_single[number + 1 : number + 2]
        is_one_of_many = is_single[number] and any(around)
        is_decode = forward.extends and (is_one_of_many or not forward.follows)
        span = timeline.phase[forward.ops]
        span[span == PHASE[Phase.FORWARD]] = PHASE[Phase.DECODE if is_decode else Phase.PREFILL]


def _find_forwards(
    facts: Facts, timeline: Timeline, calls: list[AttentionCall], kept: Kept
) -> list[_Forward]:
    """Return the forwards that use a cache or a state, in program order."""
    keeping = set(kept.cache.values()) | set(kept.state.values())
    if not keeping:
        return []
    first_ops = [call.ops[0] for call in calls]  # ascending
    found: list[_Forward] = []
    prefill: slice | None = None
    for begin, end, grad in zip(
        timeline.forward_begin.tolist(),
        timeline.forward_exit.tolist(),
        timeline.forward_has_grad.tolist(),
        strict=True,
    ):
        own = calls[bisect_left(first_ops, begin) : bisect_left(first_ops, end)]
        inside = [call for call in own if call.layer in keeping]
        modules = np.unique(facts.op_module[begin:end]).tolist()
        if grad or not (inside or any(facts.module_paths[m] in keeping for m in modules)):
            continue
        counted = [call for call in inside if call.k_len]  # linear attention has no lengths
        since = found[-1].ops.stop if found else -1
        extends = any(c.q_len < c.k_len for c in counted) or not counted
        extends = extends and not starts_anew(facts, kept, since, begin, end)
        follows = prefill is not None and not _reads_results(facts, kept, prefill, end)
        has_one = facts.first_input_shape(begin, end)[1:2] == (1,)
        if counted:
            has_one = all(call.q_len == 1 for call in counted)
        found.append(_Forward(slice(begin, end), extends, follows, has_one))
        prefill = None if extends and not follows else slice(begin, end)
    return found


def _reads_results(facts: Facts, kept: Kept, forward: slice, end: int) -> bool:
    """Return whether an op between a forward and ``end`` reads what it made, but for its cache."""
    begin, leave = forward.start, forward.stop
    if facts.thread[begin] != _TRACING:  # what it does outside of modules is not seen
        return True
    rows = slice(int(facts.first_row[leave]), int(facts.first_row[end]))
    read = np.unique(facts.storage[rows][facts.is_input[rows]])
    made = read[(facts.born_by[read] >= begin) & (facts.born_by[read] < leave)]
    return any(s not in kept.cache and s not in kept.state for s in made.tolist())
