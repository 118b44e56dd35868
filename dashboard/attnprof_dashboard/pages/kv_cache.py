"""KV cache: what it holds after every forward, what of that is used, and other forms of it."""

from typing import Any

import polars as pl
from dash import html
from dash.development.base_component import Component

from attnprof.analysis.cache_forms import LayerCache, list_forms, take_largest
from attnprof.analysis.cache_layers import CacheKind
from attnprof.palette import colour_of
from attnprof.report.fold import fold_names
from attnprof.units import format_bytes
from attnprof.vocabulary import Category
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.figures.bars import draw_bars, draw_lines
from attnprof_dashboard.figures.blocks import draw_raster
from attnprof_dashboard.figures.layers import natural_key
from attnprof_dashboard.pages.page import Page, Subject
from attnprof_dashboard.table import Column, Table, Unit

_FORWARD_COLUMNS = (
    Column("forward", Unit.COUNT),
    Column("phase"),
    Column("tokens", Unit.COUNT),
    Column("held_bytes", Unit.BYTES),
    Column("used_bytes", Unit.BYTES),
    Column("slack_bytes", Unit.BYTES),
    Column("growing_bytes", Unit.BYTES, "old copy while growing"),
    Column("expanded_bytes", Unit.BYTES, "copies to attend"),
)
_BLOCK_COLUMNS = (
    Column("forward", Unit.COUNT),
    Column("tokens", Unit.COUNT),
    Column("allocated_blocks", Unit.COUNT, "of sequences"),
    Column("used_blocks", Unit.COUNT, "with a token"),
    Column("shared_blocks", Unit.COUNT, "of several sequences"),
    Column("free_blocks", Unit.COUNT, "free"),
    Column("last_block_slack_bytes", Unit.BYTES, "room in last blocks, per layer"),
)
_USED = colour_of(Category.KV_CACHE)
_COLOURS = {
    "shared": "#c653b5",
    "used": _USED,
    "slack": "rgba(134, 32, 122, 0.45)",
    "taken, empty": "rgba(134, 32, 122, 0.25)",
    "free": "rgba(140, 143, 123, 0.22)",
    "old copy while growing": "#b8823a",
    "copies to attend": "#5f7fae",
}
"""Of what the cache holds, shades of its category; of what is beside it, colours of their own."""


def layout(subject: Subject) -> Component:
    """Return the page."""
    frame = subject.digest.kv_cache
    if frame.is_empty():
        return message(
            "No KV cache",
            "No forward without gradients left keys and values, or a recurrent state, behind. "
            "Record an inference: ",
            html.Code("attnprof run generate.py"),
            ".",
        )
    found = [chart_card(chart, "kv-cache") for chart in charts(subject)]
    return html.Div(
        [
            _tiles(take_largest(frame)),
            html.Div(found[:2], className="wide"),
            *found[2:],
        ]
    )


def charts(subject: Subject) -> list[Chart]:
    """Return bytes over forwards, bytes per token, blocks of paged caches, and other forms."""
    frame = subject.digest.kv_cache
    if frame.is_empty():
        return []
    layers = take_largest(frame)
    return [
        _draw_forwards(frame, subject.scheme),
        _draw_per_token(layers, subject.scheme),
        *draw_blocks(frame, subject.scheme),
        *draw_rasters(subject.digest.kv_blocks, subject.scheme),
        *_draw_forms(layers, subject.scheme),
        _list_layers(frame),
    ]


def _tiles(layers: list[LayerCache]) -> Component:
    held = sum(layer.held_bytes for layer in layers)
    per_token = sum(layer.bytes_per_token for layer in layers)
    growing = max((layer.growing_bytes for layer in layers), default=0)
    kinds = ", ".join(dict.fromkeys(layer.kind.value for layer in layers))
    tokens = max((layer.tokens for layer in layers), default=0)
    is_paged = any(layer.kind is CacheKind.PAGED for layer in layers)
    whose = "of all sequences" if is_paged else "per sequence"
    return tiles(
        tile(format_bytes(held), f"held at most, by {len(layers)} layers"),
        tile(f"{format_bytes(round(per_token))}", "per token of one sequence, all layers"),
        tile(f"{tokens:,}", f"tokens then, {whose}"),
        tile(format_bytes(growing), f"the copy while a layer grows; kind: {kinds}"),
    )


def sum_forwards(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Return a record per forward: what its layers hold together, and the worst transients."""
    return (
        frame.group_by("forward")
        .agg(
            pl.col("phase").first(),
            pl.col("tokens").max(),
            pl.col("held_bytes").sum(),
            pl.col("used_bytes").sum(),
            slack_bytes=(pl.col("held_bytes") - pl.col("used_bytes")).sum(),
            growing_bytes=pl.col("growing_bytes").max(),
            expanded_bytes=pl.col("expanded_bytes").max(),
        )
        .sort("forward")
        .to_dicts()
    )


def _draw_forwards(frame: pl.DataFrame, scheme: str) -> Chart:
    records = sum_forwards(frame)
    names = {
        "used": "used_bytes",
        "slack": "slack_bytes",
        "old copy while growing": "growing_bytes",
        "copies to attend": "expanded_bytes",
    }
    series = {
        name: [record[key] for record in records]
        for name, key in names.items()
        if any(record[key] for record in records)
    }
    x = [record["forward"] for record in records]
    figure = draw_lines(
        x, series, scheme=scheme, title="forward", is_stacked=True, colours=_COLOURS
    )
    why = (
        "After every forward: what tokens were written to, and room that was taken for more. On "
        "top, what the worst layer takes for a moment: the older copy while a cache is "
        "concatenated, and copies made in order to attend."
    )
    return Chart(
        "forwards", "Bytes over forwards", why, Table.of(_FORWARD_COLUMNS, records), figure
    )


def _draw_per_token(layers: list[LayerCache], scheme: str) -> Chart:
    ordered = sorted(layers, key=lambda layer: natural_key(layer.layer))
    columns = (
        Column("layer", Unit.NAME),
        Column("kind"),
        Column("kv_heads", Unit.COUNT, "Hkv"),
        Column("head_dim", Unit.COUNT, "D"),
        Column("value_dim", Unit.COUNT, "Dv"),
        Column("bytes_per_token", Unit.BYTES, "per token"),
        Column("predicted_bytes", Unit.BYTES, "Hkv · (D + Dv) · e"),
        Column("held_bytes", Unit.BYTES),
    )
    rows = [
        [x.layer, x.kind.value, x.kv_heads, x.head_dim, x.value_dim, round(x.bytes_per_token),
         x.predicted_bytes_per_token, x.held_bytes]
        for x in ordered
    ]  # fmt: skip
    series = {
        "measured": [round(x.bytes_per_token) for x in ordered],
        "Hkv · (D + Dv) · e": [x.predicted_bytes_per_token or 0 for x in ordered],
    }
    figure = draw_bars(
        [x.layer for x in ordered], series, scheme=scheme, colours={"measured": _USED}
    )
    why = "Of one sequence, per layer; beside it the closed form: a key and a value per head."
    return Chart("per-token", "Bytes per token", why, Table(columns, rows), figure)


def draw_blocks(frame: pl.DataFrame, scheme: str) -> list[Chart]:
    """Return the blocks of each table that an engine noted; layers that share one have one."""
    known = frame.filter(pl.col("allocated_blocks").is_not_null())
    tables: dict[str, tuple[pl.DataFrame, list[str]]] = {}
    for (layer,), rows in known.group_by("layer", maintain_order=True):
        own = rows.select("block_tokens", *(c.name for c in _BLOCK_COLUMNS)).sort("forward")
        tables.setdefault(own.write_csv(), (own, []))[1].append(str(layer))
    return [
        _draw_table(f"blocks-{number}" if number else "blocks", rows, layers, scheme)
        for number, (rows, layers) in enumerate(tables.values())
    ]


def _draw_table(key: str, rows: pl.DataFrame, layers: list[str], scheme: str) -> Chart:
    size = int(rows["block_tokens"][0])
    filled = pl.max_horizontal("shared_blocks", pl.col("tokens") / size)
    filled = pl.min_horizontal(filled, "used_blocks")
    levels = rows.select(
        "forward",
        shared=pl.col("shared_blocks"),
        used=filled - pl.col("shared_blocks"),
        slack=pl.col("used_blocks") - filled,
        empty=pl.col("allocated_blocks") - pl.col("used_blocks"),
        free=pl.col("free_blocks"),
    )
    names = {"shared": "shared", "used": "used", "slack": "slack", "taken, empty": "empty"}
    series = {n: levels[c].to_list() for n, c in (names | {"free": "free"}).items()}
    figure = draw_lines(
        levels["forward"].to_list(),
        {name: values for name, values in series.items() if any(values)},
        scheme=scheme, title="forward", is_stacked=True, unit="blocks", colours=_COLOURS,
    )  # fmt: skip
    of = ", ".join(fold_names(layers))
    why = (
        f"As the engine noted them after every forward, for {of}: blocks of several sequences, of "
        "one, the room in their last blocks, and what is free."
    )
    title = f"Blocks of {size} tokens over forwards"
    return Chart(key, title, why, Table.of(_BLOCK_COLUMNS, rows.to_dicts()), figure)


def draw_rasters(blocks: pl.DataFrame, scheme: str) -> list[Chart]:
    """Return for each table that an engine noted its blocks over forwards, one by one."""
    if blocks.is_empty():
        return []
    tables = blocks.partition_by("pool", "layers", maintain_order=True)
    return [_draw_raster(number, rows, scheme) for number, rows in enumerate(tables)]


def _draw_raster(number: int, rows: pl.DataFrame, scheme: str) -> Chart:
    figure, per_row = draw_raster(rows, scheme=scheme, colours=_COLOURS)
    layers = ", ".join(map(str, rows["layers"][0])) or "all"
    why = (
        f"Each block of the pool after every forward (layers: {layers}): of several sequences, "
        "full, with room left, taken and empty, or free."
    )
    if per_row > 1:
        why += f" A row stands for {per_row} blocks, in the state that most of them are in."
    columns = [Column(name, Unit.COUNT) for name in ("forward", "block", "tokens", "sequences")]
    table = Table(tuple(columns), rows.select(c.name for c in columns).rows())
    return Chart(f"raster-{number}" if number else "raster", "Block by block", why, table, figure)


def _draw_forms(layers: list[LayerCache], scheme: str) -> list[Chart]:
    forms = list_forms(layers)
    if not forms:
        return []
    held = sum(layer.held_bytes for layer in layers) or 1
    columns = (
        Column("form", Unit.NAME),
        Column("held_bytes", Unit.BYTES),
        Column("share", Unit.SHARE, "of now"),
        Column("bytes_per_token", Unit.BYTES, "per token"),
        Column("how", Unit.PROSE, "what it takes"),
    )
    rows = [
        [f.name, f.held_bytes, f.held_bytes / held, round(f.bytes_per_token), f.how] for f in forms
    ]
    figure = draw_bars(
        [f.name for f in forms],
        {"held": [f.held_bytes for f in forms]},
        scheme=scheme,
        colours={"held": _USED},
    )
    why = (
        "The recorded cache in other forms, at the length and batch that were recorded. What a "
        "form saves at the peak of the whole run is under “What would lower it”."
    )
    return [Chart("forms", "In other forms", why, Table(columns, rows), figure)]


def _list_layers(frame: pl.DataFrame) -> Chart:
    columns = (
        Column("forward", Unit.COUNT),
        Column("phase"),
        Column("layer", Unit.NAME),
        Column("category", Unit.CATEGORY),
        Column("kind"),
        Column("dtype"),
        Column("tokens", Unit.COUNT),
        Column("held_bytes", Unit.BYTES),
        Column("reachable_bytes", Unit.BYTES),
        Column("used_bytes", Unit.BYTES),
        Column("transient_bytes", Unit.BYTES),
    )
    last = frame.filter(pl.col("forward") == frame["forward"].max())
    title = "Layer by layer, after the last forward"
    return Chart(
        "layers", title, "Every layer that holds something.", Table.of(columns, last.to_dicts())
    )


PAGE = Page("kv-cache", "KV cache", "What is kept of past tokens", layout, charts)
