"""Caches and states that several layers write into: one tensor for all of a model's layers."""

from collections.abc import Iterable

import numpy as np

from attnprof.attribution.facts import Facts


def find_writing_modules(facts: Facts, storages: Iterable[int]) -> dict[int, list[str]]:
    """Return per storage the paths of the modules that write into it in place, in program order.

    Args:
        facts: The run's tables.
        storages: The storages that are asked about; those that nothing writes into are left out.
    """
    wanted = np.zeros(facts.storage_count + 1, np.bool_)
    wanted[list(storages)] = True
    rows = np.flatnonzero(~facts.is_input & wanted[facts.storage])
    rows = rows[facts.op_module[facts.row_op[rows]] >= 0]
    ops = facts.row_op[rows]
    into = facts.mutates[facts.code[ops]] & (facts.born_by[facts.storage[rows]] != ops)
    found: dict[int, dict[str, None]] = {}
    pairs = zip(
        facts.storage[rows[into]].tolist(), facts.op_module[ops[into]].tolist(), strict=True
    )
    for storage, module in dict.fromkeys(pairs):
        found.setdefault(storage, {})[facts.module_paths[module]] = None
    return {storage: list(paths) for storage, paths in found.items()}


def find_sharers(
    facts: Facts, cache: Iterable[int], state: Iterable[int], layers: list[str]
) -> dict[int, tuple[str, ...]]:
    """Return per storage that several layers share those layers.

    Args:
        facts: The run's tables.
        cache: Storages of caches. Their layers are among ``layers``, and write into them
            themselves or by modules inside of them.
        state: Storages of states, whose layers are the modules that write into them.
        layers: The paths of attention layers, in program order.
    """
    cache = set(cache)
    found = {}
    for storage, paths in find_writing_modules(facts, {*cache, *state}).items():
        owners = paths
        if storage in cache:
            inside = [f"{path}." for path in paths]
            owners = [
                layer for layer in layers if any(path.startswith(f"{layer}.") for path in inside)
            ]
        if len(owners) > 1:
            found[storage] = tuple(owners)
    return found
