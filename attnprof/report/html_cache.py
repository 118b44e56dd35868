"""The page's section on KV caches: what they cost, and a map of what they hold."""

from collections.abc import Iterable
from html import escape

from attnprof.palette import colour_of
from attnprof.report.cache_map import Area, BlockChart, StripGroup, draw_blocks, draw_strips
from attnprof.report.cache_summary import (
    CacheSummary,
    group_caches,
    pick_forwards,
    write_cache_sentence,
    write_transient_sentence,
)
from attnprof.report.cache_text import show_bytes, show_heads
from attnprof.report.drawing import HEIGHT, WIDTH
from attnprof.report.html_parts import make_row, make_section, make_table, percent, show_layer
from attnprof.report.words import format_seconds
from attnprof.units import format_bytes
from attnprof.vocabulary import Category

_MOST_TICKS = 6
_BESIDE = "growing and expanded: the most that one layer took beside its cache"
_KEYS = {
    "used": "filled with tokens",
    "empty": "held, not filled",
    "older": "the older copy, while a longer one is made",
}
_BLOCK_KEYS = {
    "shared": "of several sequences",
    "used": "of one sequence",
    "slack": "not filled, in blocks with tokens",
    "reserved": "given to a sequence, no token yet",
    "free": "free",
    "kept": "neither a sequence's nor free",
}


def make_cache(summary: CacheSummary | None) -> str:
    """Return the section; nothing for a run that keeps nothing."""
    if summary is None:
        return ""
    why = escape(f"{write_cache_sentence(summary)} {write_transient_sentence(summary)}")
    parts = [
        _map(summary),
        _headed("Growth per token", _growth_table(summary), _BESIDE),
        _headed("Layers, after the forward that left most", _layer_table(summary)),
    ]
    if summary.fixed:
        title = "Peaks with a cache of fixed length, predicted"
        parts.append(_headed(title, _fixed_table(summary)))
    return make_section("KV cache", why, "".join(parts))


def _map(summary: CacheSummary) -> str:
    """Return what is held after every forward: a chart per block table, a strip per other layer."""
    parts = [_block_chart(chart) for chart in draw_blocks(summary.frame)]
    groups = draw_strips(summary.frame)
    if groups:
        parts.append(_legend(_KEYS, [s.areas for g in groups for s in g.strips]))
        parts += [_strip_group(group) for group in groups]
    return f'<div class="cache">{"".join(parts)}{_axis(summary)}</div>'


def _headed(title: str, body: str, remark: str = "") -> str:
    return f"<h3>{title}{f'<span>{remark}</span>' if remark else ''}</h3>{body}"


def _strip_group(group: StripGroup) -> str:
    what = f"{group.kind} · the full height is {format_bytes(group.top_bytes)}"
    strips = "".join(
        f'<div class="rowlabel">{escape(strip.label)}</div>'
        + _strip(f"{format_bytes(strip.held_bytes)} at most", strip.areas, group.category)
        for strip in group.strips
    )
    many = " many" if len(group.strips) > 8 else ""
    return (
        f'<p class="of"><b>{show_layer(group.name, 1)}</b> {escape(what)}</p>'
        f'<div class="strips{many}">{strips}</div>'
    )


def _block_chart(chart: BlockChart) -> str:
    what = f"{chart.blocks:,} blocks of {chart.block_tokens} tokens"
    return (
        f'<p class="of"><b>{show_layer(chart.name, 1)}</b> {what}</p>'
        f"{_legend(_BLOCK_KEYS, [chart.areas])}"
        '<div class="strips blocks">'
        f'<div class="rowlabel"><span>{chart.blocks:,}</span><span>0</span></div>'
        f"{_strip(what, chart.areas, Category.KV_CACHE)}</div>"
    )


def _strip(label: str, areas: Iterable[Area], category: str) -> str:
    """Return a picture as wide as there is room; the label is for pointers and screen readers."""
    paths = "".join(f'<path class="{area.kind}" d="{area.path}"/>' for area in areas)
    return (
        f'<div class="strip" role="img" title="{label}" aria-label="{label}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true" '
        f'style="--c:{colour_of(category)}">{paths}</svg></div>'
    )


def _legend(words: dict[str, str], pictures: Iterable[Iterable[Area]]) -> str:
    """Return the legend of what occurs in some pictures."""
    shown = {area.kind for areas in pictures for area in areas}
    colour = colour_of(Category.KV_CACHE)
    entries = "".join(
        f'<li><i class="{kind}" style="--c:{colour}"></i>{text}</li>'
        for kind, text in words.items()
        if kind in shown
    )
    return f'<ul class="keys">{entries}</ul>'


def _axis(summary: CacheSummary) -> str:
    """Return the numbers of steps below the pictures."""
    steps = summary.growth["step"].to_list()
    count = len(steps)
    every = -(-count // _MOST_TICKS)
    ticks = "".join(
        f'<span style="left:{percent((at + 0.5) / count)}">{steps[at]}</span>'
        for at in range(0, count, every)
    )
    label = '<div class="rowlabel">step</div>'
    return f'<div class="strips axis">{label}<div class="ticks">{ticks}</div></div>'


def _growth_table(summary: CacheSummary) -> str:
    head = [
        ("num", "step"),
        ("", "phase"),
        ("num", "tokens"),
        ("num", "held"),
        ("num middle", "used"),
        ("num middle", "growing"),
        ("num wide", "expanded"),
        ("num", "time"),
    ]
    rows = [
        make_row(
            [
                ("num", str(row["step"])),
                ("word", escape(row["phase"])),
                ("num", "–" if row["tokens"] is None else f"{row['tokens']:,}"),
                ("num", format_bytes(row["held_bytes"])),
                ("num middle", format_bytes(row["used_bytes"])),
                ("num middle", format_bytes(row["growing_bytes"])),
                ("num wide", format_bytes(row["expanded_bytes"])),
                ("num", format_seconds(row["wall_seconds"])),
            ]
        )
        for row in pick_forwards(summary.growth).iter_rows(named=True)
    ]
    return make_table(head, rows)


def _layer_table(summary: CacheSummary) -> str:
    head = [
        ("", "layer"),
        ("", "kind"),
        ("middle", "heads × D"),
        ("num", "tokens"),
        ("num", "held, each"),
        ("num", "per token"),
        ("num middle", "predicted"),
    ]
    rows = []
    for name, count, layer in group_caches(summary.layers):
        predicted = layer.predicted_bytes_per_token if layer.tokens else None
        rows.append(
            make_row(
                [
                    ("name", show_layer(name, count)),
                    ("word", escape(layer.kind.value)),
                    ("word middle", show_heads(layer)),
                    ("num", f"{layer.tokens:,}" if layer.tokens else "–"),
                    ("num", format_bytes(layer.held_bytes)),
                    ("num", f"{layer.bytes_per_token:g} B" if layer.tokens else "–"),
                    ("num middle", "–" if predicted is None else f"{predicted} B"),
                ]
            )
        )
    return make_table(head, rows)


def _fixed_table(summary: CacheSummary) -> str:
    head = [("", "cache"), ("num", "in prefill"), ("num", "in decode"), ("num", "of the run")]
    rows = [
        make_row(
            [
                ("name", escape(peaks.form)),
                ("num", show_bytes(peaks.prefill_bytes)),
                ("num", show_bytes(peaks.decode_bytes)),
                ("num", format_bytes(peaks.total_bytes)),
            ]
        )
        for peaks in summary.fixed
    ]
    return make_table(head, rows)
