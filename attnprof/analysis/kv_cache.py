"""KV caches and recurrent states per layer, after each forward of a decoding loop."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import polars as pl

from attnprof.analysis import block_tables
from attnprof.analysis.block_tables import BlockTables
from attnprof.analysis.cache_copies import find_copies
from attnprof.analysis.cache_layers import CacheKind, CacheLayer, Content
from attnprof.analysis.cache_shares import OwnBlocks, Part, share_out, take_blocks
from attnprof.analysis.cache_use import CacheUse
from attnprof.analysis.forwards import Forward, find_forwards
from attnprof.analysis.live_bytes import LiveBytes
from attnprof.attribution.attribute import Attribution
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import ITEM_BYTES
from attnprof.vocabulary import Category, Phase

SCHEMA = {
    "step": pl.Int64,
    "forward": pl.Int64,
    "phase": pl.String,
    "layer": pl.String,
    "category": pl.String,
    "kind": pl.String,
    "dtype": pl.String,
    "batch": pl.Int64,
    "kv_heads": pl.Int64,
    "head_dim": pl.Int64,
    "value_dim": pl.Int64,
    "tokens": pl.Int64,
    "held_bytes": pl.Int64,
    "reachable_bytes": pl.Int64,
    "used_bytes": pl.Int64,
    "bytes_per_token": pl.Float64,
    "transient_bytes": pl.Int64,
    "growing_bytes": pl.Int64,
    "expanded_bytes": pl.Int64,
    **block_tables.SCHEMA,
}
"""Columns of `describe_kv_cache`."""


def describe_kv_cache(attribution: Attribution) -> pl.DataFrame:
    """Return a row per layer and forward without gradients, as long as the layer holds something.

    Bytes are those that live when the forward has ended: summed over the layers of one forward
    and category, ``held_bytes`` is that category at that instant.

    Columns: step, forward (number of the outermost forward; a step that ``tracer.step()`` ended may
    have several), phase, layer, category (``kv_cache`` or ``recurrent_state``), kind, dtype (of
    most bytes), batch, kv_heads, head_dim and value_dim (of K and V as attention read them; null
    for states), tokens (per sequence, padding included; null for states), held_bytes (whole
    storages), reachable_bytes (what the next op can see of them), used_bytes (what tokens were
    written to), bytes_per_token (of one sequence), transient_bytes (the most that this forward took
    beyond what it left behind: growing_bytes, older and newer copies side by side, and
    expanded_bytes, copies made to attend, at the worst instant). Where an engine noted its block
    table: block_tokens, allocated_blocks (of sequences), used_blocks (with at least one token),
    shared_blocks (of several sequences), free_blocks, last_block_slack_bytes (room in used blocks).
    Then tokens are those of all sequences together, as they are wherever sequences are packed into
    one: batch is 1.
    """
    forwards = find_forwards(attribution)
    layers = _find_layers(attribution, forwards)
    forwards = [_see_dropped_pool(forward, layers) for forward in forwards]
    copies = _find_copies(attribution, layers)
    rows: list[dict[str, object]] = []
    for layer in layers:
        rows += _describe(layer, forwards, copies.get(layer.path))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row").sort("forward", maintain_order=True)


def _see_dropped_pool(forward: Forward, layers: Iterable[CacheLayer]) -> Forward:
    """Look at a forward as it returns, where a pool was let go of before anything else happened.

    An engine that stops after its last token does that. What is not written in place has an older
    and a newer copy at that instant, and neither was kept.
    """
    settled, leave = forward.settled_event, forward.exit_event
    if any(layer.has_pool_at(settled) for layer in layers):
        return forward
    if any(layer.has_pool_at(leave) for layer in layers):
        return replace(forward, settled_event=leave)
    return forward


def _find_layers(attribution: Attribution, forwards: list[Forward]) -> list[CacheLayer]:
    """Return the layers that ever held a cache or a state, in the order of the model."""
    parts = share_out(attribution)
    blocks = {key: take_blocks(attribution, own) for key, own in parts.items()}
    storages = {int(s) for own in blocks.values() for s in own.storage}
    use = CacheUse(
        attribution.facts,
        storages,
        (call.layer for call in attribution.calls),
        [forward.exit_op for forward in forwards],
    )
    calls = _find_calls(attribution, forwards)
    tables = BlockTables(attribution.facts)
    phases = {forward.number: forward.phase for forward in forwards}
    return [
        CacheLayer(
            path,
            category,
            own,
            use,
            calls.get(path, {}),
            latent=attribution.kept.latent,
            tables=tables,
            is_continued=phases.get(min(calls.get(path, {0}))) == Phase.DECODE,
        )
        for (path, category), own in blocks.items()
    ]


def _find_calls(
    attribution: Attribution, forwards: Iterable[Forward]
) -> dict[str, dict[int, AttentionCall]]:
    """Return per layer and forward the call that reads most keys."""
    forwards = list(forwards)
    enters = np.array([forward.enter_op for forward in forwards], np.int64)
    found: dict[str, dict[int, AttentionCall]] = {}
    for call in attribution.calls:
        at = int(np.searchsorted(enters, call.ops[0], "right")) - 1
        if at < 0 or call.ops[0] >= forwards[at].exit_op or not call.k_len:
            continue
        mine = found.setdefault(call.layer, {})
        number = forwards[at].number
        if number not in mine or call.k_len > mine[number].k_len:
            mine[number] = call
    return found


def _find_copies(attribution: Attribution, layers: Iterable[CacheLayer]) -> dict[str, OwnBlocks]:
    """Return per layer the blocks of copies that it made of caches in order to attend."""
    caches = {
        int(storage): layer.path
        for layer in layers
        if layer.category is Category.KV_CACHE
        for storage in layer.blocks.storage
    }
    copies = find_copies(attribution, caches)
    found: dict[str, list[Part]] = {}
    if copies:
        of_copies = np.isin(attribution.blocks.storage, list(copies))
        for position in np.flatnonzero(of_copies).tolist():
            layer = copies[int(attribution.blocks.storage[position])]
            found.setdefault(layer, []).append((position, 0, 1, 1))
    return {path: take_blocks(attribution, own) for path, own in found.items()}


def _describe(
    layer: CacheLayer, forwards: list[Forward], copies: OwnBlocks | None
) -> list[dict[str, object]]:
    """Return a row per forward after which a layer holds something."""
    contents = [layer.content_after(forward) for forward in forwards]
    kind = layer.name_kind(forwards, contents)
    transients = _Transients(layer, copies)
    rows: list[dict[str, object]] = []
    each: float | None = None
    for forward, content in zip(forwards, contents, strict=True):
        call = None if kind is CacheKind.STATE else layer.call_of(forward)
        batch = call.batch if call else forward.batch
        if content.tokens and (content.newest_bytes or each is None):
            own_bytes = content.newest_bytes or content.used_bytes
            each = own_bytes / (content.tokens * (batch or 1))
        if not content.held_bytes:
            continue
        rows.append(
            {
                "step": forward.step,
                "forward": forward.number,
                "phase": forward.phase,
                "layer": layer.path,
                "category": layer.category.value,
                "kind": kind.value,
                "batch": batch,
                **_describe_content(content, kind, call, each if content.tokens else None),
                **transients.measure(forward, content.held_bytes),
                **content.blocks,
            }
        )
    return rows


_AS_THEY_ARE = frozenset(CacheKind) - {CacheKind.QUANTISED, CacheKind.LATENT, CacheKind.STATE}
"""Kinds that keep K and V as attention reads them, but for heads that are repeated to attend."""


def _count_kv_heads(
    call: AttentionCall, kind: CacheKind, dtype: str, bytes_per_token: float
) -> int:
    """Return the heads that are kept: fused kernels may be given repeated ones."""
    pair_bytes = (call.head_dim + call.value_dim) * ITEM_BYTES.get(dtype, 1)
    if kind in _AS_THEY_ARE and pair_bytes and 0 < bytes_per_token < call.kv_heads * pair_bytes:
        heads, rest = divmod(bytes_per_token, pair_bytes)
        return call.kv_heads if rest else int(heads)
    return call.kv_heads


def _describe_content(
    content: Content, kind: CacheKind, call: AttentionCall | None, each: float | None
) -> dict[str, object]:
    """Return the columns of what a layer holds; ``each`` is the bytes of one sequence's token."""
    return {
        "dtype": content.dtype,
        "kv_heads": _count_kv_heads(call, kind, content.dtype, each or 0.0) if call else None,
        "head_dim": call.head_dim if call else None,
        "value_dim": call.value_dim if call else None,
        "tokens": content.tokens,
        "held_bytes": content.held_bytes,
        "reachable_bytes": content.reachable_bytes,
        "used_bytes": content.used_bytes,
        "bytes_per_token": each,
    }


class _Transients:
    """What a layer takes during a forward beyond what it holds after it."""

    def __init__(self, layer: CacheLayer, copies: OwnBlocks | None) -> None:
        own = layer.blocks
        self._kept = LiveBytes(own.start, own.end, own.size_bytes)
        self._copies = self._both = None
        if copies is not None and layer.category is Category.KV_CACHE:
            self._copies = LiveBytes(copies.start, copies.end, copies.size_bytes)
            self._both = LiveBytes(
                np.concatenate([own.start, copies.start]),
                np.concatenate([own.end, copies.end]),
                np.concatenate([own.size_bytes, copies.size_bytes]),
            )

    def measure(self, forward: Forward, held_bytes: int) -> dict[str, int]:
        span = forward.enter_event, forward.settled_event
        most = (self._both or self._kept).most_within(*span)
        return {
            "transient_bytes": most - held_bytes,
            "growing_bytes": self._kept.most_within(*span) - held_bytes,
            "expanded_bytes": self._copies.most_within(*span) if self._copies else 0,
        }
