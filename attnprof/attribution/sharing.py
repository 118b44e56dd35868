"""Caches and states that several layers write into: one tensor for all of a model's layers."""

from collections.abc import Iterable

import numpy as np

from attnprof.attribution.facts import Facts


def find_sharers(
    facts: Facts, cache: Iterable[int], state: Iterable[int], layers: list[str]
) -> dict[int, tuple[str, ...]]:
    """Return per storage that several layers share those layers.

    Args:
        facts: The run's tables.
        cache: Storages of caches. Their layers are those among ``layers`` that write into them,
            themselves or by a module that they call.
        state: Storages of states, whose layers are the modules that write into them.
        layers: The paths of attention layers, in program order.
    """
    of_caches, attending = set(cache), set(layers)
    found: dict[int, dict[str, None]] = {}
    for storage, scope in _list_writes(facts, of_caches.union(state)):
        around = _list_modules_around(facts, scope)
        if storage in of_caches:
            around = [path for path in around if path in attending]
        found.setdefault(storage, {}).update(dict.fromkeys(around[:1]))
    return {storage: tuple(owners) for storage, owners in found.items() if len(owners) > 1}


def _list_writes(facts: Facts, storages: set[int]) -> list[tuple[int, int]]:
    """Return (storage, module call) of what modules write in place, in program order, each once."""
    wanted = np.zeros(facts.storage_count + 1, np.bool_)
    wanted[list(storages)] = True
    rows = np.flatnonzero(~facts.is_input & wanted[facts.storage])
    ops = facts.row_op[rows]
    into = facts.mutates[facts.code[ops]] & (facts.born_by[facts.storage[rows]] != ops)
    into &= facts.scope[ops] >= 0
    pairs = zip(facts.storage[rows[into]].tolist(), facts.scope[ops[into]].tolist(), strict=True)
    return list(dict.fromkeys(pairs))


def _list_modules_around(facts: Facts, scope: int) -> list[str]:
    """Return the paths of the modules that a module call ran in, innermost first, its own too."""
    found = []
    while scope >= 0:
        found.append(facts.module_paths[facts.scope_module[scope]])
        scope = facts.parent_of_scope.get(scope, -1)
    return found
