"""KV caches and recurrent states: what inference keeps from one forward to the next."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts, Signature
from attnprof.attribution.flow import Flow
from attnprof.attribution.origins import Origin
from attnprof.attribution.paths import common_path, is_inside
from attnprof.attribution.phases import Timeline
from attnprof.attribution.products import CONVOLUTIONS, INDEXING, is_product
from attnprof.attribution.sharing import find_sharers
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
    forwards = _Forwards(facts, timeline)
    cache: dict[int, str] = {}
    latent: set[int] = set()
    originals = _find_originals(facts)
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
    state = _find_states(facts, flow, forwards, cache, originals)
    _follow_copies(facts, state)
    layers = sorted({call.layer for call in calls}, key=len)
    for storage in _find_growing(facts, state):
        around = [layer for layer in layers if f"{state[storage]}.".startswith(f"{layer}.")]
        cache[storage] = around[-1] if around else state[storage]
    _follow_copies(facts, cache)
    state = {storage: state[storage] for storage in state if storage not in cache}
    shared = find_sharers(facts, cache, state, (call.layer for call in calls))
    return Kept(cache, state, frozenset(latent), shared)


def _add_habitual(facts: Facts, forwards: "_Forwards", cache: dict[int, str]) -> None:
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


_COPYING = frozenset(
    {"cat", "stack", "index_select", "index", "gather", "repeat_interleave"}
    | {"clone", "contiguous", "copy_", "_to_copy"}
)


def _find_copying(facts: Facts) -> list[int]:
    """Return the ops outside of modules that copy: the program's own, not a layer's."""
    copies = np.array([name in _COPYING for name in facts.short_names], np.bool_)
    found: list[int] = np.flatnonzero(
        copies[facts.code] & (facts.scope < 0) & ~facts.is_backward
    ).tolist()
    return found


def _follow_copies(facts: Facts, kept: dict[int, str]) -> None:
    """Add what the program itself makes of kept storages: reordered, moved, stacked.

    Only ops outside of modules: beam search, offloading and Whisper's generate do it there.
    """
    if not kept:
        return
    for op in _find_copying(facts):
        layers = [kept[s] for r in facts.rows_in(op) if (s := int(facts.storage[r])) in kept]
        for row in facts.rows_out(op) if layers else ():
            kept.setdefault(int(facts.storage[row]), layers[0])


class _Forwards:
    """The outermost forwards that ran without gradients."""

    def __init__(self, facts: Facts, timeline: Timeline) -> None:
        off = ~timeline.forward_has_grad
        self.enter = timeline.forward_begin[off]
        self.leave = timeline.forward_exit[off]
        self._born_by = facts.born_by
        self._freed_at = np.append(facts.events["op"], np.iinfo(np.int64).max)[facts.freed_event]

    def number_of(self, op: int) -> int:
        """Return which forward an op ran in, or -1."""
        at = int(np.searchsorted(self.enter, op, "right")) - 1
        return at if at >= 0 and op < self.leave[at] else -1

    def begin_of(self, op: int) -> int:
        """Return where the forward began that an op ran in, or -1."""
        number = self.number_of(op)
        return int(self.enter[number]) if number >= 0 else -1

    def end_of(self, op: int) -> int:
        """Return where the forward ended that an op ran in, or -1."""
        number = self.number_of(op)
        return int(self.leave[number]) if number >= 0 else -1

    def is_from_before(self, storage: int, op: int) -> bool:
        """Return whether an earlier forward than the one of ``op`` made and left a storage."""
        made = self.number_of(int(self._born_by[storage]))
        return 0 <= made < self.number_of(op) and self.outlives(storage, int(self.leave[made]))

    def outlives(self, storage: int, leave: int) -> bool:
        """Return whether a storage was live when a forward had ended."""
        return bool(self._freed_at[storage] > leave)


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
            if projected or name in CONVOLUTIONS:  # what a convolution carries along is a state
                continue
            projected = True  # a latent: K and V are projected from what is kept
        elif op in call.seconds and call.kind != "fused":
            continue
        sources = list(facts.rows_in(op))
        if INDEXING.match(name):
            sources = [r for r in sources if facts.signature_of(r).dtype != "int32"]
        todo.extend((r, projected) for r in sources if is_own or not projected)
    return found


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


def _find_states(
    facts: Facts,
    flow: Flow,
    forwards: _Forwards,
    cache: dict[int, str],
    originals: Mapping[int, int],
) -> dict[int, str]:
    """Return storages that a layer writes in one forward and reads in the next."""
    if len(forwards.enter) < 2:
        return {}
    writers = _find_writers(facts, flow, forwards, cache)
    for copy, original in originals.items():
        if original in writers:
            writers[copy] = [*writers[original], *writers.get(copy, ())]
    rows = np.flatnonzero(facts.is_input & np.isin(facts.storage, list(writers)))
    confirmed: dict[int, str] = {}
    habits: set[tuple[int, int, str, int]] = set()
    for row in rows.tolist():
        storage, op = int(facts.storage[row]), int(facts.row_op[row])
        reading, module = forwards.number_of(op), int(facts.op_module[op])
        for written, writer in writers[storage]:
            if written < reading and facts.op_module[writer] == module:
                for kept in (storage, originals.get(storage, storage)):
                    confirmed[kept] = facts.module_paths[module]
                    habits.add(_habit(facts, kept, writer))
    # What the last forward wrote was never read, but the layer does this every time.
    for storage, writes in writers.items():
        for _, writer in writes:
            if _habit(facts, storage, writer) in habits:
                confirmed.setdefault(storage, facts.module_paths[facts.op_module[writer]])
    # Nor does a layer always write what it later appends to: at first it may keep an input of its.
    for storage, layer in list(confirmed.items()):
        begin = forwards.begin_of(int(facts.born_by[storage]))
        for source in _find_appended(facts, storage):
            if 0 <= facts.born_by[source] < begin and not facts.is_owned[source]:
                confirmed.setdefault(source, layer)
    return confirmed


def _find_appended(facts: Facts, storage: int) -> list[int]:
    """Return what a storage was concatenated from, if that is how it was made."""
    op = int(facts.born_by[storage])
    if op < 0 or facts.short_names[facts.code[op]] != "cat":
        return []
    return [int(facts.storage[row]) for row in facts.rows_in(op)]


def _find_growing(facts: Facts, state: Mapping[int, str]) -> set[int]:
    """Return those states that every forward makes longer and reads in full: they are caches.

    Keys that no second product reads are among them, such as those of an indexer that chooses
    tokens. Of a convolution's state, and of what waits to be compressed, only a slice is kept.
    """
    rows = np.flatnonzero(np.isin(facts.storage, list(state)))
    smallest = dict.fromkeys(state, np.iinfo(np.int64).max)
    for storage, numel in zip(
        facts.storage[rows].tolist(), facts.numel_of_rows(rows).tolist(), strict=True
    ):
        smallest[storage] = min(smallest[storage], numel)
    chain: dict[int, set[int]] = {}
    sliced: set[int] = set()
    for storage in sorted(state, key=lambda number: int(facts.born_by[number])):
        older = [source for source in _find_appended(facts, storage) if source in state]
        if not older:
            continue
        mine = chain.setdefault(older[0], {older[0]})
        mine.add(storage)
        chain[storage] = mine
        if smallest[storage] < facts.signature_of(int(facts.birth_row[storage])).numel:
            sliced |= mine
    return {storage for storage, mine in chain.items() if not mine & sliced}


def _habit(facts: Facts, storage: int, writer: int) -> tuple[int, int, str, int]:
    """Return module and operator that wrote a storage, and the dtype and rank it was made with."""
    row = int(facts.birth_row[storage])
    signature = facts.signature_of(row) if row >= 0 else Signature((), (), "", 0)
    module, code = int(facts.op_module[writer]), int(facts.code[writer])
    return module, code, signature.dtype, len(signature.shape)


def _is_grown(facts: Facts, row: int) -> bool:
    """Return whether the op of a row appends to, or writes into, the row's storage."""
    op = int(facts.row_op[row])
    storage = facts.storage[row]
    is_written = any(facts.storage[r] == storage for r in facts.rows_out(op))
    return facts.short_names[facts.code[op]] == "cat" or is_written


def _find_originals(facts: Facts) -> dict[int, int]:
    """Return what the program copied between forwards, each copy with its original.

    Beam search puts caches and states in another order like that; layers then read the copies.
    """
    found: dict[int, int] = {}
    for op in _find_copying(facts):
        sources = [int(facts.storage[row]) for row in facts.rows_in(op)]
        for row in facts.rows_out(op) if sources else ():
            if facts.born_by[facts.storage[row]] == op:
                found[int(facts.storage[row])] = found.get(sources[0], sources[0])
    return found


def _find_writers(
    facts: Facts, flow: Flow, forwards: _Forwards, cache: dict[int, str]
) -> dict[int, list[tuple[int, int]]]:
    """Return (forward, op) of each write to a storage that outlives the forward it was in."""
    rows = np.flatnonzero(~facts.is_input & (facts.op_module[facts.row_op] >= 0))
    ops = facts.row_op[rows]
    writes = (facts.born_by[facts.storage[rows]] == ops) | facts.mutates[facts.code[ops]]
    result: dict[int, list[tuple[int, int]]] = {}
    for row in rows[writes].tolist():
        storage, op = int(facts.storage[row]), int(facts.row_op[row])
        number = forwards.number_of(op)
        is_counter = facts.signature_of(row).dtype in ("int64", "int32", "bool")
        if number < 0 or storage in cache or facts.is_owned[storage] or is_counter:
            continue
        if flow.origin.get(row) is Origin.ACTIVATION and forwards.outlives(
            storage, int(forwards.leave[number])
        ):
            result.setdefault(storage, []).append((number, op))
    return result
