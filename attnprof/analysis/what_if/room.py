"""A KV cache of fixed length that is attended to in full, under a mask."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from attnprof.analysis.cache_copies import find_copies
from attnprof.analysis.what_if.cache import find_growth, group_by_layer, preallocate
from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Bools, Ints
from attnprof.vocabulary import AttentionKind, Category

_SQUARE = (Category.ATTENTION_SCORES, Category.SOFTMAX, Category.ATTENTION_MASK)
"""What has a column per key."""

Rooms = Mapping[int, Mapping[int, int]]
"""Per forward (its place among all outermost ones) and number of keys, the keys of the room."""


def preallocate_masked(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Write K and V into a cache of its final length, and attend to all of it.

    Shapes then never change, which is what compilers and CUDA graphs want, and what transformers'
    static cache does where attention is written out. Scores, softmax results and masks have a
    column for every place of the room from the first token on, and so have repeated heads.

    Known limitations:
        A counter per layer (transformers keeps one of 8 bytes) is not added.
    """
    layers = set(scene.layers.gather(table.block[find_growth(scene, table).newer]).to_list())
    calls = [c for c in scene.calls if c.kind is AttentionKind.MATERIALISED and c.layer in layers]
    if not calls:
        raise DoesNotApply(
            "attention is fused and reads the cache where it lies; ask for cache_static"
        )
    rooms = _find_rooms(scene, calls)
    result, change = preallocate(scene, table, options)
    wide, size_bytes = _find_wider(scene, result, rooms)
    change = Change(
        title="A KV cache of fixed length, attended to in full",
        evidence=change.evidence,
        how='in transformers, with eager attention: cache_implementation="static", max_cache_len=…',
        assumes=(*change.assumes, "places without a token are attended to under a mask"),
        exact=False,
    )
    return result.resize(wide, size_bytes), change


def _find_rooms(scene: Scene, calls: list[AttentionCall]) -> Rooms:
    """Return for every forward how many keys its calls would have read.

    A call whose queries are all of its keys begins another sequence, and so does a shorter one.
    """
    begins = scene.attribution.timeline.forward_begin
    rooms: dict[int, dict[int, int]] = defaultdict(dict)
    for mine in group_by_layer(calls).values():
        room, longer = 0, None
        for call in reversed(mine):
            if longer is None or longer.q_len == longer.k_len or longer.k_len < call.k_len:
                room = call.k_len
            longer = call
            forward = int(np.searchsorted(begins, call.ops[0], "right")) - 1
            rooms[forward][call.k_len] = max(room, rooms[forward].get(call.k_len, 0))
    return rooms


def _find_wider(scene: Scene, table: Table, rooms: Rooms) -> tuple[Bools, Ints]:
    """Return which blocks have a column per key, and per block of the table the size it gets."""
    facts, blocks = scene.facts, scene.attribution.blocks
    caches = table.storage[table.is_of(Category.KV_CACHE)]
    copies = find_copies(scene.attribution, dict.fromkeys(caches.tolist(), ""))
    is_square, is_copy = table.is_of(*_SQUARE), scene.is_storage(table, copies)
    begins = scene.attribution.timeline.forward_begin
    size_bytes = table.size_bytes.copy()
    for at in np.flatnonzero(is_square | is_copy).tolist():
        signature = int(blocks.signature[table.block[at]])
        made = int(facts.born_by[table.storage[at]])
        forward = int(np.searchsorted(begins, made, "right")) - 1
        if signature < 0 or made < 0:
            continue
        shape = facts.signatures[signature].shape
        for keys, room in rooms.get(forward, {}).items():
            if keys in (shape[-1:] if is_square[at] else shape):
                size_bytes[at] = -(-size_bytes[at] * room // keys)
                break
    return size_bytes != table.size_bytes, size_bytes
