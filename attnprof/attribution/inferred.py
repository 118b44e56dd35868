"""What blocks are for, concluded from where they were asked for and how long they lived.

For runs that have the allocator's history and call stacks but no ops. The rules are those of
`attnprof.attribution.attribute` as far as they need no operands; everything is inferred.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnprof.attribution.facts import Bools, Ints
from attnprof.attribution.frames import Meaning
from attnprof.attribution.labels import CODE as CATEGORY
from attnprof.attribution.phases import CODE as PHASE
from attnprof.theory.workspace import find_cublas_workspace_bytes
from attnprof.vocabulary import Category, Phase

_UNKNOWN = -1
_CUBLAS_BYTES = [find_cublas_workspace_bytes(capability) for capability in ((8, 0), (9, 0))]
_PROFILER_WORDS = {
    "parameter": Category.PARAMETERS,
    "gradient": Category.GRADIENTS,
    "optimizer_state": Category.OPTIMIZER_STATE,
    "input": Category.INPUTS,
    "activation": Category.ACTIVATIONS,
    "temporary": Category.TEMPORARIES,
    "autograd_detail": Category.TEMPORARIES,
}
"""What ``torch.profiler`` calls its categories, which `_memory_viz.profile_plot` writes."""


@dataclass(frozen=True, slots=True)
class Allocations:
    """Blocks of one device in the order in which they were taken."""

    begin: Ints
    """The event that took the block."""
    end: Ints
    """The event that let go of it; -1 while it is live."""
    is_seed: Bools
    """Whether it was there before the history began."""
    meaning: Ints
    """Position in a list of meanings, or -1 for a block without a stack."""
    requested_bytes: Ints
    named: Ints
    """Code of the category that the recorder of the history gave it, or -1."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """Per block, what is concluded."""

    phase: Ints
    category: Ints
    saved: Bools
    exact: Bools


def infer(blocks: Allocations, meanings: Sequence[Meaning]) -> Inferred:
    """Return phase and category of each block.

    A thread without Python is autograd's, if the history has Python stacks at all: ops of a
    backward pass on CUDA run in threads of its own.
    """
    phase = _look_up([PHASE[m.phase] if m.phase else _UNKNOWN for m in meanings], blocks.meaning)
    if any(m.is_python for m in meanings):
        has_no_stack = (blocks.meaning < 0) & ~blocks.is_seed
        phase[has_no_stack] = PHASE[Phase.BACKWARD]
    at_end = _find_phases_at(blocks, phase)
    category, saved = _judge_lives(blocks, phase, at_end)
    category[_find_cublas_workspaces(blocks, phase)] = CATEGORY[Category.WORKSPACE]
    by_stack = _look_up(
        [CATEGORY[m.category] if m.category else _UNKNOWN for m in meanings], blocks.meaning
    )
    by_stack[blocks.is_seed] = CATEGORY[Category.PREEXISTING]
    for labels in (by_stack, blocks.named):
        category = np.where(labels >= 0, labels, category)
    phase[phase == _UNKNOWN] = PHASE[Phase.OUTSIDE]
    exact = category == CATEGORY[Category.PREEXISTING]
    return Inferred(phase, category, saved, exact)


def read_category(name: str | None) -> int:
    """Return the code of a category by its name, ours or torch.profiler's; -1 for other names."""
    if name is None:
        return _UNKNOWN
    if name in _PROFILER_WORDS:
        return CATEGORY[_PROFILER_WORDS[name]]
    return CATEGORY.get(Category(name), _UNKNOWN) if name in set(Category) else _UNKNOWN


def _look_up(words: list[int], positions: Ints) -> Ints:
    return np.append(np.array(words, np.int64), _UNKNOWN)[positions]


def _find_phases_at(blocks: Allocations, phase: Ints) -> Ints:
    """Return the phase in which each block ended: that of the newest block that has one."""
    known = np.flatnonzero(phase != _UNKNOWN)
    position = np.searchsorted(blocks.begin[known], blocks.end, "left") - 1
    at_end = np.append(phase[known], _UNKNOWN)[position]
    return np.where(blocks.end < 0, _UNKNOWN, at_end)


def _judge_lives(blocks: Allocations, phase: Ints, at_end: Ints) -> tuple[Ints, Bools]:
    forward, backward, recompute, optimizer = (
        PHASE[p] for p in (Phase.FORWARD, Phase.BACKWARD, Phase.RECOMPUTE, Phase.OPTIMIZER)
    )
    is_live = blocks.end < 0
    trains = bool((phase == backward).any())
    forwards = (phase == forward) | (phase == recompute)
    outlives = ~np.isin(at_end, [forward, recompute]) & (is_live | (at_end != _UNKNOWN))
    saved = forwards & outlives & trains
    ends_in_backward = len(phase) > 0 and _last(phase) == backward
    rules: list[tuple[Bools, Category]] = [
        (saved, Category.ACTIVATIONS),
        (forwards & ~is_live, Category.TEMPORARIES),
        ((phase == backward) & np.isin(at_end, [backward, recompute]), Category.TEMPORARIES),
        ((phase == backward) & is_live & ends_in_backward, Category.UNATTRIBUTED),
        (phase == backward, Category.GRADIENTS),
        ((phase == optimizer) & (at_end == optimizer), Category.TEMPORARIES),
        (phase == optimizer, Category.OPTIMIZER_STATE),
    ]
    category = np.full(len(phase), CATEGORY[Category.UNATTRIBUTED])
    for condition, name in reversed(rules):
        category[condition] = CATEGORY[name]
    return category, saved & (phase == forward)


def _find_cublas_workspaces(blocks: Allocations, phase: Ints) -> Ints:
    """Return the blocks that look like what cuBLAS keeps, one per thread that multiplies.

    Its size on recent GPUs, 32 MiB, is a common one for tensors too; a tensor of a training step
    would not outlive the optimizer.
    """
    optimized = np.flatnonzero(phase == PHASE[Phase.OPTIMIZER])
    last = int(optimized[-1]) if len(optimized) else -1
    kept = (blocks.end < 0) & ~blocks.is_seed & (phase != PHASE[Phase.OPTIMIZER])
    kept &= (np.arange(len(phase)) < last) & np.isin(blocks.requested_bytes, _CUBLAS_BYTES)
    in_backward = phase == PHASE[Phase.BACKWARD]
    firsts = [np.flatnonzero(kept & thread)[:1] for thread in (in_backward, ~in_backward)]
    return np.concatenate(firsts)


def _last(phase: Ints) -> int:
    known = phase[phase != _UNKNOWN]
    return int(known[-1]) if len(known) else _UNKNOWN
