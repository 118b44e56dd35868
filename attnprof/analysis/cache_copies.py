"""Copies that attention makes of a cache in order to read it, and what they cost for a moment.

Repeating the heads of grouped-query attention, gathering pages and dequantising all leave the
cache as it is and put a second form of it beside it until the layer has attended.
"""

from collections.abc import Iterable, Mapping

from attnprof.analysis.cache_use import CacheUse
from attnprof.attribution.attribute import Attribution
from attnprof.attribution.facts import Facts
from attnprof.attribution.paths import is_inside
from attnprof.attribution.products import is_product


def find_copies(attribution: Attribution, caches: Mapping[int, str]) -> dict[int, str]:
    """Return the storages that layers made of their caches and dropped, each with its layer.

    Args:
        attribution: A run's facts and what they mean.
        caches: The storages of caches, with their layers.
    """
    facts = attribution.facts
    attending = {op for call in attribution.calls for op in call.ops}
    layers = sorted({call.layer for call in attribution.calls}, key=len, reverse=True)
    found: dict[int, str] = {}
    if not caches:
        return found
    use = CacheUse(facts, set(range(facts.storage_count)))  # a copy may be copied, on and on
    todo = set(caches)
    while todo:
        made: dict[int, str] = {}
        for storage in todo:
            for op in use.readers_of(storage).tolist():
                if op in attending or is_product(facts, op) or facts.is_backward[op]:
                    continue
                layer = _layer_of(facts, op, layers)
                for row in facts.rows_out(op) if layer is not None else ():
                    copy = int(facts.storage[row])
                    if facts.born_by[copy] == op and copy not in caches and copy not in found:
                        made[copy] = layer or ""
        found |= made
        todo = set(made)
    return found


def _layer_of(facts: Facts, op: int, layers: Iterable[str]) -> str | None:
    """Return the innermost attention layer that an op ran in."""
    path = facts.module_paths[facts.op_module[op]]
    for layer in layers:
        if is_inside(path, layer):
            return layer
    return None
