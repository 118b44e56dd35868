"""Outermost forwards without gradients: the steps of a decoding loop, and when each ended."""

from dataclasses import dataclass

import numpy as np

from attnprof.attribution.attribute import Attribution
from attnprof.attribution.phases import PHASES
from attnprof.store.schema import OUTERMOST


@dataclass(frozen=True, slots=True)
class Forward:
    """One outermost forward; events are places in the order of events, ops numbers of ops."""

    number: int
    """Its place among all outermost forwards of the run, from 0."""
    step: int
    phase: str
    enter_op: int
    exit_op: int
    """The first op after it."""
    enter_event: int
    exit_event: int
    """The first event after it."""
    settled_event: int
    """The first event after it and what was freed upon its return: what is live then, the program
    kept. A caller that binds the new cache to the old one's name lets go of the old one here."""
    batch: int | None = None
    """The first dimension of the data that enters it, where that is known."""


def find_forwards(attribution: Attribution) -> list[Forward]:
    """Return the outermost forwards that ran without gradients, in program order."""
    facts, timeline = attribution.facts, attribution.timeline
    outer = (facts.scopes["flags"] & OUTERMOST) != 0
    if int(outer.sum()) != len(timeline.forward_begin):  # a backward without any module
        return []
    order = np.argsort(facts.scopes["enter_op"][outer], kind="stable")
    # Frees between the return and the next op have the forward's number of ops, so that only
    # their time tells that they came later.
    times = np.maximum.accumulate(facts.events["time_ns"])
    enter = np.searchsorted(times, facts.scopes["enter_ns"][outer][order], "right")
    leave = np.searchsorted(times, facts.scopes["exit_ns"][outer][order], "right")
    births = np.append(facts.births, len(times))
    others = births[np.searchsorted(facts.births, leave, "left")]
    settled = np.minimum(
        others, np.searchsorted(facts.events["op"], timeline.forward_exit, "right")
    )
    settled = np.maximum(settled, leave)
    steps = timeline.step_of(timeline.forward_begin)
    return [
        Forward(
            number=number,
            step=int(steps[number]),
            phase=_name_phase(attribution, int(begin), int(end)),
            enter_op=int(begin),
            exit_op=int(end),
            enter_event=int(enter[number]),
            exit_event=int(leave[number]),
            settled_event=int(settled[number]),
            batch=next(iter(facts.first_input_shape(int(begin), int(end))), None),
        )
        for number, (begin, end) in enumerate(
            zip(timeline.forward_begin, timeline.forward_exit, strict=True)
        )
        if not timeline.forward_has_grad[number]
    ]


def _name_phase(attribution: Attribution, begin: int, end: int) -> str:
    """Return the phase that most ops of a forward are in."""
    phases = attribution.timeline.phase[begin:end]
    return PHASES[int(np.bincount(phases).argmax())].value if len(phases) else ""
