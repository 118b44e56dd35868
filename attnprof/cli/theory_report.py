"""What ``attnprof theory`` prints: a forecast as tables."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attnprof.palette import colour_of
from attnprof.report.tables import Bar, Column, FittedTable, show_name
from attnprof.theory.architecture import Architecture
from attnprof.theory.forecast import Forecast, LengthForecast
from attnprof.theory.recipes import ScorePath
from attnprof.units import format_bytes, format_length
from attnprof.vocabulary import Category

_PATH_NAMES = {
    ScorePath.MATERIALISED: "materialised",
    ScorePath.FP32_SOFTMAX: "fp32 softmax",
    ScorePath.MATH: "SDPA math",
    ScorePath.FUSED: "fused",
}
_PATH_NOTES = (
    ("materialised", "product, mask, softmax, product: one op each"),
    ("fp32 softmax", "the same with a float32 softmax: eager attention in transformers"),
    ("SDPA math", "scaled_dot_product_attention where no fused kernel takes it"),
    ("fused", "flash, memory-efficient or cuDNN kernels, without a mask tensor"),
)


def render_forecast(forecast: Forecast, *, training: bool | None = None) -> RenderableType:
    """Return a forecast as text.

    Args:
        forecast: What to show.
        training: Only what concerns training (True) or inference (False); None shows both.
    """
    parts: list[RenderableType] = [
        _render_header(forecast),
        Text(),
        Text(_write_verdict(forecast), style="bold"),
    ]
    for title, body in _list_sections(forecast, training):
        parts += [Text(), Text(title, style="bold cyan"), Padding(body, (0, 0, 0, 2))]
    return Group(*parts)


def _list_sections(
    forecast: Forecast, training: bool | None
) -> Iterator[tuple[str, RenderableType]]:
    has_one = len(forecast.lengths) == 1
    yield f"Scores, one copy in {forecast.dtype}", _render_scores(forecast)
    if training is not False:
        title = "Training: what attention holds between QKᵀ and PV"
        yield title, _render_paths(forecast) if has_one else _render_saved(forecast)
        yield "Training: the whole model, AdamW", _render_footprints(forecast, training=True)
    if training is not True:
        yield "Inference: KV cache and weights", _render_cache(forecast)
        yield "Inference: the whole model", _render_footprints(forecast, training=False)
    yield "Flops of a forward", _render_flops(forecast)
    if forecast.device is not None:
        yield f"Least times on one {forecast.device.name}", _render_times(forecast)
        yield f"What fits one {forecast.device.name}", _render_walls(forecast, training)
    yield "How far to trust this", _render_notes(forecast)


def _render_header(forecast: Forecast) -> Text:
    arch = forecast.architecture
    header = Text.assemble(("attnprof theory", "bold"), "  ", (show_name(arch.name), "bold"), "\n")
    header.append(" · ".join(describe_shape(arch)))
    run = f"\nbatch {forecast.batch} · {forecast.dtype}"
    if forecast.device is not None:
        memory = format_bytes(forecast.device.memory_bytes)
        nominal = " (nominal)" if forecast.device.memory_is_nominal else ""
        run += f" · {forecast.device.name}, {memory}{nominal}"
    return header.append(run, style="dim")


def describe_shape(arch: Architecture) -> list[str]:
    """Return an architecture's sizes in a few words each."""
    keys = f"{arch.kv_heads} for keys" if arch.kv_heads != arch.heads else "each with its own keys"
    if arch.latent is not None:
        keys = f"keys from a latent of {arch.latent.kv_rank} + {arch.latent.rope_dim}"
    words = [
        f"{arch.layers} {'layer' if arch.layers == 1 else 'layers'} of width {arch.width}",
        f"{arch.heads} heads of {arch.qk_dim}, {keys}",
        f"FFN {arch.ffn_width}{', gated' if arch.ffn_gated else ''}",
    ]
    if arch.experts is not None:
        words[-1] = f"{arch.experts.active} of {arch.experts.count} experts of {arch.experts.width}"
    if arch.windowed_layers and arch.window is not None:
        words.append(f"{arch.windowed_layers} layers with a window of {format_length(arch.window)}")
    words.append(f"vocabulary {arch.vocabulary}")
    if arch.context_len is not None:
        words.append(f"context {format_length(arch.context_len)}")
    count = arch.parameters
    many = f"{count / 10**9:.2f} billion" if count >= 10**7 else f"{count:,}"
    return [*words, f"{many} parameters"]


def _write_verdict(forecast: Forecast) -> str:
    longest = forecast.lengths[-1]
    n = format_length(longest.seq_len)
    layer = format_bytes(longest.score_bytes_per_layer)
    cache = format_bytes(longest.kv_cache_bytes)
    share = _format_share(longest.flops.attention, longest.total_flops)
    return (
        f"At n = {n} one layer's scores are {layer} a copy, unless a fused kernel keeps them on "
        f"the chip; the KV cache is {cache}; attention is {share} of the flops."
    )


def _render_scores(forecast: Forecast) -> RenderableType:
    heads, layers = forecast.architecture.heads, forecast.architecture.layers
    columns = [
        Column("n", right=True),
        Column("scores, one head", right=True, drop=1),
        Column("one head", right=True),
        Column(f"one layer (×{forecast.batch * heads})", right=True),
        Column(f"all layers (×{layers})", right=True),
    ]
    rows: list[list[RenderableType]] = [
        [
            _show_length(at),
            f"{at.scores_per_head:,}",
            format_bytes(at.score_bytes_per_head),
            format_bytes(at.score_bytes_per_layer),
            format_bytes(at.score_bytes),
        ]
        for at in forecast.lengths
    ]
    return FittedTable(columns, rows)


def _render_paths(forecast: Forecast) -> RenderableType:
    """Return one length's paths, with what one layer holds and what all keep."""
    columns = [
        Column("path"),
        Column("dtype", drop=1),
        Column("bytes per score", right=True, drop=2),
        Column("forward peak", right=True),
        Column("saved", right=True),
        Column("backward peak", right=True),
        Column(f"saved, {forecast.architecture.layers} layers", right=True),
    ]
    rows: list[list[RenderableType]] = [
        [
            _PATH_NAMES[path.path],
            path.dtype,
            f"{path.saved_bytes_per_score:.2f}",
            format_bytes(path.forward_peak_bytes),
            format_bytes(path.saved_bytes),
            format_bytes(path.backward_peak_bytes),
            Text(format_bytes(path.saved_by_layers_bytes), style=colour_of(Category.SOFTMAX)),
        ]
        for path in forecast.lengths[0].paths
    ]
    return FittedTable(columns, rows)


def _render_saved(forecast: Forecast) -> RenderableType:
    """Return what all layers keep for backward, a column per path."""
    return _over_paths(
        forecast,
        [[path.saved_by_layers_bytes for path in at.paths] for at in forecast.lengths],
        capacity_bytes=None,
    )


def _render_footprints(forecast: Forecast, *, training: bool) -> RenderableType:
    sizes = [
        [path.training_bytes if training else path.inference_bytes for path in at.paths]
        for at in forecast.lengths
    ]
    return _over_paths(forecast, sizes, capacity_bytes=forecast.capacity_bytes)


def _over_paths(
    forecast: Forecast, sizes: Sequence[Sequence[int]], *, capacity_bytes: int | None
) -> RenderableType:
    """Return a table of bytes, a row per length and a column per path; red does not fit."""
    columns = [Column("n", right=True), *(Column(name, right=True) for name in _title(forecast))]
    largest = max(map(max, sizes))
    limit = largest if capacity_bytes is None else capacity_bytes

    def cell(size: int) -> Text:
        return Text(f"! {format_bytes(size)}", "red") if size > limit else Text(format_bytes(size))

    rows: list[list[RenderableType]] = [
        [_show_length(at), *(cell(size) for size in row)]
        for at, row in zip(forecast.lengths, sizes, strict=True)
    ]
    table = FittedTable(columns, rows)
    if largest <= limit:
        return table
    given = f"! more than the {format_bytes(limit)} that a program can have of its memory"
    return Group(table, Text(given, style="dim"))


def _title(forecast: Forecast) -> list[str]:
    """Return a column's title per path; with the dtype where it is not the forecast's."""
    return [
        _PATH_NAMES[path.path] + ("" if path.dtype == forecast.dtype else f", {path.dtype}")
        for path in forecast.lengths[0].paths
    ]


def _render_cache(forecast: Forecast) -> RenderableType:
    weights = forecast.weights_bytes
    columns = [
        Column("n", right=True),
        Column("per token", right=True),
        Column("KV cache", right=True),
        Column("weights", right=True),
        Column("cache : weights", right=True, drop=1),
    ]
    rows: list[list[RenderableType]] = [
        [
            _show_length(at),
            format_bytes(forecast.cache_bytes_per_token * forecast.batch),
            Text(format_bytes(at.kv_cache_bytes), style=colour_of(Category.KV_CACHE)),
            format_bytes(weights),
            f"{at.kv_cache_bytes / weights:.2f}",
        ]
        for at in forecast.lengths
    ]
    return FittedTable(columns, rows)


def _render_flops(forecast: Forecast) -> RenderableType:
    columns = [
        Column("n", right=True),
        Column("total", right=True),
        Column("attention", right=True),
        Column("projections", right=True, drop=2),
        Column("FFN", right=True),
        Column("head", right=True, drop=2),
        Column("attention's share", drop=1),
    ]
    rows: list[list[RenderableType]] = []
    for at in forecast.lengths:
        parts = (at.flops.attention, at.flops.projections, at.flops.ffn, at.flops.head)
        share = at.flops.attention / at.total_flops
        shares = [_format_share(part, at.total_flops) for part in parts]
        bar = Bar(share, colour_of(Category.ATTENTION_SCORES))
        rows.append([_show_length(at), _format_count(at.total_flops) + "flop", *shares, bar])
    return Group(FittedTable(columns, rows), Text(_describe_crossing(forecast), style="dim"))


def _describe_crossing(forecast: Forecast) -> str:
    ffn, layer, skipping = (
        "no n" if n is None else f"n = {n:,}"
        for n in (
            forecast.ffn_crossing_len,
            forecast.layer_crossing_len,
            forecast.skipping_crossing_len,
        )
    )
    return (
        f"attention overtakes the FFN at {ffn} (at {skipping} where kernels skip what mask and "
        f"window hide), and FFN and projections together at {layer}"
    )


def _render_times(forecast: Forecast) -> RenderableType:
    columns = [
        Column("n", right=True),
        Column("prefill", right=True),
        Column("limited by", drop=1),
        Column("next token", right=True),
        Column("limited by", drop=1),
        Column("tokens per second", right=True),
    ]
    rows = []
    for at in forecast.lengths:
        if at.prefill is None or at.decode is None:
            continue
        rate = forecast.batch / at.decode.seconds
        rows.append(
            [
                _show_length(at),
                f"≥ {format_duration(at.prefill.seconds)}",
                at.prefill.limit,
                f"≥ {format_duration(at.decode.seconds)}",
                at.decode.limit,
                f"≤ {rate:,.0f}" if rate >= 10 else f"≤ {rate:.1f}",
            ]
        )
    return FittedTable(columns, rows)


def _render_walls(forecast: Forecast, training: bool | None) -> RenderableType:
    columns = [
        Column("path"),
        Column("dtype"),
        *([Column("largest n, training", right=True)] if training is not False else []),
        *([Column("largest n, inference", right=True)] if training is not True else []),
    ]
    rows = []
    for wall in forecast.walls:
        lengths = [wall.training_len] if training is not False else []
        lengths += [wall.inference_len] if training is not True else []
        shown = [f"{n:,}" if n else "does not fit" for n in lengths]
        rows.append([_PATH_NAMES[wall.path], wall.dtype, *shown])
    return FittedTable(columns, rows)


def _render_notes(forecast: Forecast) -> RenderableType:
    rows = [[Text(name, style="dim"), Text(text)] for name, text in _PATH_NOTES]
    rows.append(
        [
            Text("whole model", style="dim"),
            Text(
                "weights, gradients, two AdamW moments in the weights' dtype, activations, logits "
                "and loss; or weights, cache and one layer's work. No parallelism, no "
                "fragmentation. Exact for your program: attnprof predict"
            ),
        ]
    )
    context, longest = forecast.architecture.context_len, forecast.lengths[-1].seq_len
    if context is not None and longest > context:
        text = f"the model was made for n = {format_length(context)}; more is what it would take"
        rows.append([Text("length", style="bold yellow"), Text(text)])
    if forecast.device is not None:
        text = "peak bandwidth and dense 16-bit flops, perfectly overlapped: programs take longer"
        rows.append([Text("times", style="dim"), Text(text)])
    if forecast.architecture.source:
        source = show_name(forecast.architecture.source)
        rows.append([Text("shape from", style="dim"), Text(source)])
    rows += [
        [Text("assumed", style="bold yellow"), Text(show_name(text))]
        for text in forecast.architecture.assumptions
    ]
    return FittedTable([Column(""), Column("", is_name=True)], rows, has_head=False)


def _show_length(at: LengthForecast) -> str:
    return format_length(at.seq_len)


def _format_share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _format_count(count: int) -> str:
    """Return a large count in powers of 1000, ready for its unit: ``"8.03 G"``."""
    for unit, factor in (("E", 10**18), ("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:,} "


def format_duration(seconds: float) -> str:
    """Return a duration: ``"2.15 ms"``, ``"13.4 s"``, ``"2.1 h"``."""
    for unit, factor in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= factor * (1 if unit in ("s", "ms") else 2):
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
