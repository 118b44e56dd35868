"""What the optimizer keeps, makes in passing, and forgets to free."""

import numpy as np

from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene, list_ranges
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.facts import Bools, Ints
from attnprof.store.schema import OPTIMIZER_END
from attnprof.units import format_bytes
from attnprof.vocabulary import Category, Phase

_BLOCK_ELEMENTS = 256
"""Elements that share a float32 scale in 8-bit optimizers (2048 in older releases):
https://github.com/bitsandbytes-foundation/bitsandbytes/releases/tag/0.44.0"""
_LEAST_ELEMENTS = 4096
"""Smaller tensors keep their states in 32 bits there."""


def fuse_optimizer(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Update parameters in one kernel, which makes nothing in passing."""
    passing = _find_passing(table)
    if not passing.any():
        raise DoesNotApply("no optimizer step was recorded that makes tensors in passing")
    largest = int(table.take(passing).replay().live_bytes.max())
    change = Change(
        title="A fused optimizer",
        evidence=f"optimizer steps hold up to {format_bytes(largest)} in passing",
        how="torch.optim.AdamW(parameters, fused=True), or foreach=False",
    )
    return table.drop(passing), change


def narrow_optimizer(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Keep optimizer states in 8 bits, with a scale per block of elements."""
    item_bytes = scene.item_bytes[table.block]
    elements = table.size_bytes // item_bytes
    wide = table.is_of(Category.OPTIMIZER_STATE) & (item_bytes == 4) & (elements >= _LEAST_ELEMENTS)
    if not wide.any():
        raise DoesNotApply(f"no float32 optimizer state has {_LEAST_ELEMENTS} elements or more")
    small = elements + 4 * -(-elements // _BLOCK_ELEMENTS)
    held = scene.say_share(scene.size_at_peak(Category.OPTIMIZER_STATE))
    change = Change(
        title="Optimizer states in 8 bits",
        evidence=f"optimizer states hold {held} of the peak",
        how='bitsandbytes.optim.AdamW8bit(parameters); in transformers: optim="adamw_bnb_8bit"',
        assumes=("every state of 4096 elements or more is kept in 8 bits",),
        exact=False,
    )
    return table.resize(wide, small).drop(_find_passing(table)), change


def _find_passing(table: Table) -> Bools:
    return table.is_in(Phase.OPTIMIZER) & table.is_of(Category.TEMPORARIES)


def free_gradients(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Free gradients once the optimizer has used them, instead of in or after the next forward.

    A gradient is gone from the end of an optimizer step until backward makes it anew.
    """
    facts = scene.facts
    marks = facts.stored.columns("marks")
    ends = np.unique(marks["op"][marks["kind"] == OPTIMIZER_END])
    enters = scene.attribution.timeline.forward_begin
    following = np.searchsorted(enters, ends, "left")
    ends, following = ends[following < len(enters)], following[following < len(enters)]
    used = table.at(scene.event_before(ends))
    entered = table.at(scene.event_before(enters[following]))
    gradients = np.flatnonzero(table.is_of(Category.GRADIENTS))
    # There when the step ended, and still there when the next forward began; by row, then by step.
    at, step = list_ranges(
        np.searchsorted(used, table.start[gradients], "right"),
        np.searchsorted(entered, table.end[gradients], "left"),
    )
    row = gradients[at]
    if not len(row):
        raise DoesNotApply("no gradient outlives its optimizer step into the next forward")
    begin = table.at(_find_next_writes(scene, table.storage[row], ends[step]))
    stop = table.end[row]
    again = np.flatnonzero(row[1:] == row[:-1])
    stop[again] = used[step[again + 1]]
    pieces = table.take(row).move(begin, stop)
    idle, earliest = np.unique(row, return_index=True)
    end = table.end.copy()
    end[idle] = used[step[earliest]]
    first = table.end_by(np.isin(np.arange(len(table)), idle), end)
    held = scene.say_share(scene.size_at_peak(Category.GRADIENTS))
    change = Change(
        title="Gradients freed after each optimizer step",
        evidence="gradients of the step before are still there when a forward begins; gradients "
        f"hold {held} of the peak",
        how="optimizer.zero_grad(set_to_none=True) right after optimizer.step()",
    )
    return first.add(pieces.take(pieces.end > pieces.start)), change


def _find_next_writes(scene: Scene, storage: Ints, op: Ints) -> Ints:
    """Return the event at which autograd next stores a gradient, or the end of the run.

    Args:
        scene: The run.
        storage: Storages of gradients.
        op: For each, from which op on.
    """
    facts = scene.facts
    rows = np.flatnonzero(~facts.is_input & (facts.node[facts.row_op] <= -2))
    span = facts.count + 1
    written = np.sort(facts.storage[rows].astype(np.int64) * span + facts.row_op[rows])
    wanted = storage.astype(np.int64) * span + op
    found = np.append(written, np.iinfo(np.int64).max)[np.searchsorted(written, wanted, "left")]
    is_same = found // span == storage
    return np.where(is_same, scene.event_before(found % span), len(facts.events["op"]))
