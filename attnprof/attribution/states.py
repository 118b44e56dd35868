"""What a layer writes in one forward and reads in the next, without attention: states."""

from collections.abc import Mapping, Sequence

import numpy as np

from attnprof.attribution.facts import Facts, Signature
from attnprof.attribution.flow import Flow
from attnprof.attribution.forwards import Forwards
from attnprof.attribution.origins import Origin
from attnprof.attribution.paths import common_path, is_inside


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
        for row in find_appended(facts, storage):
            source = int(facts.storage[row])
            for kept in (source, originals.get(source, source)):
                if 0 <= facts.born_by[kept] < begin and not facts.is_owned[kept]:
                    confirmed.setdefault(kept, layer)
    return _hand_down(facts, confirmed)


def _hand_down(facts: Facts, layers: dict[int, str]) -> dict[int, str]:
    """Return the layers of states, where a module only keeps what one inside of it makes and reads.

    A model may copy what its layers return into the states that it hands them, for all of them.
    """
    rows = np.flatnonzero(np.isin(facts.storage, list(layers)))
    copied = rows[~facts.is_input[rows]]
    copied = copied[facts.are_written_in_place(copied)]
    writing = set(zip(facts.row_op[copied].tolist(), facts.storage[copied].tolist(), strict=True))
    modules: dict[int, set[int]] = {storage: set() for _, storage in writing}
    for op, storage in writing:
        for row in facts.rows_in(op):
            made = int(facts.producer_row[row])
            if facts.storage[row] != storage and made >= 0:
                modules[storage].add(int(facts.op_module[facts.row_op[made]]))
    for row in rows[facts.is_input[rows] & (facts.op_module[facts.row_op[rows]] >= 0)].tolist():
        storage, op = int(facts.storage[row]), int(facts.row_op[row])
        if modules.get(storage) and (op, storage) not in writing:
            modules[storage].add(int(facts.op_module[op]))
    result = dict(layers)
    for storage, found in modules.items():
        inner = common_path([facts.module_paths[module] for module in found])
        if found and is_inside(inner, layers[storage]):
            result[storage] = inner
    return result


def find_appended(facts: Facts, storage: int) -> Sequence[int]:
    """Return the rows of what a storage was concatenated from, if that is how it was made."""
    op = int(facts.born_by[storage])
    if op < 0 or facts.short_names[facts.code[op]] != "cat":
        return ()
    return facts.rows_in(op)


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
