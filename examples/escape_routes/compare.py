"""Every escape route from the quadratic wall on one plot.

    python examples/escape_routes/compare.py
    python examples/escape_routes/compare.py --seq-lens 4096 8192 16384 --dry-run
    python examples/escape_routes/compare.py --routes materialised SDPA --device "RTX 4090"

Prints a row per route: what kind of attention was found, by which laws its scores and the whole
peak grow, what the longest length took, and where the wall is. Writes one page that opens offline.
Dry runs use no memory and next to no time, except for the routes that loop over tokens.
"""

import argparse
from dataclasses import dataclass
from itertools import cycle
from math import log10
from pathlib import Path

import bigbird
import linear_attention
import linformer_attention
import longformer
import mamba
import materialised
import performer
import plotly.graph_objects as go
import retention
import rwkv
import sdpa
import sliding_window
import torch
from rich.console import Console
from rich.table import Table

import attnprof
from attnprof.errors import DryRunError
from attnprof.growth import Fit, read_capacity
from attnprof.units import format_bytes, format_length, parse_length_argument

ROUTES = {
    "materialised": materialised.make_step,
    "SDPA": sdpa.make_step,
    "SDPA with a mask": sdpa.make_masked_step,
    "Linformer": linformer_attention.make_step,
    "Performer": performer.make_step,
    "Performer, causal": performer.make_causal_step,
    "linear attention, chunked": linear_attention.make_step,
    "linear attention, cumulative": linear_attention.make_cumulative_step,
    "RetNet, chunkwise": retention.make_step,
    "RetNet, parallel": retention.make_parallel_step,
    "RetNet, recurrent": retention.make_recurrent_step,
    "RWKV": rwkv.make_step,
    "Mamba": mamba.make_step,
    "Longformer": longformer.make_step,
    "Longformer, transformers": longformer.make_public_step,
    "BigBird": bigbird.make_step,
    "BigBird, transformers": bigbird.make_public_step,
    "sliding window, blocked": sliding_window.make_step,
    "sliding window, masked": sliding_window.make_masked_step,
    "sliding window, masked SDPA": sliding_window.make_masked_sdpa_step,
}


HOT = ("#d6131b", "#e5860b", "#a8324a", "#fac701", "#ff6b4a")
COOL = ("#1f77e6", "#0b7a4b", "#6d28c9", "#5f6670", "#2aa5ab", "#8f9be3")
"""Colours of quadratic and of linear routes."""

SCORES = ("attention_scores", "softmax", "attention_mask")
"""The categories that materialised attention fills with n² numbers."""


@dataclass(frozen=True)
class Result:
    """What a sweep over one route found."""

    kind: str
    """The kind of its attention layers, as attnprof found it."""
    total: Fit
    """The law of all live bytes."""
    scores: Fit
    """That of scores, softmax or masks, whichever are most."""
    wall: int
    """The longest length that fits the device, by the laws."""
    predicted_bytes: dict[int, int]
    """The peak by length, from the longest one swept to the wall."""


def sweep_route(name: str, seq_lens: list[int], device: str, *, dry_run: bool) -> Result:
    """Sweep one route and read off its laws."""
    swept = attnprof.sweep(ROUTES[name], seq_lens, dry_run=dry_run)
    growth = attnprof.Growth.load(swept.path)  # without more dry runs to find the wall
    longest = max(seq_lens)
    wall = growth.max_seq_len(device)
    lengths = [longest * 2**i for i in range(wall.bit_length()) if longest * 2**i < wall]
    return Result(
        kind=name_kinds(growth.run(longest)),
        total=growth.fit(),
        scores=find_scores(growth),
        wall=wall,
        predicted_bytes={n: growth.predict(n) for n in (*lengths, wall)},
    )


def name_kinds(run: attnprof.Run) -> str:
    """Return the kinds of attention layers in a run."""
    return ", ".join(run.layers()["kind"].unique().sort()) or "–"


def find_scores(growth: attnprof.Growth) -> Fit:
    """Return the law of scores, softmax or masks, whichever are most at the longest length."""
    return max((growth.fit(category) for category in SCORES), key=find_most_bytes)


def find_most_bytes(fit: Fit) -> int:
    """Return the most bytes at any length that was fitted."""
    return max(fit.points["peak_bytes"])


def show_table(results: dict[str, Result], device: str) -> None:
    """Print a row per route."""
    table = Table(title="A training step", title_justify="left")
    numbers = ("scores or mask", "total", "law of the total", "peak", f"wall on {device}")
    for column in ("route", "kind", *numbers):
        table.add_column(column, justify="right" if column in numbers else "left")
    for name, result in results.items():
        table.add_row(
            name,
            result.kind,
            write_exponent(result.scores),
            write_exponent(result.total),
            write_law(result.total),
            format_bytes(find_most_bytes(result.total)),
            f"{result.wall:,}",
        )
    Console(width=130).print(table)


def write_exponent(fit: Fit) -> str:
    """Return the exponent above the constant part, or a dash where there is nothing."""
    if not find_most_bytes(fit) or fit.exponent is None:
        return "–"
    return f"n^{fit.exponent:.2f}"


def write_law(fit: Fit) -> str:
    """Return what grows, in bytes."""
    _, linear, quadratic = fit.coefficients[fit.phase]
    terms = [
        f"{coefficient:,.0f} {power}"
        for coefficient, power in ((linear, "n"), (quadratic, "n²"))
        if round(coefficient)
    ]
    return " + ".join(terms)


def draw(results: dict[str, Result], device: str) -> go.Figure:
    """Return the log-log plot: what was swept, and dotted, what follows up to the wall."""
    figure = go.Figure()
    hot, cool = cycle(HOT), cycle(COOL)
    for name, result in results.items():
        colour = next(hot if "quadratic" in result.total.law else cool)
        points = result.total.points.group_by("seq_len").max().sort("seq_len")
        swept = dict(points.select("seq_len", "peak_bytes").iter_rows())
        style = {"legendgroup": name, "line_color": colour, "hoverinfo": "name+x+text"}
        for sizes, more in (
            (swept, {"name": f"{name}: {write_exponent(result.total)}"}),
            (result.predicted_bytes, {"name": name, "line_dash": "dot", "showlegend": False}),
        ):
            figure.add_scatter(
                x=list(sizes),
                y=list(sizes.values()),
                mode="lines+markers" if sizes is swept else "lines",
                text=[format_bytes(size) for size in sizes.values()],
                **style,
                **more,
            )
    capacity_bytes = read_capacity(device)
    figure.add_hline(capacity_bytes)
    figure.add_annotation(
        text=device, x=0, y=log10(capacity_bytes), xref="paper", yshift=10, showarrow=False
    )
    figure.update_layout(
        title="Peak of a training step by sequence length; dotted: predicted from the solid part",
        template="plotly_white",
        height=800,
        legend_tracegroupgap=0,
        hoverlabel_namelength=-1,
    )
    lengths, sizes = ([2**power for power in range(low, 50, 2)] for low in (4, 20))
    figure.update_xaxes(
        type="log",
        title="sequence length n",
        tickvals=lengths,
        ticktext=[format_length(n) for n in lengths],
    )
    figure.update_yaxes(type="log", tickvals=sizes, ticktext=[format_bytes(size) for size in sizes])
    return figure


def main() -> None:
    """Compare the routes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES), metavar="R")
    parser.add_argument(
        "--seq-lens", nargs="+", type=parse_length_argument, default=[256, 512, 1024], metavar="N"
    )
    parser.add_argument("--dry-run", action="store_true", help="use fake tensors, and no memory")
    parser.add_argument("--device", default="H200", help="whose wall to look for; default: H200")
    parser.add_argument("--html", type=Path, default=Path("escape-routes.html"), metavar="FILE")
    options = parser.parse_args()
    try:  # before the work that ends in them
        read_capacity(options.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if options.html.is_dir() or not options.html.parent.is_dir():
        parser.error(f"--html: {options.html} is not a file in a directory that exists")

    torch.set_num_threads(1)  # more would spend their time waiting: the ops are small
    results: dict[str, Result] = {}
    for name in options.routes:
        try:
            results[name] = sweep_route(
                name, options.seq_lens, options.device, dry_run=options.dry_run
            )
        except DryRunError as error:
            print(f"{name} is left out: {error}")
    show_table(results, options.device)
    draw(results, options.device).write_html(options.html)
    print(f"wrote {options.html}")


if __name__ == "__main__":
    main()
