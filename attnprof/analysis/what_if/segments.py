"""Stretches of forward that belong together, and what each of them needs of its results."""

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from attnprof.analysis.what_if.scene import Scene
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.facts import Bools, Ints
from attnprof.store.schema import GRAD_ENABLED, OUTERMOST, RECOMPUTE
from attnprof.vocabulary import Status

_IN_LIST = re.compile(r"(?:(.*)\.)?\d+")


@dataclass(frozen=True, slots=True)
class Segments:
    """Module calls that do not overlap, in program order."""

    enter: Ints
    """The first op of each."""
    leave: Ints
    """The first op after each."""
    paths: list[str]
    """The module of each."""

    def of_op(self, op: Ints) -> Ints:
        """Return the segment that each op ran in, or -1."""
        if not len(self.enter):
            return np.full(len(op), -1, np.int64)
        at = np.searchsorted(self.enter, op, "right") - 1
        return np.where((at >= 0) & (op < self.leave[at]), at, -1)

    def take(self, which: Bools) -> "Segments":
        """Return some of the segments."""
        paths = [path for path, taken in zip(self.paths, which.tolist(), strict=True) if taken]
        return Segments(self.enter[which], self.leave[which], paths)


def find_blocks(scene: Scene) -> Segments:
    """Return the calls of a model's repeated blocks, with gradients on.

    Repeated blocks are modules of one class in one list (``h.0``, ``h.1``, …). Of lists within
    lists the outermost counts.
    """
    facts = scene.facts
    modules = facts.stored.table("modules")
    class_of = dict(
        zip(modules["module"].to_pylist(), modules["class_name"].to_pylist(), strict=True)
    )
    groups: dict[tuple[str, str], set[int]] = defaultdict(set)
    for number, class_name in class_of.items():
        path = facts.module_paths[number] if number < len(facts.module_paths) - 1 else ""
        if in_list := _IN_LIST.fullmatch(path):
            groups[in_list[1] or "", class_name].add(number)
    repeated = {number for group in groups.values() if len(group) > 1 for number in group}
    return _list_outermost(scene, repeated)


def find_forwards_without_backward(scene: Scene) -> Segments:
    """Return the outermost forwards that ran with gradients on and were never differentiated.

    Where the program died, its last forward is not among them: it had no time for its backward.
    """
    flags = scene.facts.scopes["flags"]
    chosen = (flags & OUTERMOST != 0) & (flags & GRAD_ENABLED != 0)
    segments = _make_segments(scene, chosen)
    first, _ = find_backwards(scene, segments)
    lacks = first < 0
    if scene.facts.stored.status is not Status.COMPLETED:
        lacks[-1:] = False
    return segments.take(lacks)


def find_backwards(scene: Scene, segments: Segments) -> tuple[Ints, Ints]:
    """Return per segment the first and the last op of its backward, or -1."""
    facts = scene.facts
    ops = np.flatnonzero(facts.is_backward & (facts.forward_op >= 0))
    of = segments.of_op(facts.forward_op[ops])
    first = np.full(len(segments.paths), facts.count, np.int64)
    last = np.full(len(segments.paths), -1, np.int64)
    np.minimum.at(first, of[of >= 0], ops[of >= 0])
    np.maximum.at(last, of[of >= 0], ops[of >= 0])
    return np.where(last >= 0, first, -1), last


def _list_outermost(scene: Scene, modules: set[int]) -> Segments:
    facts = scene.facts
    scopes = facts.scopes
    is_block = np.isin(scopes["module"], list(modules))
    inside: set[int] = set()
    chosen = np.zeros(len(is_block), np.bool_)
    parent = facts.parent_of_scope
    order = np.argsort(scopes["scope"], kind="stable")  # a parent is numbered before its children
    for at in order.tolist():
        scope = int(scopes["scope"][at])
        if parent[scope] in inside:
            inside.add(scope)
        elif is_block[at]:
            inside.add(scope)
            chosen[at] = True
    flags = scopes["flags"]
    return _make_segments(scene, chosen & (flags & GRAD_ENABLED != 0) & (flags & RECOMPUTE == 0))


def _make_segments(scene: Scene, chosen: Bools) -> Segments:
    """Return some module calls, but for those that overlap, as calls of several threads do."""
    facts = scene.facts
    at = np.flatnonzero(chosen & (facts.scopes["exit_op"] > facts.scopes["enter_op"]))
    at = at[np.argsort(facts.scopes["enter_op"][at], kind="stable")]
    segments = Segments(
        enter=facts.scopes["enter_op"][at].astype(np.int64),
        leave=facts.scopes["exit_op"][at].astype(np.int64),
        paths=[facts.module_paths[m] for m in facts.scopes["module"][at].tolist()],
    )
    overlaps = np.zeros(len(at), np.bool_)
    overlaps[1:] = segments.enter[1:] < np.maximum.accumulate(segments.leave)[:-1]
    overlaps[:-1] |= segments.leave[:-1] > segments.enter[1:]
    return segments.take(~overlaps)


def find_outputs(scene: Scene, segments: Segments) -> Bools:
    """Return per storage whether a forward op outside of the segment it was made in reads it."""
    facts = scene.facts
    made_in = _segment_of_storage(scene, segments)
    rows = np.flatnonzero(facts.is_input & (made_in[facts.storage] >= 0))
    ops = facts.row_op[rows]
    outside = ~facts.is_backward[ops] & (segments.of_op(ops) != made_in[facts.storage[rows]])
    result = np.zeros(facts.storage_count, np.bool_)
    result[facts.storage[rows[outside]]] = True
    return result


def find_ends_without_autograd(scene: Scene, table: Table, segments: Segments) -> Ints:
    """Return per block when it would be freed if autograd held nothing.

    That is when the module call that made it has returned and the last op of its segment has read
    it, whichever is later: until then the program holds it.
    """
    facts = scene.facts
    last_read = np.full(facts.storage_count, -1, np.int64)
    rows = np.flatnonzero(facts.is_input & ~facts.is_backward[facts.row_op])
    rows = rows[
        segments.of_op(facts.row_op[rows])
        == _segment_of_storage(scene, segments)[facts.storage[rows]]
    ]
    np.maximum.at(last_read, facts.storage[rows], facts.row_op[rows])
    made = facts.born_by[table.storage]
    read = np.where(last_read >= 0, scene.event_after(last_read), 0)[table.storage]
    return table.at(np.maximum(scene.event_of_return(made), read))


def _segment_of_storage(scene: Scene, segments: Segments) -> Ints:
    """Return per storage the segment it was made in, or -1."""
    return segments.of_op(scene.facts.born_by)
