"""KV cache: what it holds after every forward, what of that is used, and other forms of it."""

from typing import Any

import polars as pl
from dash import html
from dash.development.base_component import Component

from attnprof.analysis.cache_forms import LayerCache, list_forms, take_largest
from attnprof.units import format_bytes
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.figures.bars import draw_bars, draw_lines
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
    Column("own", Unit.COUNT, "used by one sequence"),
    Column("shared", Unit.COUNT),
    Column("unused", Unit.COUNT, "taken, empty"),
    Column("free", Unit.COUNT),
    Column("slack_bytes", Unit.BYTES, "room in last blocks"),
)


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
    blocks = _draw_blocks(frame, subject.scheme)
    return [
        _draw_forwards(frame, subject.scheme),
        _draw_per_token(layers, subject.scheme),
        *([blocks] if blocks is not None else []),
        *_draw_forms(layers, subject.scheme),
        _list_layers(frame),
    ]


def _tiles(layers: list[LayerCache]) -> Component:
    held = sum(layer.held_bytes for layer in layers)
    per_token = sum(layer.bytes_per_token for layer in layers)
    growing = max((layer.growing_bytes for layer in layers), default=0)
    kinds = ", ".join(dict.fromkeys(layer.kind.value for layer in layers))
    tokens = max((layer.tokens for layer in layers), default=0)
    return tiles(
        tile(format_bytes(held), f"held at most, by {len(layers)} layers"),
        tile(f"{format_bytes(round(per_token))}", "per token of one sequence, all layers"),
        tile(f"{tokens:,}", "tokens then, per sequence"),
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
    figure = draw_lines(x, series, scheme=scheme, title="forward", is_stacked=True)
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
        Column("bytes_per_token", Unit.BYTES, "per token"),
        Column("predicted_bytes", Unit.BYTES, "2 · Hkv · D · e"),
        Column("held_bytes", Unit.BYTES),
    )
    rows = [
        [x.layer, x.kind.value, x.kv_heads, x.head_dim, round(x.bytes_per_token),
         x.predicted_bytes_per_token, x.held_bytes]
        for x in ordered
    ]  # fmt: skip
    series = {
        "measured": [round(x.bytes_per_token) for x in ordered],
        "2 · Hkv · D · e": [x.predicted_bytes_per_token or 0 for x in ordered],
    }
    figure = draw_bars([x.layer for x in ordered], series, scheme=scheme)
    why = "Of one sequence, per layer; beside it the closed form: a key and a value per head."
    return Chart("per-token", "Bytes per token", why, Table(columns, rows), figure)


def _draw_blocks(frame: pl.DataFrame, scheme: str) -> Chart | None:
    """Return the blocks of paged caches; None where no engine noted its table."""
    known = frame.filter(pl.col("allocated_blocks").is_not_null())
    if known.is_empty():
        return None
    records = (
        known.group_by("forward")
        .agg(
            own=(pl.col("used_blocks") - pl.col("shared_blocks")).sum(),
            shared=pl.col("shared_blocks").sum(),
            unused=(pl.col("allocated_blocks") - pl.col("used_blocks")).sum(),
            free=pl.col("free_blocks").sum(),
            slack_bytes=pl.col("last_block_slack_bytes").sum(),
        )
        .sort("forward")
        .to_dicts()
    )
    names = {
        "used by one sequence": "own",
        "shared": "shared",
        "taken, empty": "unused",
        "free": "free",
    }
    figure = draw_lines(
        [record["forward"] for record in records],
        {name: [record[key] for record in records] for name, key in names.items()},
        scheme=scheme,
        title="forward",
        is_stacked=True,
        unit="blocks",
    )
    why = "Of all layers, as the engine noted them after every forward."
    return Chart("blocks", "Blocks over forwards", why, Table.of(_BLOCK_COLUMNS, records), figure)


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
        Column("how", Unit.NAME, "what it takes"),
    )
    rows = [
        [f.name, f.held_bytes, f.held_bytes / held, round(f.bytes_per_token), f.how] for f in forms
    ]
    figure = draw_bars(
        [f.name for f in forms], {"held": [f.held_bytes for f in forms]}, scheme=scheme
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
