"""Attention with fewer masks in memory."""

from collections import defaultdict

import numpy as np

from attnprof.analysis.what_if.lineage import Source
from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene, count_words
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.calls import AttentionCall
from attnprof.vocabulary import AttentionKind, Category


def use_causal_flag(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Let fused attention know the causal mask instead of reading it from memory.

    A fused kernel needs no mask to leave out what lies ahead. Masks that are made from constants
    alone are taken for causal ones and vanish, with all of their size that they were made from.

    Known limitations:
        The values of a mask are not recorded: what is limited to one side is taken for causal.
    """
    fused = [c for c in scene.calls if c.kind is AttentionKind.FUSED and c.mask_rows]
    flagged = [c for c in fused if scene.masks.source_of(c) is Source.CONSTANTS]
    if not fused:
        raise DoesNotApply("no fused attention is given a mask")
    if not flagged:
        raise DoesNotApply("the masks of fused attention are made from the batch or are learned")
    flags = {id(call) for call in flagged}
    goes = _list_storages(scene, flagged)
    goes -= _list_storages(scene, [call for call in scene.calls if id(call) not in flags])
    which = scene.is_storage(table, goes) & table.is_of(Category.ATTENTION_MASK)
    layers = tuple(dict.fromkeys(c.layer for c in flagged))
    held = scene.say_share(scene.size_at_peak(Category.ATTENTION_MASK))
    change = Change(
        title="The causal flag instead of a mask",
        evidence=f"masks hold {held} of the peak; {count_words(len(layers), 'layer')} read one "
        "that is made from constants",
        how="F.scaled_dot_product_attention(q, k, v, is_causal=True) without attn_mask",
        layers=layers,
        assumes=("the masks made from constants are causal",),
    )
    return table.drop(which), change


def share_masks(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Make every mask once and let all layers read it.

    Layers that make their own, and `scaled_dot_product_attention`, which turns a boolean mask into
    a float one at every call, hold one copy per layer until backward. Of masks of one shape and
    dtype that one forward makes from the same storage, the first is kept until the last is freed.
    """
    groups = _group_copies(scene, table)
    links = {copy: first for first, *copies in groups for copy in copies}
    if not links:
        raise DoesNotApply("no two layers hold a copy of the same mask")
    copied = scene.is_storage(table, links)
    size = scene.size_of_held(table, copied)
    change = Change(
        title="One mask for all layers",
        evidence=f"copies of masks beyond the first hold {scene.say_share(size)} of the peak",
        how="make the mask once, in the dtype of Q (a boolean one is copied at every call of "
        "F.scaled_dot_product_attention), and hand the same tensor to every layer",
        assumes=("masks of one shape that layers make anew from constants are the same",),
    )
    return table.elide(links), change


def _list_storages(scene: Scene, calls: list[AttentionCall]) -> set[int]:
    return {
        s for call in calls for _, lineage in scene.masks.of_call(call) for s in lineage.storages
    }


def _group_copies(scene: Scene, table: Table) -> list[list[int]]:
    """Return storages that hold the same mask, in the order in which they were made."""
    facts = scene.facts
    present = set(table.storage[table.is_of(Category.ATTENTION_MASK)].tolist())
    groups: dict[tuple[int, str, int, int], dict[int, None]] = defaultdict(dict)
    shared = _count_readers(scene)
    for call in scene.calls:
        forward = int(
            np.searchsorted(scene.attribution.timeline.forward_begin, call.ops[0], "right")
        )
        for row, lineage in scene.masks.of_call(call):
            storage = int(facts.storage[row])
            if storage not in present:
                continue
            others = [s for s in lineage.storages if s != storage and shared[s] > 1]
            signature = facts.signature_of(row)
            root = min(others, default=-1)
            groups[signature.numel, signature.dtype, root, forward][storage] = None
    return [list(group) for group in groups.values() if len(group) > 1]


def _count_readers(scene: Scene) -> dict[int, int]:
    """Return for how many masks a storage is, or was made into, one."""
    readers: dict[int, set[int]] = defaultdict(set)
    for call in scene.calls:
        for row, lineage in scene.masks.of_call(call):
            for storage in lineage.storages:
                readers[storage].add(int(scene.facts.storage[row]))
    return {storage: len(of) for storage, of in readers.items()}
