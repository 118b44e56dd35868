"""The KV cache in fewer bits, in place, in pages, as a latent, or elsewhere."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene, count_words, list_ranges
from attnprof.analysis.what_if.table import Table, follow_links
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Bools, Ints
from attnprof.vocabulary import Category

_GROUP = 64
"""Elements that share a scale and a zero point in 4-bit caches, 16 bits each: transformers'
default, https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/cache_utils.py"""
_PAGE_TOKENS = 16
"""Tokens per block of a paged cache: vLLM's default on GPUs."""


def find_cache(scene: Scene, table: Table) -> Bools:
    """Return which blocks are caches: of those named so, what outlives the forward it was made in.

    Raises:
        DoesNotApply: There is none.
    """
    timeline = scene.attribution.timeline
    made = scene.facts.born_by[table.storage]
    forward = np.searchsorted(timeline.forward_begin, made, "right") - 1
    leave = np.append(timeline.forward_exit, 0)[forward]
    is_inside = (forward >= 0) & (made < leave)
    outlives = table.end > table.at(scene.event_before(leave))
    result: Bools = (
        table.is_of(Category.KV_CACHE) & (table.size_bytes > 0) & (~is_inside | outlives)
    )
    if not result.any():
        raise DoesNotApply("no KV cache was kept from one forward to the next")
    return result


def store_fp8(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Keep K and V in one byte per element."""
    return _quantise(
        scene,
        table,
        bits=8,
        title="The KV cache in FP8",
        how='in vLLM: kv_cache_dtype="fp8"; by hand: keep k.to(torch.float8_e4m3fn) with a scale',
    )


def store_int4(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Keep K and V in four bits per element, with a scale and a zero point per group."""
    return _quantise(
        scene,
        table,
        bits=4,
        group_bits=2 * 16 / _GROUP,
        title="The KV cache in 4 bits",
        how='in transformers: cache_implementation="quantized", cache_config={"nbits": 4}, whose '
        "newest 128 tokens stay as they are",
    )


def _quantise(
    scene: Scene, table: Table, *, bits: int, title: str, how: str, group_bits: float = 0.0
) -> Rewrite:
    """Shrink caches, and give each layer a dequantised copy while it attends.

    Known limitations:
        A kernel that reads the quantised form itself needs no dequantised copy: then the peak is
        lower by one layer's cache.
    """
    cache = find_cache(scene, table)
    item_bytes = scene.item_bytes[table.block]
    wide = cache & (item_bytes >= 2)
    if not wide.any():
        raise DoesNotApply("the KV cache has at most one byte per element already")
    elements = table.size_bytes // item_bytes
    small = np.ceil(elements * (bits + group_bits) / 8).astype(np.int64)
    read, begin, end = find_reads(scene, table, wide, scene.calls, until_return=True)
    copies = table.take(read).move(begin, end)
    copies = copies.relabel(np.ones(len(copies), np.bool_), category=Category.TEMPORARIES)
    change = Change(
        title=title,
        evidence=_say_held(scene),
        how=how,
        assumes=("each layer reads a dequantised copy of its K and V while it attends",),
        exact=False,
    )
    return table.resize(wide, small).add(copies), change


def find_reads(
    scene: Scene,
    table: Table,
    cache: Bools,
    calls: Iterable[AttentionCall],
    *,
    until_return: bool = False,
) -> tuple[Ints, Ints, Ints]:
    """Return the cache blocks that each call reads, and from where to where it runs.

    A block that several calls read is there several times.

    Args:
        scene: The run.
        table: Its blocks.
        cache: Which of them are caches.
        calls: Attention calls.
        until_return: A call runs until the module that made it returns, which holds what it made
            until then.
    """
    blocks, begins, ends = (np.zeros(0, np.int64) for _ in range(3))
    for layer, mine in group_by_layer(calls).items():
        own = np.flatnonzero(cache & scene.is_in_layers(table, [layer]))
        begin, end = _find_spans(scene, table, mine)
        if until_return:
            end = np.maximum(
                end, table.at(scene.event_of_return(np.array([c.ops[0] for c in mine])))
            )
        # Live once the call is over: what the call replaces is freed by then.
        at, call = list_ranges(
            np.searchsorted(end, table.start[own], "right"),
            np.searchsorted(end, table.end[own], "left"),
        )
        blocks = np.concatenate([blocks, own[at]])
        begins, ends = np.concatenate([begins, begin[call]]), np.concatenate([ends, end[call]])
    return blocks, np.maximum(begins, table.start[blocks]), ends


def group_by_layer(calls: Iterable[AttentionCall]) -> dict[str, list[AttentionCall]]:
    """Return calls by their layer, each layer's in their order."""
    grouped: dict[str, list[AttentionCall]] = {}
    for call in calls:
        grouped.setdefault(call.layer, []).append(call)
    return grouped


def _find_spans(scene: Scene, table: Table, calls: list[AttentionCall]) -> tuple[Ints, Ints]:
    """Return the places at which calls begin and end."""
    firsts = np.array([call.ops[0] for call in calls], np.int64)
    lasts = np.array([call.ops[-1] for call in calls], np.int64)
    return table.at(scene.event_before(firsts)), table.at(scene.event_after(lasts))


@dataclass(frozen=True, slots=True)
class Growth:
    """A cache that is made anew, longer, at every forward."""

    older: Ints
    """Positions in the table, each the generation before the one in `newer`."""
    newer: Ints


def find_growth(scene: Scene, table: Table) -> Growth:
    """Return which cache blocks were concatenated from which.

    Raises:
        DoesNotApply: None were.
    """
    facts = scene.facts
    cache = find_cache(scene, table)
    position = np.full(facts.storage_count, -1, np.int64)
    position[table.storage[cache]] = np.flatnonzero(cache)
    pairs = []
    for newer in np.flatnonzero(cache).tolist():
        op = int(facts.born_by[table.storage[newer]])
        for row in facts.rows_in(op) if op >= 0 else ():
            older = int(position[facts.storage[row]])
            if older >= 0 and older != newer and table.size_bytes[older] < table.size_bytes[newer]:
                pairs.append((older, newer))
    if not pairs:
        raise DoesNotApply("the KV cache does not grow by concatenation; it is in place already")
    older, newer = np.array(pairs, np.int64).T
    return Growth(older, newer)


def preallocate(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Write K and V into a cache that has its final length from the start.

    While a longer copy of a layer's K or V is made, the shorter one is still there; in place there
    is none. But all layers hold the final length from the first token on. Attention reads what
    was written, and not the room after it.
    """
    growth = find_growth(scene, table)
    links = dict(
        zip(table.storage[growth.newer].tolist(), table.storage[growth.older].tolist(), strict=True)
    )
    final = np.zeros(scene.facts.storage_count, np.int64)
    newer, first = follow_links(links)
    size = np.zeros_like(final)
    np.maximum.at(size, table.storage, table.size_bytes)
    np.maximum.at(final, first, size[newer])
    final = final[table.storage]
    change = Change(
        title="A KV cache of fixed length",
        evidence=_say_growth(scene, growth),
        how="K and V written into a room of that length and read as its slice; in transformers, "
        'with fused attention: cache_implementation="static", max_cache_len=…',
        assumes=("the cache is as long as the longest that was recorded",),
    )
    return table.resize(final > 0, final).elide(links), change


def use_pages(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Keep K and V in pages of 16 tokens that are added one by one.

    No token is ever copied, and the last page of each sequence is not full.
    """
    growth = find_growth(scene, table)
    cache = find_cache(scene, table)
    tokens = _count_tokens(scene, table, cache)
    paged = cache & (tokens > 0)
    full = -(-tokens // _PAGE_TOKENS) * _PAGE_TOKENS
    size = table.size_bytes // np.maximum(tokens, 1) * full
    end = table.end.copy()
    end[growth.older] = table.start[growth.newer]
    change = Change(
        title=f"A KV cache in pages of {_PAGE_TOKENS} tokens",
        evidence=_say_growth(scene, growth),
        how="an engine with paged attention (vLLM); in transformers: "
        "generate_batch with its paged cache",
        assumes=("pages are taken when they are needed, and not as one pool in advance",),
        exact=False,
    )
    return table.resize(paged, size).end_by(cache, end), change


def _count_tokens(scene: Scene, table: Table, cache: Bools) -> Ints:
    """Return per block of a cache how many tokens it holds, or 0 where no call reads it.

    As many as the call reads that ends first after the block was made.
    """
    tokens = np.zeros(len(table), np.int64)
    for layer, calls in group_by_layer(scene.calls).items():
        mine = np.flatnonzero(cache & scene.is_in_layers(table, [layer]))
        _, end = _find_spans(scene, table, calls)
        lengths = np.array([call.k_len for call in calls] + [0], np.int64)
        tokens[mine] = lengths[np.searchsorted(end, table.start[mine], "right")]
    return tokens


def keep_latent(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Keep one latent per token and layer in place of K and V, as multi-head latent attention does.

    Known limitations:
        The projections that make the latent and expand it are not added, nor those of K and V
        taken away.
    """
    assert options.latent_dim is not None
    cache = find_cache(scene, table)
    factor = np.ones(len(table))
    for layer, calls in group_by_layer(scene.calls).items():
        held = calls[0].kv_heads * (calls[0].head_dim + calls[0].value_dim)
        if held > options.latent_dim:
            factor[scene.is_in_layers(table, [layer])] = options.latent_dim / held
    if not (cache & (factor < 1)).any():
        raise DoesNotApply(
            f"no layer keeps more than {options.latent_dim} elements per token; give a smaller "
            "latent_dim"
        )
    change = Change(
        title=f"A latent of {options.latent_dim} elements in place of K and V",
        evidence=_say_held(scene),
        how="multi-head latent attention: another architecture, to be trained or converted to",
        assumes=("K and V are never expanded from the latent (their projections are absorbed)",),
        exact=False,
    )
    return table.resize(cache, np.ceil(table.size_bytes * factor).astype(np.int64)), change


def offload(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Keep the cache in host memory but for the layer that attends and the one that follows."""
    cache = find_cache(scene, table)
    if scene.is_on_cpu:
        raise DoesNotApply("the KV cache is in host memory already")
    calls = sorted(scene.calls, key=lambda call: call.ops[0])
    begins = _find_prefetches(scene, table, calls)
    pieces = []
    for layer, mine in group_by_layer(calls).items():
        begin = np.array([begins[id(call)] for call in mine], np.int64)
        _, end = _find_spans(scene, table, mine)
        blocks = np.flatnonzero(cache & scene.is_in_layers(table, [layer]))
        at, call = list_ranges(
            np.searchsorted(end, table.start[blocks], "right"),
            np.searchsorted(begin, table.end[blocks], "left"),
        )
        start = np.maximum(table.start[blocks[at]], begin[call])
        stop = np.minimum(table.end[blocks[at]], end[call])
        pieces.append(table.take(blocks[at]).move(start, stop))
    result = table.drop(cache & scene.is_in_layers(table, {call.layer for call in calls}))
    for piece in pieces:
        result = result.add(piece)
    change = Change(
        title="The KV cache in host memory",
        evidence=_say_held(scene),
        how='in transformers: cache_implementation="offloaded"; decoding then waits for the bus',
        assumes=("the next layer's cache is fetched while one attends",),
    )
    return result, change


def _find_prefetches(scene: Scene, table: Table, calls: list[AttentionCall]) -> dict[int, int]:
    """Return per call (by id) when its layer's cache is fetched: as the call before it begins."""
    enters = scene.attribution.timeline.forward_begin
    forward = np.searchsorted(enters, [call.ops[0] for call in calls], "right")
    begin, _ = _find_spans(scene, table, calls)
    return {
        id(call): int(begin[at - 1] if at and forward[at - 1] == forward[at] else begin[at])
        for at, call in enumerate(calls)
    }


def _say_held(scene: Scene) -> str:
    held = scene.say_share(scene.size_at_peak(Category.KV_CACHE))
    return f"K and V of past tokens hold {held} of the peak"


def _say_growth(scene: Scene, growth: Growth) -> str:
    return f"{_say_held(scene)}; {count_words(len(growth.newer), 'time')} they were copied to grow"
