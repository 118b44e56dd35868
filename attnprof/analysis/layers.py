"""One row per attention layer: what it is, what it makes, what it keeps."""

from collections.abc import Iterable
from dataclasses import asdict

import polars as pl

from attnprof.analysis.backends import explain_backend
from attnprof.analysis.cache_shares import share_out, take_blocks
from attnprof.analysis.live_bytes import LiveBytes
from attnprof.attribution.attribute import Attribution
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import ITEM_BYTES, Facts
from attnprof.attribution.products import INTEGERS
from attnprof.attribution.scans import find_networks
from attnprof.vocabulary import AttentionKind, Category

SCHEMA = {
    "layer": pl.String,
    "kind": pl.String,
    "calls": pl.Int64,
    "batch": pl.Int64,
    "heads": pl.Int64,
    "kv_heads": pl.Int64,
    "q_len": pl.Int64,
    "k_len": pl.Int64,
    "head_dim": pl.Int64,
    "dtype": pl.String,
    "softmax_bytes": pl.Int64,
    "saved_softmax_bytes": pl.Int64,
    "scores_peak_bytes": pl.Int64,
    "mask_bytes": pl.Int64,
    "kv_cache_bytes": pl.Int64,
    "predicted_saved_bytes": pl.Int64,
    "backend_reason": pl.String,
}


def describe_layers(attribution: Attribution) -> pl.DataFrame:
    """Return a row per attention layer; columns as in `SCHEMA`, bytes of its largest call.

    ``softmax_bytes`` are the softmax results of one call. ``saved_softmax_bytes`` are all distinct
    storages between QKᵀ and PV that autograd kept, the most that were live at once: a layer that is
    called twelve times in a forward keeps those of twelve calls, one that ran in twelve steps those
    of one. ``predicted_saved_bytes`` is theory's size for the same calls. ``scores_peak_bytes`` are
    the most bytes of scores and softmax the layer ever held at once. Forwards that checkpointing
    repeats are not counted again.
    """
    by_layer: dict[str, list[AttentionCall]] = {}
    for call in attribution.calls:
        by_layer.setdefault(call.layer, []).append(call)
    blocks = _LayerBytes(attribution)
    rows = []
    for layer, calls in by_layer.items():
        counted = [call for call in calls if not call.is_recompute] or calls
        rows.append(_describe_layer(layer, counted, blocks))
    others = by_layer.keys() | find_networks(attribution.facts, attribution.kept.state)
    rows += [
        _describe_recurrent(layer, blocks)
        for layer in blocks.layers_with_states()
        if layer not in others
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


class _LayerBytes:
    """Sizes of storages, and peaks of categories within a layer."""

    def __init__(self, attribution: Attribution) -> None:
        self.facts: Facts = attribution.facts
        frame = attribution.allocations
        storage = attribution.blocks.storage.tolist()
        self._size: dict[int, int] = {}
        for number, size in zip(storage, frame["requested_bytes"].to_list(), strict=True):
            self._size[number] = max(size, self._size.get(number, 0))
        lives = frame.select("start", "end").with_columns(storage=attribution.blocks.storage)
        saved = lives.filter(frame["saved"]).group_by("storage")
        self._saved_lives: dict[int, tuple[int, int]] = {
            number: (start, end)
            for number, start, end in saved.agg(
                pl.col("start").min(), pl.col("end").max()
            ).iter_rows()
        }
        self._caches = {
            key: take_blocks(attribution, parts) for key, parts in share_out(attribution).items()
        }
        self._frame = frame.select(
            pl.col("layer", "category").cast(pl.String), "size_bytes", "start", "end"
        )

    def storages_of(self, rows: Iterable[int]) -> set[int]:
        """Return the storages in operand rows."""
        return {int(self.facts.storage[row]) for row in rows}

    def size_of(self, rows: Iterable[int]) -> int:
        """Return the bytes of the distinct storages in operand rows."""
        return sum(self._size.get(s, 0) for s in self.storages_of(rows))

    def list_most_saved(self, rows: Iterable[int]) -> set[int]:
        """Return the storages in operand rows that autograd held when their bytes were the most."""
        storages = self.storages_of(rows) & self._saved_lives.keys()
        changes = [(self._saved_lives[s][0], self._size[s]) for s in storages]
        changes += [(self._saved_lives[s][1], -self._size[s]) for s in storages]
        most, size, instant = 0, 0, -1
        for at, change in sorted(changes):  # at one instant what ends goes first
            size += change
            if size > most:
                most, instant = size, at
        lives = self._saved_lives
        return {s for s in storages if lives[s][0] <= instant < lives[s][1]}

    def sum_storages(self, storages: Iterable[int]) -> int:
        """Return the bytes of storages."""
        return sum(self._size[number] for number in storages)

    def peak_of(self, layer: str, *categories: Category) -> int:
        """Return the most bytes of some categories that a layer held at once."""
        own = self._frame.filter(
            (pl.col("layer") == layer) & pl.col("category").is_in([c.value for c in categories])
        )
        return LiveBytes(*(own[name].to_numpy() for name in ("start", "end", "size_bytes"))).most

    def most_cached(self, layer: str) -> int:
        """Return the most bytes of KV cache that a layer held at once, its parts of shared ones."""
        own = self._caches.get((layer, Category.KV_CACHE))
        return LiveBytes(own.start, own.end, own.size_bytes).most if own else 0

    def layers_with_states(self) -> list[str]:
        """Return the layers that ever held a recurrent state."""
        return sorted(
            layer
            for layer, category in self._caches
            if layer and category is Category.RECURRENT_STATE
        )


def _describe_layer(
    layer: str, pairs: list[AttentionCall], blocks: _LayerBytes
) -> dict[str, object]:
    calls = _group_calls(blocks.facts, layer, pairs)
    # Kinds with scores speak before kinds without; of several, the largest call.
    largest = max(calls, key=lambda call: sum(blocks.size_of(p.result_rows) for p in call))
    speaker = max(largest, key=lambda p: (blocks.size_of(p.result_rows), p.q_len * p.k_len))
    kind = _name_kind(largest, speaker)
    # What a chunk of linear attention multiplies inside is no softmax: see scores_peak_bytes.
    is_linear = kind is AttentionKind.LINEAR
    saved = set() if is_linear else blocks.list_most_saved(_list_path_rows(pairs))
    keeping = [p for p in pairs if saved & blocks.storages_of(_list_path_rows([p]))] or largest
    extent = speaker.whole or speaker.own_extent
    return {
        "layer": layer,
        "kind": kind.value,
        "calls": len(calls),
        **asdict(extent),
        "head_dim": speaker.head_dim,
        "dtype": speaker.dtype,
        "softmax_bytes": 0 if is_linear else sum(blocks.size_of(p.result_rows) for p in largest),
        "saved_softmax_bytes": blocks.sum_storages(saved),
        "scores_peak_bytes": blocks.peak_of(layer, Category.ATTENTION_SCORES, Category.SOFTMAX),
        "mask_bytes": max(blocks.size_of(p.mask_rows) for p in pairs),
        "kv_cache_bytes": blocks.most_cached(layer),
        "predicted_saved_bytes": sum(_predict_saved(p, blocks.facts) for p in keeping),
        "backend_reason": explain_backend(blocks.facts, speaker),
    }


def _group_calls(facts: Facts, layer: str, pairs: list[AttentionCall]) -> list[list[AttentionCall]]:
    """Put together the pairs of products that one call of the layer's module made."""
    grouped: dict[int, list[AttentionCall]] = {}
    for number, pair in enumerate(pairs):
        scope = facts.enclosing_call(pair.ops[0], layer)
        grouped.setdefault(scope if scope >= 0 else -2 - number, []).append(pair)
    return list(grouped.values())


def _name_kind(call: list[AttentionCall], speaker: AttentionCall) -> AttentionKind:
    kinds = {pair.kind for pair in call}
    if AttentionKind.LINEAR in kinds and not any(pair.has_normaliser for pair in call):
        return AttentionKind.LINEAR  # scores inside a chunk serve the state
    sizes = {pair.q_len * pair.k_len for pair in call if pair.has_normaliser}
    if len(sizes) > 1 and AttentionKind.LOW_RANK in kinds <= {
        AttentionKind.LOW_RANK,
        AttentionKind.BANDED,
    }:
        return AttentionKind.LOW_RANK  # landmarks: every factor is narrower than (Tq, Tk)
    # A few tokens ask all others, and all others ask them: no factor is larger than low-rank ones.
    low_rank = [p.q_len * p.k_len for p in call if p.kind is AttentionKind.LOW_RANK]
    if low_rank and speaker.q_len * speaker.k_len <= max(low_rank):
        return AttentionKind.LOW_RANK
    return speaker.kind


def _list_path_rows(pairs: list[AttentionCall]) -> list[int]:
    """Return the operand rows between the products of calls."""
    return [row for p in pairs if p.kind is not AttentionKind.LINEAR for row in p.path_rows]


def _describe_recurrent(layer: str, blocks: _LayerBytes) -> dict[str, object]:
    row: dict[str, object] = {name: 0 if kind is pl.Int64 else "" for name, kind in SCHEMA.items()}
    return row | {
        "layer": layer,
        "kind": AttentionKind.RECURRENT.value,
        "backend_reason": "carries a state from token to token; makes no scores",
    }


def _predict_saved(call: AttentionCall, facts: Facts) -> int:
    """Return what theory says autograd keeps between QKᵀ and PV, in bytes.

    B·H·Tq·Tk elements; one copy in the softmax's dtype, one more if PV reads another dtype, and
    with dropout its mask and the dropped copy. Additive attention keeps the features of every
    score besides: what its nonlinearity made of them, or was given.
    """
    if call.kind in (AttentionKind.FUSED, AttentionKind.LINEAR, AttentionKind.OPAQUE):
        return 0
    elements = call.batch * call.heads * call.q_len * call.k_len * len(call.result_rows)
    item = ITEM_BYTES.get(call.dtype, 1)
    read = {facts.signature_of(row).dtype for row in call.path_rows} - {call.dtype, "bool"}
    casts = sum(ITEM_BYTES.get(dtype, 1) for dtype in read if dtype not in INTEGERS)
    sums = call.sum_width * item
    return elements * (item + casts + (2 * item if call.has_dropout else 0) + sums)
