"""KV caches and recurrent states: what inference keeps from one forward to the next."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.copies import find_copying, find_originals
from attnprof.attribution.facts import Facts
from attnprof.attribution.flow import Flow
from attnprof.attribution.forwards import Forwards
from attnprof.attribution.growing import find_growing
from attnprof.attribution.origins import Origin
from attnprof.attribution.paths import common_path, is_inside
from attnprof.attribution.phases import Timeline
from attnprof.attribution.products import INDEXING, factors, is_matrix_product, is_product
from attnprof.attribution.sharing import find_sharers
from attnprof.attribution.states import find_states
from attnprof.vocabulary import AttentionKind, Role

_APPENDING = re.compile(r"^(cat|index_copy|index_put|copy|slice_scatter|scatter|index_add|stack)")
"""Ops that put new tokens beside old ones; a cache behind a projection is made by one."""


@dataclass(frozen=True)
class Kept:
    """Storages that inference keeps, each with its layer."""

    cache: dict[int, str]
    state: dict[int, str]
    latent: frozenset[int] = frozenset()
    """Of the cache, what K and V are projected from anew for every call that attends."""
    shared: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """The layers of storages that several write into."""

    def layer_of(self, storage: int) -> str:
        """Return the layer of a storage; of several that share it, the module around them."""
        found = self.shared.get(storage)
        if found:
            return common_path([*found])
        return self.cache[storage] if storage in self.cache else self.state[storage]


def find_kept(facts: Facts, flow: Flow, timeline: Timeline, calls: list[AttentionCall]) -> Kept:
    """Find the storages that outlive the forward that made or filled them, with gradients off."""
    forwards = Forwards(facts, timeline)
    cache: dict[int, str] = {}
    latent: set[int] = set()
    originals = find_originals(facts)
    for call in calls:
        leave = forwards.end_of(call.ops[0])
        # Linear attention sums its keys and values up: what it carries is a state.
        if leave >= 0 and call.kind is not AttentionKind.LINEAR:
            begin = forwards.begin_of(call.ops[0])
            for storage, projected in _walk_keys(facts, flow, call, begin).items():
                original = originals.get(storage, storage)
                if (
                    forwards.outlives(storage, leave)
                    or forwards.is_from_before(original, call.ops[0])
                    or facts.born_by[storage] < 0  # older than the trace
                ):
                    cache.setdefault(original, call.layer)
                    cache.setdefault(storage, call.layer)
                    if projected:
                        latent.add(storage)
    _add_habitual(facts, forwards, cache)
    state = find_states(facts, flow, forwards, cache, originals)
    _follow_copies(facts, state)
    layers = sorted({call.layer for call in calls}, key=len)
    for storage in find_growing(facts, forwards, state, originals, calls):
        around = [layer for layer in layers if f"{state[storage]}.".startswith(f"{layer}.")]
        cache[storage] = around[-1] if around else state[storage]
    _follow_copies(facts, cache)
    state = {storage: state[storage] for storage in state if storage not in cache}
    shared = find_sharers(facts, cache, state, (call.layer for call in calls))
    return Kept(cache, state, frozenset(latent), shared)


def _add_habitual(facts: Facts, forwards: Forwards, cache: dict[int, str]) -> None:
    """Add what a layer made just as it made caches before, where nothing has read it yet.

    A cache that is quantised anew at every step is read in the next one; the last is not.
    """
    habits = {_habit_of(facts, storage): layer for storage, layer in cache.items()}
    habits.pop(None, None)
    if not habits:
        return
    modules = [habit[0] for habit in habits if habit is not None]
    born = np.flatnonzero((facts.born_by >= 0) & np.isin(facts.op_module[facts.born_by], modules))
    for storage in born.tolist():
        leave = forwards.end_of(int(facts.born_by[storage]))
        layer = habits.get(_habit_of(facts, storage)) if leave >= 0 else None
        if layer is not None and forwards.outlives(storage, leave):
            cache.setdefault(storage, layer)


def _habit_of(facts: Facts, storage: int) -> tuple[int, int, str, int] | None:
    """Return module, operator, dtype and rank with which a storage was made inside a module."""
    op, row = int(facts.born_by[storage]), int(facts.birth_row[storage])
    if op < 0 or facts.op_module[op] < 0:
        return None
    signature = facts.signature_of(row)
    return int(facts.op_module[op]), int(facts.code[op]), signature.dtype, len(signature.shape)


_CLEARING = frozenset({"zero_", "fill_"})


def starts_anew(facts: Facts, kept: Kept, since: int, begin: int, end: int) -> bool:
    """Return whether a forward finds nothing in the caches and states that it uses.

    They are made in it, or were made empty or cleared since the forward before it. Of what is older
    than the trace nobody saw what is in it: then it is decode if single tokens come in.

    Args:
        facts: The run's tables.
        kept: What inference keeps.
        since: The first op after the forward before it; -1 for the first one of the run.
        begin: Its first op.
        end: The first op after it.
    """
    rows = slice(int(facts.first_row[begin]), int(facts.first_row[end]))
    read = np.unique(facts.storage[rows][facts.is_input[rows]])
    older = read[facts.born_by[read] < begin].tolist()
    older = [s for s in older if s in kept.cache or s in kept.state]
    if since < 0 and facts.first_input_shape(begin, end)[1:2] != (1,):
        return True
    since = max(since, 0)
    cleared = {
        int(facts.storage[row])
        for op in range(since, begin)
        if facts.short_names[facts.code[op]] in _CLEARING
        for row in facts.rows_out(op)
    }
    return all(
        s in cleared or (facts.born_by[s] >= since and not len(facts.rows_in(facts.born_by[s])))
        for s in older
    )


def _follow_copies(facts: Facts, kept: dict[int, str]) -> None:
    """Add what the program itself makes of kept storages: reordered, moved, stacked.

    Only ops outside of modules: beam search, offloading and Whisper's generate do it there.
    """
    if not kept:
        return
    for op in find_copying(facts):
        layers = [kept[s] for r in facts.rows_in(op) if (s := int(facts.storage[r])) in kept]
        for row in facts.rows_out(op) if layers else ():
            kept.setdefault(int(facts.storage[row]), layers[0])


def _walk_keys(facts: Facts, flow: Flow, call: AttentionCall, begin: int) -> dict[int, bool]:
    """Return the storages that K and V of a call came from, and which a projection lies behind.

    What was made before op ``begin``, where the call's forward began, is not asked what it was
    made from in turn: that was an earlier call's to find.
    """
    found: dict[int, bool] = {}
    seen: set[int] = set()
    todo = [(row, False) for row in call.key_rows]
    while todo:
        row, projected = todo.pop()
        if row in seen or len(seen) > 2048:
            continue
        seen.add(row)
        storage = int(facts.storage[row])
        made = int(facts.producer_row[row]) if facts.is_input[row] else row
        if not _may_be_kept(facts, flow, row, made):
            continue
        if made < 0:
            if _is_grown(facts, row):
                found.setdefault(storage, projected)
            continue
        op = int(facts.row_op[made])
        path = facts.module_paths[facts.op_module[op]]
        is_own = is_inside(path, call.layer)
        name = facts.short_names[facts.code[op]]
        if not projected or (is_own and _APPENDING.match(name)):
            found.setdefault(storage, projected)
            projected = projected and not _APPENDING.match(name)
        if op < begin:
            continue
        if is_product(facts, op):
            if projected or not _projects(facts, flow, op):
                continue
            projected = True  # a latent: K and V are projected from what is kept
        elif op in call.seconds and call.kind != "fused":
            continue
        sources = list(facts.rows_in(op))
        if INDEXING.match(name):
            sources = [r for r in sources if facts.signature_of(r).dtype != "int32"]
        todo.extend((r, projected) for r in sources if is_own or not projected)
    return found


def _projects(facts: Facts, flow: Flow, op: int) -> bool:
    """Return whether a product projects what it takes in by a weight.

    What a convolution carries along is a state, and so is what keys are multiplied by, as where the
    delta rule takes from V what a state has of it.
    """
    if not is_matrix_product(facts, op):
        return False
    if flow.made_weights.are_read_by(op):
        return True
    return any(flow.origin_of_row(row) is not Origin.ACTIVATION for row in factors(facts, op))


def _may_be_kept(facts: Facts, flow: Flow, row: int, made: int) -> bool:
    """Return whether an operand on the way to K or V may hold tokens."""
    dtype = facts.signature_of(row).dtype
    if dtype == "int64":  # positions; no quantised cache is that wide
        return False
    if dtype == "int32" and made >= 0 and facts.op_module[facts.row_op[made]] < 0:
        return False  # positions too: what holds K and V is packed where they are made
    role = flow.role_of(int(facts.storage[row]))
    if role == Role.BUFFER:  # a cache that a module registered, if a forward writes into it
        op = facts.row_op[made]
        return made >= 0 and bool(facts.mutates[facts.code[op]] and facts.scope[op] >= 0)
    return role is None and flow.origin_of_row(row) is Origin.ACTIVATION


def _is_grown(facts: Facts, row: int) -> bool:
    """Return whether the op of a row appends to, or writes into, the row's storage."""
    op = int(facts.row_op[row])
    storage = facts.storage[row]
    is_written = any(facts.storage[r] == storage for r in facts.rows_out(op))
    return facts.short_names[facts.code[op]] == "cat" or is_written
