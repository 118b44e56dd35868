"""Fragmentation: what the allocator keeps beyond live tensors, and what runs out first."""

from typing import Any

import numpy as np
from dash import html
from dash.development.base_component import Component

from attnprof.report.verdict import format_share
from attnprof.report.words import OUTSIDE
from attnprof.units import format_bytes
from attnprof_dashboard.chart import Chart
from attnprof_dashboard.components.cards import chart_card, message, tile, tiles
from attnprof_dashboard.data.segment_map import MOST_EVENTS
from attnprof_dashboard.figures.segments import MOST_SEGMENTS, draw_reserved, draw_segments
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
    head = [_say_how(subject, found)]
    if found["failure"] is not None:
        head.append(_explain_failure(found["failure"]))
    return html.Div([html.Div(head, className="stacked"), _tiles(found), *cards])


def charts(subject: Subject) -> list[Chart]:
    """Return what is reserved over time, the segments, who held what, and the ends with less."""
    found = subject.device.facts["allocator"]
    if found is None:
        return []
    return [
        _draw_reserved(subject, found),
        _draw_segments(subject, found),
        *([_list_holders(found["failure"])] if found["failure"] is not None else []),
        *([_list_ends(subject, found)] if found["died_of"] else []),
    ]


def _explain_none(subject: Subject) -> str:
    if not subject.device.facts["blocks"]:
        return "Nothing was allocated, so the allocator holds nothing."
    return (
        f"The run has {len(subject.device.index):,} events; up to {MOST_EVENTS:,} are replayed "
        "through the allocator. Record fewer steps to see its segments."
    )


def _say_how(subject: Subject, found: dict[str, Any]) -> Component:
    """Say where the numbers come from."""
    if found["is_recorded"]:
        return message(
            "Recorded",
            "The history that CUDA's caching allocator kept of itself on "
            f"{subject.device.name}: every segment and every block.",
        )
    text = (
        "The run's own requests, replayed in order through CUDA's caching allocator with its "
        "default settings, on one stream."
    )
    if subject.device.name == "cpu":
        text += " The run itself was on the CPU, which has no such allocator."
    return message("Simulated", text)


def _explain_failure(failure: dict[str, Any]) -> Component:
    lines = [part for line in failure["sentences"] for part in (line, html.Br())]
    return message("What it ran out of", *lines[:-1], is_bad=True)


def _tiles(found: dict[str, Any]) -> Component:
    reserved, allocated = found["reserved_peak_bytes"], found["allocated_peak_bytes"]
    failure = found["failure"]
    if failure is not None:
        return tiles(
            tile(format_bytes(failure["requested_bytes"]), "asked for, in vain"),
            tile(format_bytes(failure["largest_free_block_bytes"]), "the largest free block then"),
            tile(format_bytes(failure["free_bytes"]), "free in all pieces together"),
            tile(format_bytes(failure["device_free_bytes"]), "free on the device beside them"),
            tile(format_bytes(reserved), "reserved at most"),
        )
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
        Column("private_pool", Unit.COUNT, "private pool (0: shared)"),
    )
    rows = [
        [number, s["size_bytes"], s["free_bytes"], s["largest_free_bytes"], len(s["blocks"]),
         s["is_small"], s["private_pool"]]
        for number, s in enumerate(found["segments"])
    ]  # fmt: skip
    at = _seconds(subject, [found["segments_position"]])[0]
    when = "when most was reserved" if found["failure"] is None else "when the request failed"
    count = len(rows)
    which = f"the {MOST_SEGMENTS} largest of {count}" if count > MOST_SEGMENTS else "largest first"
    why = (
        f"At {at:.6f} s, {when}: a row per segment, {which}. Pale, with an edge, is free, and can "
        "serve nothing larger than itself."
    )
    if _has_private_pools(found):
        why += (
            " What is free in a private pool, of a CUDA graph or of torch.cuda.MemPool, serves "
            "that pool alone."
        )
    figure = draw_segments(found["segments"], scheme=subject.scheme)
    return Chart("segments", "Segments", why, Table(columns, rows), figure)


def _has_private_pools(found: dict[str, Any]) -> bool:
    return any(segment["private_pool"] for segment in found["segments"])


def _list_holders(failure: dict[str, Any]) -> Chart:
    columns = (
        Column("layer", Unit.NAME),
        Column("category", Unit.CATEGORY),
        Column("size_bytes", Unit.BYTES, "bytes"),
        Column("share", Unit.SHARE),
    )
    total = failure["total_bytes"] or 1
    rows = [[layer or OUTSIDE, name, s, s / total] for layer, name, s in failure["holders"]]
    why = "Every byte that was live when the request failed."
    return Chart("holders", "Who held the memory", why, Table(columns, rows))


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
        "Simulated: the same requests with less memory than was reserved. The first one that "
        "fails, what the device has left, and what is free in pieces that are of no use."
    )
    if _has_private_pools(found):
        why += " Blocks of private pools are put where all others are, which needs less memory."
    return Chart("ends", "What it would die of with less", why, Table(columns, rows))


PAGE = Page("fragmentation", "Fragmentation", "What the allocator keeps", layout, charts)
