"""Scans: loops in a module that carry a state from token to token, as RWKV's and Mamba's do.

A scan has neither scores nor a second product to be known by. What shows it is the loop: the same
ops once per token, each time with the next token's slice of the same tensors, and among them ops
that depend on what they themselves made for the token before. Those hold the state. A cell whose
state also comes back through a product with a parameter (an LSTM, a GRU, with gates besides) is
none: it is an ordinary recurrent network, no way around attention.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from attnprof.attribution.axes import TOKEN
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Bools, Facts, Ints
from attnprof.attribution.flow import Flow
from attnprof.attribution.origins import Origin
from attnprof.attribution.products import OVERWRITING, factors, is_matrix_product, is_product

_CELL = re.compile(r"(^|_)(rnn|lstm|gru)")
"""Ops that are a recurrent cell, or a whole network of them."""
_FEWEST_TOKENS = 4
"""So many times a loop has to run to be told from code that is written out."""
_LONGEST_BODY = 256
"""Ops that are looked through, at most, for what one token passes on to the next."""


def find_scans(
    facts: Facts, flow: Flow, is_forward: Bools, calls: Iterable[AttentionCall]
) -> dict[int, str]:
    """Return the storages that hold the states of scans, with their layers.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        is_forward: Per op, whether it computes rather than differentiates or updates.
        calls: The attention calls. Where one goes from key to key, it adds values up, and carries
            no state.
    """
    adding = {op for call in calls for op in call.seconds if not is_product(facts, op)}
    carried: dict[int, str] = {}
    seen: set[int] = set()
    places_of: dict[tuple[int, bytes], set[int]] = {}  # a module's loop is the same in every step
    for begins in _find_loops(facts, flow, is_forward):
        scope, module = int(facts.scope[begins[0]]), int(facts.op_module[begins[0]])
        if scope in seen or not adding.isdisjoint(range(begins[1], begins[2])):
            continue
        key = module, facts.code[begins[1] : begins[2]].tobytes()
        if key not in places_of:
            places_of[key] = _find_carrying(facts, flow, begins)
        if places_of[key]:
            seen.add(scope)
            for storage in _list_written(facts, begins, places_of[key]):
                carried[storage] = facts.module_paths[module]
    return carried


def find_networks(facts: Facts, states: Mapping[int, str]) -> set[str]:
    """Return the layers of ordinary recurrent networks among those that keep a state.

    Args:
        facts: The run's tables.
        states: The storages that inference keeps from one forward to the next, with their layers.
    """
    rows = np.flatnonzero(facts.is_input & np.isin(facts.storage, list(states)))
    return {
        states[int(facts.storage[row])] for row in rows.tolist() if _is_read_by_network(facts, row)
    }


def _is_read_by_network(facts: Facts, row: int) -> bool:
    """Return whether an op is a whole recurrent cell, or multiplies a state by a parameter."""
    op = int(facts.row_op[row])
    return bool(_CELL.search(facts.short_names[facts.code[op]])) or (
        is_matrix_product(facts, op)
        and any(facts.is_owned[facts.storage[r]] for r in factors(facts, op) if r != row)
    )


def _find_loops(facts: Facts, flow: Flow, is_forward: Bools) -> Iterator[list[int]]:
    """Yield the ops that take one slice per token of the same tensor, in the same module call."""
    rows = np.flatnonzero(facts.is_input & (facts.producer_row >= 0))
    ops = facts.row_op[rows]
    is_slice = facts.numel_of_rows(rows) < facts.numel_of_rows(facts.producer_row[rows])
    rows = rows[is_slice & is_forward[ops] & (facts.scope[ops] >= 0)]
    for group in _group_alike(facts, rows):
        tokens = _count_tokens(facts, flow, int(rows[group[0]]))
        begins = facts.row_op[rows[group]]
        if tokens >= _FEWEST_TOKENS and len(group) % tokens == 0:
            yield begins[:: len(group) // tokens].tolist()


def _group_alike(facts: Facts, rows: Ints) -> Iterator[Ints]:
    """Yield positions of rows that read one tensor, alike, in one module call, by rising ops."""
    ops = facts.row_op[rows]
    writers = facts.producer_row[rows]
    alike = np.stack([facts.scope[ops], writers, facts.code[ops], facts.signature[rows]])
    order = np.lexsort(alike)  # stable: ops rise
    changes = np.flatnonzero((np.diff(alike[:, order]) != 0).any(axis=0)) + 1
    borders = np.concatenate([[0], changes, [len(rows)]])
    for group in np.flatnonzero(np.diff(borders) >= _FEWEST_TOKENS).tolist():
        yield order[borders[group] : borders[group + 1]]


def _count_tokens(facts: Facts, flow: Flow, row: int) -> int:
    """Return how many slices along the tokens a tensor has that is read slice by slice; 0 if none.

    A slice may leave out features too: those of K, where Q, K and V were projected as one.
    """
    writer = int(facts.producer_row[row])
    bits = flow.bits.get(writer)
    if bits is None:
        return 0
    held = _count_in(facts, writer, bits)
    read = _count_in(facts, row, flow.bits_of_input(row))
    return held // read if held % read == 0 else 0


def _count_in(facts: Facts, row: int, bits: tuple[int, ...]) -> int:
    sizes = facts.signature_of(row).shape
    return int(np.prod([s for s, b in zip(sizes, bits, strict=True) if b & TOKEN], dtype=np.int64))


def _find_carrying(facts: Facts, flow: Flow, begins: list[int]) -> set[int]:
    """Return which ops of a loop's body depend on what they made one round before.

    Counted from the op that each round begins with. The second round is looked at, and the third:
    the first may begin with a state that nothing made.
    """
    begin, end = begins[1], begins[2]
    body = end - begin
    is_same = body <= _LONGEST_BODY and end + body <= facts.count
    if not is_same or (facts.code[begin:end] != facts.code[end : end + body]).any():
        return set()
    return {at for at in range(body) if _carries(facts, flow, begin + at, body)}


def _carries(facts: Facts, flow: Flow, op: int, body: int) -> bool:
    """Return whether an op depends on what it made one round before, past all its loop projects.

    If one way round leads through a product with a parameter, as beside the gates of a GRU, it
    does not. That way may take two rounds, if it is another op that holds the state.
    """
    if not _passes_on(facts, op) or _is_projection(facts, flow, op):
        return False
    plain, projected = set(_list_written_by(facts, op)), set[int]()
    carries = False
    for later in range(op + 1, min(op + 2 * body + 1, facts.count)):
        reads_plain, reads_projected = (_reads(facts, later, made) for made in (plain, projected))
        is_itself = (later - op) % body == 0
        if is_itself and reads_projected:
            return False
        carries |= reads_plain and later == op + body
        if (reads_plain or reads_projected) and _passes_on(facts, later):
            is_projected = reads_projected or _is_projection(facts, flow, later)
            (projected if is_projected else plain).update(_list_written_by(facts, later))
    return carries


def _list_written_by(facts: Facts, op: int) -> Iterator[int]:
    """Yield the storages that an op makes or changes; a view does neither."""
    for row in facts.rows_out(op):
        storage = int(facts.storage[row])
        if facts.born_by[storage] == op or facts.mutates[facts.code[op]]:
            yield storage


def _reads(facts: Facts, op: int, storages: set[int]) -> bool:
    return any(int(facts.storage[row]) in storages for row in facts.rows_in(op))


def _passes_on(facts: Facts, op: int) -> bool:
    # What is written into a part of a tensor is no reason to read what is in its other parts.
    return facts.short_names[facts.code[op]] not in OVERWRITING


def _is_projection(facts: Facts, flow: Flow, op: int) -> bool:
    """Return whether an op multiplies by a parameter or a constant."""
    return is_product(facts, op) and any(
        flow.origin_of_input(row) is not Origin.ACTIVATION for row in facts.rows_in(op)
    )


def _list_written(facts: Facts, begins: list[int], places: set[int]) -> Iterator[int]:
    """Yield what the carrying ops of every round wrote."""
    codes = {at: int(facts.code[begins[1] + at]) for at in places}
    for begin in begins:
        for at, code in codes.items():
            op = begin + at
            if (
                op < facts.count
                and facts.code[op] == code
                and facts.scope[op] == facts.scope[begin]
            ):
                yield from _list_written_by(facts, op)
