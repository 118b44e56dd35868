"""``attnprof what-if``: a recorded run, replayed as if the program had been another."""

from pathlib import Path
from typing import Annotated

import typer


def what_if(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A directory that attnprof wrote.", show_default=False),
    ],
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Replay this change; repeat it for several together. Without it: each by itself.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=1, help="So many key/value heads per layer.", show_default=False
        ),
    ] = None,
    latent_dim: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            min=1,
            help="So many elements per token and layer in place of K and V.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        float | None,
        typer.Option(metavar="X", help="The batch X times as large.", show_default=False),
    ] = None,
    seq_len: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Sequences of this length: 4096, 128K or 1M.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="This device's memory: cpu, cuda:0, … Without it, the GPU that held most.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; bytes are integers.")
    ] = False,
) -> int:
    """Say what a recorded run would have needed with fused attention, checkpointing, and so on.

    The run's allocations are rewritten and replayed: the peak moves, so bytes cannot just be
    subtracted from it. Without options every change is replayed by itself.
    """
    from attnprof.analysis.what_if.advice import ask_all
    from attnprof.analysis.what_if.scenario import Options
    from attnprof.cli.console import print_report, working
    from attnprof.cli.opening import require_peak, say_what_is_missing
    from attnprof.report.what_if_json import render_what_ifs
    from attnprof.report.what_if_text import render_scenarios, render_what_if
    from attnprof.run import load
    from attnprof.units import parse_length

    length = None if seq_len is None else parse_length(seq_len)
    options = Options(kv_heads=heads, latent_dim=latent_dim, batch=batch, seq_len=length)
    with working("replaying the run …"):
        loaded = load(run)
        loaded.require_ops()
        require_peak(loaded, run)
        say_what_is_missing(loaded, run)
        if scenario:
            found = loaded.what_if(
                *scenario,
                kv_heads=heads,
                latent_dim=latent_dim,
                batch=batch,
                seq_len=length,
                device=device,
            )
            what_ifs, refused, before = [found], dict[str, str](), found.before
            report = render_what_if(found)
        else:
            what_ifs, refused = ask_all(loaded.attribution, options, device=device)
            before = loaded.peak(device=device)
            report = render_scenarios(before, what_ifs, refused)
    if as_json:
        print(render_what_ifs(what_ifs, refused, before))
    else:
        print_report(report)
    return 0
