"""Whose a cache or a state is that is written in place: of one layer, or of several together."""

from collections.abc import Iterable

import numpy as np

from attnprof.attribution.facts import Facts
from attnprof.attribution.paths import is_inside


class CacheWriters:
    """Which attention layer an op writes for that writes into a cache."""

    def __init__(self, facts: Facts, layers: Iterable[str]) -> None:
        """Begin without any.

        Args:
            facts: The run's tables.
            layers: The paths of attention layers.
        """
        self._facts = facts
        self._layers = dict.fromkeys(layers)
        self._found: dict[int, str | None] = {}

    def find_layer(self, scope: int) -> str | None:
        """Return the layer that a module call writes for, if it is one's.

        That is the layer around it, such as of a module that keeps K and V, for all layers even;
        else the only one inside of the module, or of the innermost around it that has any: one may
        write what its submodule attends to.
        """
        if scope not in self._found:
            self._found[scope] = self._find_layer(_list_modules_around(self._facts, scope))
        return self._found[scope]

    def _find_layer(self, around: list[str]) -> str | None:
        for path in around:
            if path in self._layers:
                return path
        for path in around:
            inside = [layer for layer in self._layers if is_inside(layer, path)]
            if inside:
                return inside[0] if len(inside) == 1 else None
        return None


def find_sharers(
    facts: Facts, cache: Iterable[int], state: Iterable[int], layers: Iterable[str]
) -> dict[int, tuple[str, ...]]:
    """Return per storage that several layers share those layers.

    Args:
        facts: The run's tables.
        cache: Storages of caches, whose layers are among ``layers``.
        state: Storages of states, whose layers are the modules that write into them.
        layers: The paths of attention layers.
    """
    of_caches, writers = set(cache), CacheWriters(facts, layers)
    found: dict[int, dict[str, None]] = {}
    for storage, scope in _list_writes(facts, of_caches.union(state)):
        if storage in of_caches:
            layer = writers.find_layer(scope)
        else:
            layer = facts.module_paths[facts.scope_module[scope]]
        if layer is not None:
            found.setdefault(storage, {})[layer] = None
    shared = {storage: _leave_out_models([*owners]) for storage, owners in found.items()}
    return {storage: owners for storage, owners in shared.items() if len(owners) > 1}


def _leave_out_models(owners: list[str]) -> tuple[str, ...]:
    """Return writers without those around several others, which clear a state, say, for all.

    One around a single other one is a layer with a part of itself.
    """
    within = {
        owner: [other for other in owners if other != owner and is_inside(other, owner)]
        for owner in owners
    }
    parts = {others[0] for others in within.values() if len(others) == 1}
    return tuple(owner for owner in owners if len(within[owner]) < 2 and owner not in parts)


def _list_modules_around(facts: Facts, scope: int) -> list[str]:
    """Return the paths of the modules that a module call ran in, innermost first, its own too."""
    found = []
    while scope >= 0:
        found.append(facts.module_paths[facts.scope_module[scope]])
        scope = facts.parent_of_scope.get(scope, -1)
    return found


def _list_writes(facts: Facts, storages: set[int]) -> list[tuple[int, int]]:
    """Return (storage, module call) of what modules write in place, in program order, each once."""
    if not storages:
        return []  # as in training: nothing to look for among all ops
    wanted = np.zeros(facts.storage_count + 1, np.bool_)
    wanted[list(storages)] = True
    rows = np.flatnonzero(~facts.is_input & wanted[facts.storage])
    rows = rows[facts.are_written_in_place(rows) & (facts.scope[facts.row_op[rows]] >= 0)]
    scopes = facts.scope[facts.row_op[rows]]
    pairs = zip(facts.storage[rows].tolist(), scopes.tolist(), strict=True)
    return list(dict.fromkeys(pairs))
