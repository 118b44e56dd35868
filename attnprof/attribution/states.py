"""What a layer writes in one forward and reads in the next, without attention: states."""

from collections.abc import Mapping

import numpy as np

from attnprof.attribution.facts import Facts, Signature
from attnprof.attribution.flow import Flow
from attnprof.attribution.forwards import Forwards
from attnprof.attribution.origins import Origin


def find_states(
    facts: Facts,
    flow: Flow,
    forwards: Forwards,
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
        for source in find_appended(facts, storage):
            if 0 <= facts.born_by[source] < begin and not facts.is_owned[source]:
                confirmed.setdefault(source, layer)
    return confirmed


def find_appended(facts: Facts, storage: int) -> list[int]:
    """Return what a storage was concatenated from, if that is how it was made."""
    op = int(facts.born_by[storage])
    if op < 0 or facts.short_names[facts.code[op]] != "cat":
        return []
    return [int(facts.storage[row]) for row in facts.rows_in(op)]


def _habit(facts: Facts, storage: int, writer: int) -> tuple[int, int, str, int]:
    """Return module and operator that wrote a storage, and the dtype and rank it was made with."""
    row = int(facts.birth_row[storage])
    signature = facts.signature_of(row) if row >= 0 else Signature((), (), "", 0)
    module, code = int(facts.op_module[writer]), int(facts.code[writer])
    return module, code, signature.dtype, len(signature.shape)


def _find_writers(
    facts: Facts, flow: Flow, forwards: Forwards, cache: dict[int, str]
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
