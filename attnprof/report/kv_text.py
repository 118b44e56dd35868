"""The report of ``attnprof kv``: a run's KV cache, other forms of it, and what fits."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attnprof.analysis.cache_forms import (
    LayerCache,
    list_fits,
    list_forms,
)
from attnprof.report.cache_summary import (
    CacheSummary,
    write_cache_sentence,
    write_transient_sentence,
)
from attnprof.report.cache_text import list_cache_tables
from attnprof.report.tables import Column, FittedTable
from attnprof.report.text import heading
from attnprof.report.verdict import format_share
from attnprof.theory.devices import Device
from attnprof.units import format_bytes, format_length


def render_kv_cache(
    summary: CacheSummary | None,
    *,
    device: Device | None = None,
    forwards_with_grad: int = 0,
) -> RenderableType:
    """Return the report of ``attnprof kv``.

    Args:
        summary: The run's caches; None where it has none.
        device: The accelerator to fill; none for no answer to that.
        forwards_with_grad: How many forwards autograd took part in, if no backward followed.
    """
    if summary is None:
        return _explain_none(forwards_with_grad)
    sections: list[tuple[str, RenderableType | None]] = [
        *list_cache_tables(summary),
        ("The same tokens in other forms", _render_forms(summary.layers)),
    ]
    if device is not None:
        weights = summary.weights_bytes
        title = f"Sequences that fit on one {device.name} beside {format_bytes(weights)}"
        fit = _render_fit(summary.layers, device.available_bytes - weights)
        sections.append((f"{title} of weights", fit))
    parts: list[RenderableType] = [
        Text(write_cache_sentence(summary), style="bold"),
        Text(write_transient_sentence(summary)),
    ]
    for title, table in sections:
        if table is not None:
            parts += [Text(), heading(title), Padding(table, (0, 0, 0, 2))]
    return Group(*parts)


def _explain_none(forwards_with_grad: int) -> Text:
    text = "No forward without gradients left a KV cache or a state behind."
    if forwards_with_grad:
        forwards = "1 forward" if forwards_with_grad == 1 else f"{forwards_with_grad} forwards"
        text += (
            f" {forwards} kept what a backward needs instead, and none followed: decode under "
            "torch.no_grad() or torch.inference_mode()."
        )
    return Text(
        f"{text} If an engine owns its memory, name it with attnprof.tag(tensor, 'kv_cache')."
    )


def _render_forms(layers: Sequence[LayerCache]) -> RenderableType | None:
    forms = list_forms(layers)
    if not forms:
        return None
    held = sum(layer.held_bytes for layer in layers)
    rows: list[list[RenderableType]] = [
        [
            Text(form.name),
            format_bytes(form.held_bytes),
            format_share(form.held_bytes, held),
            format_bytes(round(form.bytes_per_token)),
            Text(form.how),
        ]
        for form in forms
    ]
    columns = [
        Column("form", is_name=True),
        Column("held", right=True),
        Column("of now", right=True),
        Column("per token", right=True, drop=2),
        Column("what it takes", is_name=True, drop=1),
    ]
    return FittedTable(columns, rows)


def _render_fit(layers: Sequence[LayerCache], room_bytes: int) -> RenderableType:
    rows: list[list[RenderableType]] = [
        [format_length(fit.tokens), f"{fit.sequences:,}", format_bytes(fit.sequence_bytes)]
        for fit in list_fits(layers, room_bytes=room_bytes)
    ]
    if not rows:
        return Text("not known: a layer's tokens were not seen; trace from the prompt on")
    columns = [
        Column("context", right=True),
        Column("sequences", right=True),
        Column("cache of one, with its transients", right=True),
    ]
    return FittedTable(columns, rows)
