"""``attnprof report``: what a recorded run shows, as text, JSON or a page."""

from pathlib import Path
from typing import Annotated

import typer

from attnprof.errors import CommandError


def report(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A directory that attnprof wrote.", show_default=False),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; bytes are integers.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a page that needs no network.", show_default=False
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(metavar="N", help="The peak within this step.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="This device's memory: cpu, cuda:0, … Without it, the GPU that held most.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Show whose bytes were at the peak of a recorded run."""
    if as_json and html is not None:
        raise CommandError("--json and --html exclude each other; give one of them")

    from attnprof.cli.console import print_report, say, working
    from attnprof.report.summary import summarise
    from attnprof.run import load

    with working("reading the run …"):
        loaded = load(run)
        summary = summarise(loaded, step=step, device=device)
    if as_json:
        from attnprof.report.json import render_json

        print(render_json(summary))
    elif html is not None:
        from attnprof.cli.files import replace_file
        from attnprof.report.html import render_html

        with working("drawing the page …"):
            page = render_html(summary)
        replace_file(html, page, keep_out_of=loaded.path)
        say(f"wrote {html}")
    else:
        from attnprof.report.text import render_text

        print_report(render_text(summary))
    return 0
