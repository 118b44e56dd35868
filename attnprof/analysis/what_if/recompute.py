"""Keeping fewer activations: gradient checkpointing, and no gradients at all."""

from collections.abc import Sequence

import numpy as np

from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene, count_words
from attnprof.analysis.what_if.segments import (
    Segments,
    find_backwards,
    find_blocks,
    find_ends_without_autograd,
    find_forwards_without_backward,
    find_outputs,
)
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.facts import Bools, Ints
from attnprof.vocabulary import Category, Phase

_OWNED = (
    Category.PARAMETERS,
    Category.BUFFERS,
    Category.GRADIENTS,
    Category.OPTIMIZER_STATE,
)


def checkpoint_blocks(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Checkpoint every repeated block: keep its input, repeat its forward in backward.

    - What a block's forward makes dies when the program has done with it, but for what later
      forwards read: the block's output.
    - Just before the block's backward its forward happens again: temporaries live and die as they
      did, and what backward needs stays until it has been used. As torch does, the repetition
      stops at the last op that saves something.
    - The block's inputs are held until its backward is over.

    Known limitations:
        It is ``use_reentrant=False`` that is replayed; the other way accumulates gradients in
        another order. A local variable is taken to live until the module call that made its value
        returns. The random state that is kept per block (5 KB on the CPU) is not counted.
    """
    if scene.facts.is_recompute.any():
        raise DoesNotApply("forwards are repeated in backward already")
    if not scene.facts.is_backward.any():
        raise DoesNotApply("no backward was recorded")
    blocks = find_blocks(scene)
    first, last = find_backwards(scene, blocks)
    differentiated = last >= 0
    if not differentiated.any():
        raise DoesNotApply("no modules of one class in a list were differentiated")
    blocks = blocks.take(differentiated)
    first, last = first[differentiated], last[differentiated]
    paths = tuple(dict.fromkeys(blocks.paths))
    kept = _find_saved(scene, scene.table, blocks)
    held = scene.size_of_held(scene.table, kept)
    change = Change(
        title="Gradient checkpointing",
        evidence=f"activations saved inside {count_words(len(paths), 'block')} "
        f"({_name_some(paths)}) hold {scene.say_share(held)} of the peak",
        how="torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) around each block; "
        "in transformers: model.activation_checkpointing_enable(), gradient_checkpointing_enable() "
        "in older releases. It costs one more forward",
        layers=paths,
        assumes=("every block's forward is repeated as it ran",),
    )
    return _repeat_forwards(scene, table, blocks, first, last), change


def free_activations(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Turn gradients off in forwards that no backward follows.

    What autograd alone held dies when the program has done with it.
    """
    forwards = find_forwards_without_backward(scene)
    if not forwards.paths:
        raise DoesNotApply("every forward with gradients on was followed by its backward")
    saved = _find_saved(scene, table, forwards)
    ends = find_ends_without_autograd(scene, table, forwards)
    held = scene.size_of_held(table, saved)
    change = Change(
        title="No gradients where no backward follows",
        evidence=f"{count_words(len(forwards.paths), 'forward')} with gradients on had no "
        f"backward: autograd held {scene.say_share(held)} of the peak",
        how="torch.inference_mode() or torch.no_grad() around the forward",
        exact=False,
    )
    return table.end_by(saved, ends), change


def _name_some(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"


def _find_saved(scene: Scene, table: Table, segments: Segments) -> Bools:
    """Return which blocks a segment made and autograd alone kept when it had ended."""
    segment = segments.of_op(scene.facts.born_by[table.storage])
    outlives = (segment >= 0) & (table.end > _find_leaves(scene, table, segments)[segment])
    return outlives & ~find_outputs(scene, segments)[table.storage] & ~table.is_of(*_OWNED)


def _find_leaves(scene: Scene, table: Table, segments: Segments) -> Ints:
    """Return where each segment ends; one more entry for what is in none."""
    return np.append(table.at(scene.event_before(segments.leave)), 0)


def _repeat_forwards(
    scene: Scene, table: Table, blocks: Segments, first: Ints, last: Ints
) -> Table:
    """Return the table with blocks checkpointed, given the first and last ops of their backward."""
    saved = _find_saved(scene, table, blocks)
    again = _repeat(scene, table, blocks, saved, scene.first_birth(first))
    ends = find_ends_without_autograd(scene, table, blocks)
    return _hold_inputs(scene, table, blocks, last).end_by(saved, ends).add(again)


def _repeat(scene: Scene, table: Table, blocks: Segments, saved: Bools, begin: Ints) -> Table:
    """Return what the repeated forwards make.

    Args:
        scene: The run.
        table: Its blocks.
        blocks: The segments that are repeated.
        saved: Which blocks of the table their backward needs.
        begin: Per segment, the event before which it is repeated.
    """
    which = np.flatnonzero(_find_repeated(scene, table, blocks, saved))
    copies, is_needed = table.take(which), saved[which]
    of = blocks.of_op(scene.facts.born_by[copies.storage])
    entered, resumes = scene.event_before(blocks.enter)[of], table.at(begin)[of]
    start = table.before(begin[of], copies.start // table.span - entered)
    died = table.before(begin[of], copies.end // table.span - entered)
    is_passing = copies.end < _find_leaves(scene, table, blocks)[of]
    end = np.where(is_needed, copies.end, np.where(is_passing, died, resumes))
    # What was saved but is gone when backward begins has no reason to be made again.
    again = copies.move(start, end).take((end > start) & (~is_needed | (end > resumes)))
    return again.relabel(np.ones(len(again), np.bool_), phase=Phase.RECOMPUTE)


def _find_repeated(scene: Scene, table: Table, blocks: Segments, saved: Bools) -> Bools:
    """Return which blocks of the table are made again: up to the last op that saves something.

    An op's operands are saved before it runs, which then it need not; its results after.
    """
    facts = scene.facts
    made = facts.born_by[table.storage]
    is_saved = np.zeros(facts.storage_count, np.bool_)
    is_saved[table.storage[saved]] = True
    rows = np.flatnonzero(is_saved[facts.storage] & ~facts.is_backward[facts.row_op])
    ops = facts.row_op[rows]
    of = blocks.of_op(ops)
    stops = np.full(len(blocks.paths) + 1, -1, np.int64)
    np.maximum.at(stops, of[of >= 0], ops[of >= 0])
    saves_results = np.isin(stops, made[saved])
    segment = blocks.of_op(made)
    is_last = (made == stops[segment]) & saves_results[segment]
    result: Bools = (segment >= 0) & ((made < stops[segment]) | is_last) & ~table.is_of(*_OWNED)
    return result


def _hold_inputs(scene: Scene, table: Table, blocks: Segments, last: Ints) -> Table:
    """Keep what a block reads from outside until its backward is over."""
    facts = scene.facts
    rows = np.flatnonzero(facts.is_input & ~facts.is_backward[facts.row_op])
    reader = blocks.of_op(facts.row_op[rows])
    outside = (reader >= 0) & (blocks.of_op(facts.born_by)[facts.storage[rows]] != reader)
    until = np.zeros(facts.storage_count, np.int64)
    over = table.at(scene.event_after(last))
    np.maximum.at(until, facts.storage[rows[outside]], over[reader[outside]])
    until = until[table.storage]
    return table.hold_until((until > 0) & ~table.is_of(*_OWNED), until)
