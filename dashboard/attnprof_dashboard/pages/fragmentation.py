"""Fragmentation: what the allocator keeps beyond live tensors, and what runs out first."""

from typing import Any

import numpy as np
from dash import html
from dash.development.base_component import Component

from attnprof.report.verdict import format_share
from attnprof.units import format_bytes
from attnprof.vocabulary import Status
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.data.segment_map import MOST_EVENTS
from attnprof_dashboard.figures.segments import draw_reserved, draw_segments
from attnprof_dashboard.pages.overview import OUTSIDE
from attnprof_dashboard.pages.page import Page, Subject
from attnprof_dashboard.table import Column, Table, Unit

_LEVELS = {
    "reserved": "reserved_bytes",
    "allocated": "allocated_bytes",
    "asked for": "requested_bytes",
}


def layout(subject: Subject) -> Component:
    """Return the page."""
    found = subject.device.facts["allocator"]
    if found is None:
        return message("No segments", _explain_none(subject))
    cards = [chart_card(chart, "fragmentation") for chart in charts(subject)]
    return html.Div([_say_how(subject), _tiles(found), *cards])


def charts(subject: Subject) -> list[Chart]:
    """Return what is reserved over time, the segments, and what less memory would end with."""
    found = subject.device.facts["allocator"]
    if found is None:
        return []
    return [
        _draw_reserved(subject, found),
        _draw_segments(subject, found),
        _list_ends(subject, found),
    ]


def _explain_none(subject: Subject) -> str:
    if not subject.device.facts["blocks"]:
        return "Nothing was allocated, so the allocator holds nothing."
    return (
        f"The run has {len(subject.device.index):,} events; up to {MOST_EVENTS:,} are replayed "
        "through the allocator. Record fewer steps to see its segments."
    )


def _say_how(subject: Subject) -> Component:
    """Say where the numbers come from: the allocator is simulated, and on what."""
    text = (
        "Simulated: the run's own requests, replayed in order through CUDA's caching allocator "
        "with its default settings, on one stream. "
    )
    if subject.device.name == "cpu":
        text += "The run itself was on the CPU, which has no such allocator."
    parts: list[Component] = [message("What this shows", text)]
    if subject.entry.status == Status.OUT_OF_MEMORY.value:
        parts.append(message("The run ran out of memory", subject.entry.reason, is_bad=True))
    return html.Div(parts, className="stacked")


def _tiles(found: dict[str, Any]) -> Component:
    reserved, allocated = found["reserved_peak_bytes"], found["allocated_peak_bytes"]
    lost = reserved - allocated
    return tiles(
        tile(format_bytes(reserved), "reserved at most"),
        tile(format_bytes(lost), f"more than was ever allocated: {format_share(lost, reserved)}"),
        tile(
            format_bytes(found["largest_free_block_bytes"]),
            "the largest free block when most was reserved",
        ),
        tile(
            format_bytes(found["inactive_split_bytes"]),
            "free, in segments that are in use: no empty_cache() returns it",
        ),
    )


def _seconds(subject: Subject, positions: list[int]) -> list[float]:
    index = subject.device.index
    events = np.searchsorted(index.position, np.array(positions, np.int64), "right") - 1
    times = np.array(index.time_ns[np.maximum(events, 0)])
    found: list[float] = ((times - subject.begin_ns) / 1e9).tolist()
    return found


def _draw_reserved(subject: Subject, found: dict[str, Any]) -> Chart:
    seconds = _seconds(subject, found["position"])
    levels = {name: found[key] for name, key in _LEVELS.items()}
    columns = (
        Column("seconds", Unit.SECONDS),
        *(Column(key, Unit.BYTES, name) for name, key in _LEVELS.items()),
    )
    rows = list(zip(seconds, *levels.values(), strict=True))
    figure = draw_reserved(seconds, levels, scheme=subject.scheme)
    why = "What the allocator holds of the device, what is in blocks, and what tensors need."
    return Chart("reserved", "Reserved and allocated", why, Table(columns, rows), figure)


def _draw_segments(subject: Subject, found: dict[str, Any]) -> Chart:
    columns = (
        Column("segment", Unit.COUNT),
        Column("size_bytes", Unit.BYTES),
        Column("free_bytes", Unit.BYTES),
        Column("largest_free_bytes", Unit.BYTES, "largest free block"),
        Column("blocks", Unit.COUNT),
        Column("is_small", Unit.BOOL, "of the small pool"),
    )
    rows = [
        [number, s["size_bytes"], s["free_bytes"], s["largest_free_bytes"], len(s["blocks"]),
         s["is_small"]]
        for number, s in enumerate(found["segments"])
    ]  # fmt: skip
    at = _seconds(subject, [found["reserved_peak_position"]])[0]
    why = (
        f"At {at:.6f} s, when most was reserved: a row per segment, the largest first. Pale is "
        "free, and can serve nothing larger than itself."
    )
    figure = draw_segments(found["segments"], scheme=subject.scheme)
    return Chart("segments", "Segments", why, Table(columns, rows), figure)


def _list_ends(subject: Subject, found: dict[str, Any]) -> Chart:
    columns = (
        Column("capacity_bytes", Unit.BYTES, "with"),
        Column("seconds", Unit.SECONDS, "it ends at"),
        Column("requested_bytes", Unit.BYTES, "asking for"),
        Column("free_bytes", Unit.BYTES, "device has"),
        Column("cached_bytes", Unit.BYTES, "free in pieces"),
        Column("allocated_bytes", Unit.BYTES, "allocated"),
        Column("category", Unit.CATEGORY),
        Column("layer", Unit.NAME),
        Column("op", Unit.NAME),
    )
    rows = []
    for end in found["died_of"]:
        if end["position"] is None:
            rows.append([end["capacity_bytes"], None, None, None, None, None, "", "it fits", ""])
            continue
        at = _seconds(subject, [end["position"]])[0]
        rows.append(
            [end["capacity_bytes"], at]
            + [end[f"{name}_bytes"] for name in ("requested", "free", "cached", "allocated")]
            + [end["category"], end["layer"] or OUTSIDE, end["op"]]
        )
    why = (
        "The same requests with less memory than was reserved: the first one that fails, what the "
        "device has left, and what the allocator has free in pieces that are of no use to it."
    )
    return Chart("ends", "What it would die of with less", why, Table(columns, rows))


PAGE = Page("fragmentation", "Fragmentation", "What the allocator keeps", layout, charts)
