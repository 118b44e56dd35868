"""``attnprof kv``: what a run's KV cache holds, per layer and token."""

from pathlib import Path
from typing import Annotated

import typer


def kv(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A directory that attnprof wrote.", show_default=False),
    ],
    device: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="An accelerator such as H100: adds how many sequences fit on it.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; bytes are integers.")
    ] = False,
) -> int:
    """Show what a run's KV cache holds: how it grows, layer by layer, and in other forms.

    For runs of inference: forwards without gradients that leave keys and values, or a recurrent
    state, behind.
    """
    import polars as pl

    from attnprof.cli.console import print_report, working
    from attnprof.cli.opening import say_what_is_missing
    from attnprof.report.cache_summary import summarise_cache
    from attnprof.report.kv_json import render_kv_json
    from attnprof.report.kv_text import render_kv_cache
    from attnprof.run import load
    from attnprof.theory.devices import find_device
    from attnprof.vocabulary import Category

    target = None if device is None else find_device(device)
    with working("looking for caches …"):
        loaded = load(run)
        loaded.require_ops()
        say_what_is_missing(loaded, run)
        summary = summarise_cache(loaded)
    if as_json:
        weights_bytes = 0 if summary is None else summary.weights_bytes
        room = None if target is None else target.available_bytes - weights_bytes
        print(render_kv_json(summary, room_bytes=room))
    else:
        names = loaded.allocations["category"].cast(pl.String)
        has_backward = (names == Category.GRADIENTS.value).any()
        forwards = 0 if has_backward else int(loaded.attribution.timeline.forward_has_grad.sum())
        print_report(render_kv_cache(summary, device=target, forwards_with_grad=forwards))
    return 0
