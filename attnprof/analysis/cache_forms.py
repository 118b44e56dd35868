"""A recorded cache in other forms: fewer heads, fewer bits, a latent, a window, pages.

Closed forms at the length and batch that were recorded; what a form saves at the peak of the whole
run is a question for a what-if, since the peak moves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from attnprof.analysis.cache_layers import CacheKind
from attnprof.attribution.facts import ITEM_BYTES
from attnprof.vocabulary import Category, Phase

PAGE_TOKENS = 16
"""Tokens per page: as in PagedAttention (arXiv 2309.06180), and vLLM's default."""
GROUP = 64
"""Elements that share a 16-bit scale and zero point in a 4-bit cache, as in transformers."""
_REWRITABLE = frozenset(
    {CacheKind.GROWN, CacheKind.WINDOW, CacheKind.PREALLOCATED, CacheKind.PAGED}
)
"""Kinds that hold K and V of the own sequence, element by element."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's cache at the instant of most bytes."""

    layer: str
    kind: CacheKind
    batch: int
    kv_heads: int
    head_dim: int
    """The width of a head of K."""
    value_dim: int
    """The width of a head of V."""
    tokens: int
    """Per sequence; 0 for states."""
    item_bytes: int
    held_bytes: int
    bytes_per_token: float
    """Of one sequence."""
    growing_bytes: int
    expanded_bytes: int
    transient_bytes: int
    """The most that it took beside what it left."""
    is_bounded: bool = False
    """Whether it was seen to stop growing: a window, whatever form it has."""

    @property
    def predicted_bytes_per_token(self) -> int | None:
        """Hkv · (D + Dv) · e: a key and a value per head, in the cache's dtype.

        None where the cache is not K and V as they are (quantised, latent, states).
        """
        if self.kind not in _REWRITABLE and self.kind is not CacheKind.CROSS:
            return None
        return self.elements_per_token * self.item_bytes

    @property
    def elements_per_token(self) -> int:
        """Numbers in the key and the value of every head."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def held_tokens(self) -> float:
        """Tokens that what is held has room for, per sequence: more than can be reached."""
        each = self.bytes_per_token * self.batch
        return self.held_bytes / each if each else 0.0

    @property
    def is_state(self) -> bool:
        """Whether it is as large for one token as for a thousand."""
        return self.kind is CacheKind.STATE


def take_growing(layers: Sequence[LayerCache]) -> list[LayerCache]:
    """Return the layers that keep something of every token of the own sequence."""
    return [layer for layer in layers if layer.tokens and layer.kind is not CacheKind.CROSS]


@dataclass(frozen=True, slots=True)
class Form:
    """What the recorded cache would hold in another form."""

    name: str
    how: str
    bytes_per_token: float
    """Of one sequence, all layers; what grows with it."""
    held_bytes: int
    """On the device, for the tokens and sequences that were recorded."""


def find_largest(frame: pl.DataFrame) -> int:
    """Return the forward that left most bytes; of several, the one that filled most of them."""
    sums = (
        frame.group_by("forward")
        .agg(pl.col("held_bytes", "used_bytes").sum())
        .sort("held_bytes", "used_bytes", "forward")
    )
    return int(sums["forward"][-1])


def take_largest(frame: pl.DataFrame) -> list[LayerCache]:
    """Return the layers of a run's `kv_cache` after the forward that left most bytes.

    Args:
        frame: What `describe_kv_cache` returns; must have rows.
    """
    rows = frame.filter(pl.col("forward") == find_largest(frame))
    bounded = _find_bounded(frame)
    return [
        LayerCache(
            layer=row["layer"],
            kind=CacheKind(row["kind"]),
            batch=row["batch"] or 1,
            kv_heads=row["kv_heads"] or 0,
            head_dim=row["head_dim"] or 0,
            value_dim=row["value_dim"] or 0,
            tokens=row["tokens"] or 0,
            item_bytes=ITEM_BYTES.get(row["dtype"], 1),
            held_bytes=row["held_bytes"],
            bytes_per_token=row["bytes_per_token"] or 0.0,
            growing_bytes=row["growing_bytes"],
            expanded_bytes=row["expanded_bytes"],
            transient_bytes=row["transient_bytes"],
            is_bounded=row["layer"] in bounded,
        )
        for row in rows.iter_rows(named=True)
        if row["category"] == Category.KV_CACHE or row["kind"] == CacheKind.STATE
    ]


def _find_bounded(frame: pl.DataFrame) -> set[str]:
    """Return layers with a window: those that hold as many tokens however many are decoded.

    Pages are shared by requests that come and go, an encoder's tokens are given, and what is not
    concatenated anew belongs to a model that was not called.
    """
    own = frame.filter(
        pl.col("tokens").is_not_null()
        & pl.col("phase").eq(Phase.DECODE.value)
        & pl.col("kind").is_in([CacheKind.PAGED.value, CacheKind.CROSS.value]).not_()
        & (pl.col("kind").ne(CacheKind.GROWN.value) | (pl.col("growing_bytes") > 0))
    )
    lengths = own.group_by("layer").agg(pl.len(), pl.col("tokens").n_unique())
    still = lengths.filter((pl.col("len") > 1) & (pl.col("tokens") == 1))
    windows = frame.filter(pl.col("kind") == CacheKind.WINDOW.value)
    return {*still["layer"], *windows["layer"]}


def list_forms(layers: Sequence[LayerCache], *, window: int = 1024) -> list[Form]:
    """Return the recorded cache in other forms, for those of its layers that they apply to.

    Args:
        layers: As `take_largest` returns them.
        window: Tokens of the sliding window to ask for.
    """
    own = [layer for layer in layers if layer.kind in _REWRITABLE and layer.bytes_per_token]
    rest = [layer for layer in layers if layer not in own]
    if not own:
        return []
    fixed = sum(layer.held_bytes for layer in rest)

    def make(name: str, how: str, factors: Sequence[float], lengths: Sequence[int]) -> Form:
        each = [layer.bytes_per_token * f for layer, f in zip(own, factors, strict=True)]
        held = sum(
            math.ceil(b * n) * layer.batch
            for layer, b, n in zip(own, each, lengths, strict=True)
        )  # fmt: skip
        return Form(name, how, sum(each), fixed + held)

    same, tokens = [1.0] * len(own), [layer.tokens for layer in own]
    int4_bits = 4 + 2 * 16 / GROUP
    forms = [
        make("as it is, without slack", "", same, tokens),
        make(
            "one key/value head (MQA)",
            "another architecture: num_key_value_heads=1",
            [1 / layer.kv_heads for layer in own],
            tokens,
        ),
        make(
            "half the key/value heads (GQA)",
            "another architecture",
            [max(1, layer.kv_heads // 2) / layer.kv_heads for layer in own],
            tokens,
        ),
        make("FP8", "a byte per element", [1 / layer.item_bytes for layer in own], tokens),
        make(
            "4 bits",
            f"and a scale and a zero point for {GROUP} elements",
            [int4_bits / 8 / layer.item_bytes for layer in own],
            tokens,
        ),
        make(
            "a latent (MLA)",
            "another architecture: 4.5 D elements, as in DeepSeek-V2",
            [min(1.0, 4.5 * layer.head_dim / layer.elements_per_token) for layer in own],
            tokens,
        ),
        make(
            f"a window of {window} tokens",
            "another architecture, or eviction",
            same,
            [min(n, window) for n in tokens],
        ),
        make(
            f"pages of {PAGE_TOKENS} tokens",
            "no copies while it grows; a part of each last page is empty",
            same,
            [-(-n // PAGE_TOKENS) * PAGE_TOKENS for n in tokens],
        ),
    ]
    on_device = sorted((layer.held_bytes for layer in own), reverse=True)[:2]
    per_token = sum(layer.bytes_per_token for layer in own)
    forms.append(
        Form(
            "in host memory",
            "but for the layer that attends and the next one",
            per_token * len(on_device) / len(own),
            fixed + sum(on_device),
        )
    )
    return forms


def cache_bytes_at(layers: Sequence[LayerCache], *, tokens: int, batch: int) -> int:
    """Return what the recorded kind of cache takes at another length and batch.

    Caches grow with tokens, windows up to their own length, states and caches of another sequence
    do not; all grow with the batch. A window that is a view of the whole prompt keeps all of it. To
    that comes what the layer that takes most takes beside it at the worst instant: older and newer
    copy side by side, repeated heads.
    """
    total, transient = 0.0, 0.0
    for layer in layers:
        if layer.is_state or layer.kind is CacheKind.CROSS or not layer.tokens:
            total += layer.held_bytes / layer.batch * batch
            continue
        kept, span = float(tokens), float(layer.tokens)
        if layer.is_bounded:
            span = layer.held_tokens
            is_whole_prompt = layer.kind is CacheKind.WINDOW and span > layer.tokens + 1
            kept = tokens if is_whole_prompt else min(tokens, span)
        total += layer.bytes_per_token * kept * batch
        transient = max(transient, layer.transient_bytes / (span * layer.batch) * kept * batch)
    return math.ceil(total + transient)


def max_batch(layers: Sequence[LayerCache], *, tokens: int, room_bytes: int) -> int:
    """Return the most sequences of a length whose caches fit into some room."""
    each = cache_bytes_at(layers, tokens=tokens, batch=1)
    return max(0, room_bytes // each) if each else 0


@dataclass(frozen=True, slots=True)
class Fit:
    """How many sequences of one length fit into some room."""

    tokens: int
    sequences: int
    sequence_bytes: int
    """The cache of one of them, with its transients."""


CONTEXTS = (4 * 2**10, 8 * 2**10, 32 * 2**10, 128 * 2**10)
"""Lengths for which it is asked how many sequences fit."""


def list_fits(
    layers: Sequence[LayerCache], *, room_bytes: int, contexts: Sequence[int] = CONTEXTS
) -> list[Fit]:
    """Return the largest batch per context; none where a layer's bytes per token are not known."""
    if not layers or not all(layer.tokens or layer.is_state for layer in layers):
        return []
    return [
        Fit(
            tokens=tokens,
            sequences=max_batch(layers, tokens=tokens, room_bytes=room_bytes),
            sequence_bytes=cache_bytes_at(layers, tokens=tokens, batch=1),
        )
        for tokens in contexts
    ]
