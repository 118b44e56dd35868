"""Which states are caches: those that forwards add tokens to, as to an indexer's keys."""

from collections.abc import Mapping, Sequence

import numpy as np

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts, Ints, Signature
from attnprof.attribution.forwards import Forwards
from attnprof.attribution.paths import is_inside
from attnprof.attribution.products import INTEGERS
from attnprof.attribution.states import find_appended


def find_growing(
    facts: Facts,
    forwards: Forwards,
    state: Mapping[int, str],
    originals: Mapping[int, int],
    calls: Sequence[AttentionCall],
) -> set[int]:
    """Return those states that hold tokens, such as the keys by which an indexer chooses some.

    Args:
        facts: The run's tables.
        forwards: The forwards without gradients.
        state: The storages of states, each with the module that writes it.
        originals: What the program copied between forwards, each copy with its original.
        calls: The attention calls.
    """
    grown = _find_concatenated(facts, state, originals)
    return grown | _find_filled(facts, forwards, state, originals, calls)


def _find_concatenated(
    facts: Facts, state: Mapping[int, str], originals: Mapping[int, int]
) -> set[int]:
    """Return those states that every forward makes longer and reads in full.

    Of a convolution's state, and of what waits to be compressed, a layer keeps only a slice. Where
    the program takes one itself, to take tokens back, more is left than there was before them.
    """
    rows = np.flatnonzero(~facts.is_input & np.isin(facts.storage, list(state)))
    is_inside = facts.op_module[facts.row_op[rows]] >= 0
    kept_inside = _find_smallest(facts, rows[is_inside])
    kept_outside = _find_smallest(facts, rows[~is_inside])
    chain: dict[int, set[int]] = {}
    sliced: set[int] = set()
    for storage in sorted(state, key=lambda number: int(facts.born_by[number])):
        older = [r for r in find_appended(facts, storage) if int(facts.storage[r]) in state]
        if not older:
            continue
        source, size = int(facts.storage[older[0]]), facts.signature_of(older[0]).numel
        mine = chain.setdefault(source, {source, originals.get(source, source)})
        mine.add(storage)
        chain[storage] = mine
        whole = facts.signature_of(int(facts.birth_row[storage])).numel
        if kept_inside[storage] < whole or kept_outside.get(storage, whole) <= size:
            sliced |= mine
    return {storage for mine in chain.values() for storage in mine - sliced if storage in state}


def _find_smallest(facts: Facts, rows: Ints) -> dict[int, int]:
    """Return per storage the elements of the smallest of the tensors in some operand rows."""
    smallest: dict[int, int] = {}
    sizes = facts.numel_of_rows(rows).tolist()
    for storage, numel in zip(facts.storage[rows].tolist(), sizes, strict=True):
        smallest[storage] = min(smallest.get(storage, numel), numel)
    return smallest


def _find_filled(
    facts: Facts,
    forwards: Forwards,
    state: Mapping[int, str],
    originals: Mapping[int, int],
    calls: Sequence[AttentionCall],
) -> set[int]:
    """Return rooms to which every forward adds as many slots as its layer has queries.

    Those have to differ between forwards, as of a prompt and of a token: a pool of states has a
    slot for each sequence, whatever its length.
    """
    queries: dict[int, set[tuple[str, int]]] = {}
    for call in calls:
        queries.setdefault(forwards.number_of(call.ops[0]), set()).add((call.layer, call.q_len))
    found: dict[int, set[int]] = {}
    others = set[int]()
    for storage, op, slots in _list_additions(facts, state):
        room, module = originals.get(storage, storage), facts.module_paths[facts.op_module[op]]
        own = queries.get(forwards.number_of(op), set())
        if any(slots == length and is_inside(module, layer) for layer, length in own):
            found.setdefault(room, set()).add(slots)
        else:
            others.add(room)
    rooms = {room for room, lengths in found.items() if len(lengths) > 1} - others
    return {storage for storage in state if originals.get(storage, storage) in rooms}


def _list_additions(facts: Facts, state: Mapping[int, str]) -> list[tuple[int, int, int]]:
    """Return (storage, op, slots) of what modules write into states in place.

    Slots are 0 for what fills all of a state anew; clearing adds nothing.
    """
    rows = np.flatnonzero(np.isin(facts.storage, list(state)))
    storages, first = np.unique(facts.storage[rows], return_index=True)
    wholes = dict(zip(storages.tolist(), rows[first].tolist(), strict=True))
    rows = rows[~facts.is_input[rows]]
    rows = rows[facts.are_written_in_place(rows) & (facts.op_module[facts.row_op[rows]] >= 0)]
    found: list[tuple[int, int, int]] = []
    for row in rows.tolist():
        storage, op = int(facts.storage[row]), int(facts.row_op[row])
        beside = (r for r in facts.rows_in(op) if facts.storage[r] != storage)
        parts = [facts.signature_of(r) for r in beside]
        parts = [part for part in parts if part.dtype not in INTEGERS]
        if parts:
            whole = facts.signature_of(wholes[storage])
            found.append((storage, op, count_slots(whole, facts.signature_of(row), *parts)))
    return found


def count_slots(whole: Signature, *parts: Signature) -> int:
    """Return how many slots of a storage an op writes to, such as tokens.

    That is the length of the first part that is shorter in one dimension; 0 without any.
    """
    for part in parts:
        if len(part.shape) == len(whole.shape):
            sizes = zip(part.shape, whole.shape, strict=True)
            shorter = [size for size, most in sizes if size != most]
            if len(shorter) == 1:
                return shorter[0]
    return 0
