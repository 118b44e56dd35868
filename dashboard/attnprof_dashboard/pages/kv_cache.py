"""KV cache: what it holds after every forward, what of that is used, and other forms of it."""

from typing import Any

import polars as pl
from dash import html
from dash.development.base_component import Component

from attnprof.analysis.cache_forms import LayerCache, list_forms, take_largest
from attnprof.analysis.cache_layers import CacheKind
from attnprof.palette import colour_of
from attnprof.run import NO_OPS
from attnprof.units import format_bytes
from attnprof.vocabulary import Category
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.figures.bars import draw_bars, draw_lines
from attnprof_dashboard.figures.blocks import STATES, draw_raster, sum_blocks
from attnprof_dashboard.figures.layers import natural_key
from attnprof_dashboard.figures.theme import FREE
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
    Column("taken", Unit.COUNT, "of sequences"),
    Column("filled", Unit.COUNT, "with a token"),
    Column("shared", Unit.COUNT, "of several sequences"),
    Column("kept", Unit.COUNT),
    Column("free", Unit.COUNT),
    Column("room", Unit.COUNT, "tokens that last blocks have room for"),
)
_USED = colour_of(Category.KV_CACHE)
_COLOURS = {
    "shared": "#c653b5",
    "used": _USED,
    "slack": "rgba(134, 32, 122, 0.45)",
    "taken, empty": "rgba(134, 32, 122, 0.25)",
    "kept": "#9aa8b8",
    "free": FREE,
    "old copy while growing": "#b8823a",
    "copies to attend": "#5f7fae",
}
"""Of what the cache holds, shades of its category; of what is beside it, colours of their own."""
_KEPT = (
    " Kept are those that are neither a sequence's nor free: an engine holds blocks for prompts "
    "that may come again, or for other layers."
)


def layout(subject: Subject) -> Component:
    """Return the page."""
    frame = subject.digest.kv_cache
    found = [chart_card(chart, "kv-cache") for chart in charts(subject)]
    if frame.is_empty():
        return html.Div([_explain_none(subject, is_noted=bool(found)), *found])
    return html.Div(
        [
            _tiles(take_largest(frame)),
            html.Div(found[:2], className="wide"),
            *found[2:],
        ]
    )


def charts(subject: Subject) -> list[Chart]:
    """Return bytes over forwards, bytes per token, blocks of paged caches, and other forms."""
    frame, noted = subject.digest.kv_cache, subject.digest.kv_blocks
    if frame.is_empty():
        return draw_blocks(noted, subject.scheme)
    layers = take_largest(frame)
    return [
        _draw_forwards(frame, subject.scheme),
        _draw_per_token(layers, subject.scheme),
        *draw_blocks(noted, subject.scheme),
        *_draw_forms(layers, subject.scheme),
        _list_layers(frame),
    ]


def _explain_none(subject: Subject, *, is_noted: bool) -> Component:
    """Say why no cache was found in what the run did."""
    if subject.digest.facts["is_imported"]:
        return message("No KV cache", f"{NO_OPS[0].upper()}{NO_OPS[1:]}.")
    none = "No forward without gradients left keys and values, or a recurrent state, behind. "
    if is_noted:
        text = "Nothing was seen to be written into the pool; below is what the engine noted of it."
        return message("No bytes of a KV cache", none, text)
    return message(
        "No KV cache", none, "Record an inference: ", html.Code("attnprof run generate.py"), "."
    )


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


def draw_blocks(blocks: pl.DataFrame, scheme: str) -> list[Chart]:
    """Return per table that an engine noted its blocks over forwards, summed up and one by one.

    Layers whose tables are the same have one.
    """
    tables: dict[str, tuple[pl.DataFrame, list[int]]] = {}
    for rows in blocks.partition_by("pool", "layers", maintain_order=True):
        own = rows.drop("pool", "layers")
        tables.setdefault(own.write_csv(), (own, []))[1].extend(rows["layers"][0])
    return [
        draw(
            f"{key}-{number}" if number else key, own, ", ".join(map(str, layers)) or "all", scheme
        )
        for number, (own, layers) in enumerate(tables.values())
        for key, draw in (("blocks", _draw_sums), ("raster", _draw_raster))
    ]


def _draw_sums(key: str, blocks: pl.DataFrame, layers: str, scheme: str) -> Chart:
    size = int(blocks["block_tokens"][0])
    sums = sum_blocks(blocks)
    series = {name: sums[name].to_list() for name in reversed(STATES)}
    figure = draw_lines(
        sums["forward"].to_list(),
        {name: values for name, values in series.items() if any(values)},
        scheme=scheme, title="forward", is_stacked=True, unit="blocks", colours=_COLOURS,
        edged="free",
    )  # fmt: skip
    why = (
        f"As the engine noted them after every forward (layers: {layers}): blocks of several "
        "sequences, of one, the room in their last blocks, and what is free."
    )
    if any(series["kept"]):
        why += _KEPT
    title = f"Blocks of {size} tokens over forwards"
    return Chart(key, title, why, Table.of(_BLOCK_COLUMNS, sums.to_dicts()), figure)


def _draw_raster(key: str, blocks: pl.DataFrame, layers: str, scheme: str) -> Chart:
    figure, per_row = draw_raster(blocks, scheme=scheme, colours=_COLOURS)
    why = (
        f"Each block of the pool after every forward (layers: {layers}): of several sequences, "
        "full, with room left, taken and empty, or free."
    )
    if any(trace.name == "kept" for trace in figure.data):
        why += (
            f"{_KEPT} Which ones was not noted: those that sequences left full, the latest first."
        )
    if per_row > 1:
        why += f" A row stands for {per_row} blocks, in the state that most of them are in."
    columns = [Column(name, Unit.COUNT) for name in ("forward", "block", "tokens", "sequences")]
    table = Table(tuple(columns), blocks.select(c.name for c in columns).rows())
    return Chart(key, "Block by block", why, table, figure)


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
