"""The report as text: rich renderables, colourful on a terminal and plain in a pipe."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import polars as pl
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attnprof.palette import colour_of
from attnprof.report.advice_text import render_advice
from attnprof.report.allocator_text import render_failure, render_state
from attnprof.report.cache_text import render_cache
from attnprof.report.notes import Note, head_status
from attnprof.report.summary import Holder, LayerGroup, Summary
from attnprof.report.tables import Bar, Column, FittedTable, show_name
from attnprof.report.verdict import format_share
from attnprof.report.words import OUTSIDE, format_seconds
from attnprof.units import format_bytes

_MAX_HOLDERS = 10
_STEPS_AT_ENDS = 3


def render_text(summary: Summary) -> RenderableType:
    """Return the whole report."""
    parts: list[RenderableType] = [
        _render_header(summary),
        Text(),
        Text(show_name(summary.verdict), style="bold"),
    ]
    for title, body in (
        ("Peak by category", render_categories(summary.categories)),
        ("Who holds the peak", render_holders(summary.holders)),
        ("Out of memory", render_failure(summary.allocator)),
        ("Reserved memory", render_state(summary.allocator)),
        ("What would lower it", render_advice(summary.advice)),
        ("Attention layers", _render_layers(summary.layers) if has_layers(summary) else None),
        ("KV cache", None if summary.cache is None else render_cache(summary.cache)),
        ("Steps", _render_steps(summary)),
        ("How far to trust this", render_notes(summary.notes)),
    ):
        if body is not None:
            parts += [Text(), heading(title), Padding(body, (0, 0, 0, 2))]
    return Group(*parts)


def has_layers(summary: Summary) -> bool:
    """Return whether attention would have been found: a snapshot has no ops to find it by."""
    return bool(summary.peak.total_bytes) and not summary.run.is_imported


def heading(title: str) -> Text:
    """Return the line above a section."""
    return Text(title, style="bold cyan")


def _render_header(summary: Summary) -> Text:
    status, is_good = head_status(summary.run)
    header = Text.assemble(("attnprof", "bold"), "  ", show_name(str(summary.run.path)), "\n")
    header.append(status, style="green" if is_good else "bold red")
    return header.append(" · " + " · ".join(describe_run(summary)))


def describe_run(summary: Summary) -> list[str]:
    """Return where and when a run was recorded, in a few words each."""
    info = summary.run.info
    environment = find_environment(summary)
    words = [f"device {summary.peak.device}"]
    words += [str(gpu) for gpu in environment.get("gpus") or []][:1]
    for name in ("torch", "transformers", "python"):
        if environment.get(name):
            words.append(f"{name} {environment[name]}")
    created = info.get("created")
    if isinstance(created, str):
        words.append(_show_time(created))
    return [show_name(word) for word in words]


def find_environment(summary: Summary) -> dict[str, Any]:
    """Return what run.json says of versions and devices; nothing if it does not."""
    environment = summary.run.info.get("environment")
    return environment if isinstance(environment, dict) else {}


def _show_time(iso: str) -> str:
    try:
        return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return iso


def render_categories(categories: Mapping[str, int]) -> RenderableType | None:
    """Return bytes, share and bar per category, and the total they sum to."""
    if not categories:
        return None
    total, largest = sum(categories.values()), max(categories.values())
    rows: list[list[Any]] = [
        [
            Text(name, style=colour_of(name)),
            format_bytes(size),
            format_share(size, total),
            Bar(size / largest if largest else 0.0, colour_of(name)),
        ]
        for name, size in categories.items()
    ]
    rows.append([Text("total", style="bold"), Text(format_bytes(total), style="bold"), "100 %", ""])
    return FittedTable(
        [
            Column("category"),
            Column("bytes", right=True),
            Column("share", right=True),
            Column("", drop=1),
        ],
        rows,
        ruled_off=1,
    )


def render_holders(holders: Sequence[Holder], *, most: int = _MAX_HOLDERS) -> RenderableType | None:
    """Return who holds the peak, so many at most, and what the others hold together."""
    if not holders:
        return None
    total = sum(holder.size_bytes for holder in holders)
    rows = [_holder_row(holder, total) for holder in holders[:most]]
    rest = holders[most:]
    if rest:
        size = sum(holder.size_bytes for holder in rest)
        name = f"{len(rest)} more"
        share = format_share(size, total)
        rows.append([Text(name, style="dim"), "", "", format_bytes(size), share])
    columns = [
        Column("layer", is_name=True),
        Column("category"),
        Column("each", right=True, drop=1),
        Column("bytes", right=True),
        Column("share", right=True),
    ]
    return FittedTable(columns, rows)


def _holder_row(holder: Holder, total: int) -> list[Any]:
    each = format_bytes(holder.each_bytes) if holder.count > 1 else ""
    return [
        label_layer(holder.layer, holder.count),
        Text(holder.category, style=colour_of(holder.category)),
        each,
        format_bytes(holder.size_bytes),
        format_share(holder.size_bytes, total),
    ]


def label_layer(layer: str, count: int) -> str:
    """Return a folded layer's name with how many layers it stands for."""
    name = show_name(layer) or OUTSIDE
    return f"{name} ×{count}" if count > 1 else name


def _render_layers(groups: list[LayerGroup]) -> RenderableType | None:
    if not groups:
        return Text("none: no product of activations was followed by a second one")
    has_cache = any(group.row["kv_cache_bytes"] for group in groups)
    columns = [
        Column("layer", is_name=True),
        Column("kind"),
        Column("B×H×Tq×Tk", drop=3),
        Column("dtype", drop=1),
        Column("softmax", right=True),
        Column("saved", right=True),
        Column("predicted", right=True, drop=2),
        *([Column("KV cache", right=True)] if has_cache else []),
    ]
    rows = [_layer_row(group, has_cache=has_cache) for group in groups]
    return Group(FittedTable(columns, rows), *_render_reasons(groups))


def _layer_row(group: LayerGroup, *, has_cache: bool) -> list[Any]:
    row = group.row
    cells: list[Any] = [
        label_layer(group.layer, group.count),
        row["kind"],
        format_shape(row),
        row["dtype"] or "–",
        format_bytes(row["softmax_bytes"]),
        format_bytes(row["saved_softmax_bytes"]),
        format_bytes(row["predicted_saved_bytes"]),
    ]
    return [*cells, format_bytes(row["kv_cache_bytes"])] if has_cache else cells


def format_shape(row: dict[str, Any]) -> str:
    """Return an attention layer's shape: ``4×12(4)×512×512``, with Hkv where it is not H."""
    if not row["q_len"]:
        return "–"
    heads = str(row["heads"])
    if row["kv_heads"] and row["kv_heads"] != row["heads"]:
        heads += f"({row['kv_heads']})"
    return f"{row['batch']}×{heads}×{row['q_len']}×{row['k_len']}"


def _render_reasons(groups: list[LayerGroup]) -> Iterable[RenderableType]:
    """Yield why layers do what they do; once per reason, not once per layer."""
    by_reason: dict[str, list[str]] = {}
    for group in groups:
        if group.row["backend_reason"]:
            label = label_layer(group.layer, group.count)
            by_reason.setdefault(group.row["backend_reason"], []).append(label)
    for reason, labels in by_reason.items():
        who = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
        line = Text.assemble((f"{who}: " if len(by_reason) > 1 else ""), show_name(reason))
        line.stylize("dim")
        yield line


def _render_steps(summary: Summary) -> RenderableType | None:
    steps = summary.steps
    if steps.is_empty():
        return None
    has_reserved = steps["reserved_bytes"].null_count() < len(steps)
    columns = [
        Column("step", right=True),
        Column("n", right=True),
        Column("batch", right=True, drop=2),
        Column("peak", right=True),
        Column("in", drop=3),
        *([Column("reserved", right=True)] if has_reserved else []),
        Column("time", right=True),
        Column("ops", right=True, drop=1),
        Column(""),
    ]
    rows: list[list[Any]] = []
    for row in pick_steps(steps, summary.peak.step):
        if isinstance(row, int):
            rows.append(["…", *[""] * (len(columns) - 2), Text(f"{row:,} more", style="dim")])
            continue
        mark = "◀ peak" if row["step"] == summary.peak.step else ""
        mark = mark if row["is_detailed"] else "only counted"
        peak, reserved = row["peak_bytes"], row["reserved_bytes"]
        rows.append(
            [
                str(row["step"]),
                _or_dash(row["seq_len"]),
                _or_dash(row["batch"]),
                "–" if peak is None else format_bytes(peak),
                row["peak_phase"] or "–",
                *([_or_dash(reserved and format_bytes(reserved))] if has_reserved else []),
                format_seconds(row["wall_seconds"]),
                f"{row['ops']:,}" if row["ops"] else "–",
                Text(mark, style="bold red" if row["is_detailed"] else "dim"),
            ]
        )
    return FittedTable(columns, rows)


def pick_steps(steps: pl.DataFrame, peak_step: int) -> list[dict[str, Any] | int]:
    """Return the steps worth showing, and between them how many are left out.

    All of a few; of many the first, the last, the one with the peak, and the one that needed most,
    which may only have been counted.
    """
    rows = list(steps.iter_rows(named=True))
    keep = {*range(_STEPS_AT_ENDS), *range(len(rows) - _STEPS_AT_ENDS, len(rows))}
    keep |= {at for at, row in enumerate(rows) if row["step"] == peak_step}
    keep.add(max(range(len(rows)), key=lambda at: rows[at]["peak_bytes"] or 0, default=0))
    if len(rows) <= 2 * _STEPS_AT_ENDS + 2:
        keep = set(range(len(rows)))
    picked: list[dict[str, Any] | int] = []
    following = 0
    for at in sorted(keep):
        if at > following:
            picked.append(at - following)
        picked.append(rows[at])
        following = at + 1
    return picked


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)


def render_notes(notes: Iterable[Note]) -> RenderableType:
    """Return remarks on a report's quality, one per row, warnings in colour."""
    rows = [
        [
            Text(note.subject, style="bold yellow" if note.is_warning else "dim"),
            Text(show_name(note.text)),
        ]
        for note in notes
    ]
    return FittedTable([Column(""), Column("", is_name=True)], rows, has_head=False)
