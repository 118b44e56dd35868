"""A run's KV cache as tables of text, for whichever report shows them."""

from collections.abc import Iterator

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from attnprof.analysis.cache_forms import LayerCache
from attnprof.report.cache_summary import (
    CacheSummary,
    group_caches,
    pick_forwards,
    write_cache_sentence,
    write_transient_sentence,
)
from attnprof.report.fold import fold_names
from attnprof.report.tables import Column, FittedTable, show_name
from attnprof.report.words import format_seconds
from attnprof.units import format_bytes


def render_cache(summary: CacheSummary) -> RenderableType:
    """Return what a report on the whole run says of its cache."""
    parts: list[RenderableType] = [
        Text(write_cache_sentence(summary)),
        Text(write_transient_sentence(summary)),
    ]
    for title, table in list_cache_tables(summary):
        parts += [Text(), Text(title, style="dim"), table]
    return Group(*parts)


def list_cache_tables(summary: CacheSummary) -> Iterator[tuple[str, RenderableType]]:
    """Yield the titles and bodies of what is to say of a cache, the most important first."""
    forwards, shown = len(summary.growth), len(pick_forwards(summary.growth))
    some = f", {shown} of {forwards} forwards" if shown < forwards else ""
    yield f"Growth{some}", _render_growth(summary)
    yield "Layers, after the forward that left most", _render_layers(summary)
    if summary.fixed:
        yield "Peaks with a cache of fixed length, predicted", _render_fixed(summary)
    blocks = _render_blocks(summary)
    if blocks is not None:
        yield "Blocks", blocks


def _render_growth(summary: CacheSummary) -> RenderableType:
    """Return the cache after the first forwards, the last ones, and some in between."""
    rows: list[list[RenderableType]] = [
        [
            str(row["step"]),
            row["phase"],
            "–" if row["tokens"] is None else str(row["tokens"]),
            format_bytes(row["held_bytes"]),
            format_bytes(row["used_bytes"]),
            format_bytes(row["growing_bytes"]),
            format_bytes(row["expanded_bytes"]),
            format_seconds(row["wall_seconds"]),
        ]
        for row in pick_forwards(summary.growth).iter_rows(named=True)
    ]
    columns = [
        Column("step", right=True),
        Column("phase"),
        Column("tokens", right=True),
        Column("held", right=True),
        Column("used", right=True, drop=2),
        Column("growing", right=True, drop=4),
        Column("expanded", right=True, drop=3),
        Column("wall", right=True, drop=1),
    ]
    return FittedTable(columns, rows)


def _render_layers(summary: CacheSummary) -> RenderableType:
    """Return a row per group of layers that are alike."""
    rows: list[list[RenderableType]] = []
    for names, _count, first in group_caches(summary.layers):
        predicted = first.predicted_bytes_per_token
        rows.append(
            [
                Text(show_name(names)),
                first.kind.value,
                show_heads(first),
                str(first.tokens) if first.tokens else "–",
                format_bytes(first.held_bytes),
                f"{first.bytes_per_token:g} B" if first.tokens else "–",
                "–" if predicted is None or not first.tokens else f"{predicted} B",
            ]
        )
    columns = [
        Column("layer", is_name=True),
        Column("kind"),
        Column("heads", right=True, drop=2),
        Column("tokens", right=True, drop=3),
        Column("held, each", right=True),
        Column("per token", right=True),
        Column("predicted", right=True, drop=1),
    ]
    return FittedTable(columns, rows)


def _render_fixed(summary: CacheSummary) -> RenderableType:
    rows: list[list[RenderableType]] = [
        [
            Text(peaks.form),
            show_bytes(peaks.prefill_bytes),
            show_bytes(peaks.decode_bytes),
            format_bytes(peaks.total_bytes),
        ]
        for peaks in summary.fixed
    ]
    columns = [
        Column("cache", is_name=True),
        Column("in prefill", right=True),
        Column("in decode", right=True),
        Column("of the run", right=True),
    ]
    return FittedTable(columns, rows)


def show_heads(layer: LayerCache) -> str:
    """Return heads and their width; the widths of K and V where they differ."""
    if not layer.kv_heads:
        return "–"
    is_same = layer.value_dim in (0, layer.head_dim)
    width = layer.head_dim if is_same else f"{layer.head_dim}/{layer.value_dim}"
    return f"{layer.kv_heads} × {width}"


def show_bytes(size_bytes: int | None) -> str:
    """Return bytes as text, and a dash where they are not known."""
    return "–" if size_bytes is None else format_bytes(size_bytes)


def _render_blocks(summary: CacheSummary) -> RenderableType | None:
    """Return how full the pages were at the forward that used most of them."""
    known = summary.frame.drop_nulls("block_tokens")
    if known.is_empty():
        return None
    most = known.sort("used_blocks")["forward"][-1]
    tables = known.filter(pl.col("forward") == most).group_by(_COUNTS, maintain_order=True)
    rows: list[list[RenderableType]] = []
    for counts, layers in tables:
        slack = int(layers["last_block_slack_bytes"].sum())
        used = int(layers["used_bytes"].sum())
        name = Text(show_name(", ".join(fold_names(layers["layer"].to_list()))))
        shares = [format_bytes(slack), f"{slack / max(1, slack + used):.1%}"]
        rows.append([name, *map(str, counts), *shares])
    titles = ("tokens a block", "allocated", "used", "shared", "free", "empty in used", "waste")
    numbers = [Column(title, right=True) for title in titles]
    return FittedTable([Column("layer", is_name=True), *numbers], rows)


_COUNTS = ("block_tokens", "allocated_blocks", "used_blocks", "shared_blocks", "free_blocks")
"""Columns of a block table."""
