"""``attnprof report``: what a recorded run or a sweep shows, as text, JSON or a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnprof.errors import CommandError

if TYPE_CHECKING:
    from attnprof.growth import Growth


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
    growth: Annotated[
        bool,
        typer.Option("--growth", help="Of a run whose steps differ in length: how memory grows."),
    ] = False,
    category: Annotated[
        str | None,
        typer.Option(metavar="C", help="Of growth: speak of this category.", show_default=False),
    ] = None,
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            "--capacity",
            "--fits",
            metavar="SIZE",
            help="Of growth: the longest sequence that fits '80 GB', or a device such as H200.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Show whose bytes were at the peak of a recorded run, or how a sweep's memory grows."""
    if as_json and html is not None:
        raise CommandError("--json and --html exclude each other; give one of them")
    grown = _load_growth(run, from_steps=growth)
    if grown is None:
        if category is not None or capacity:
            raise CommandError(
                f"--category and --capacity are about growth, and {run} is a single run; give a "
                "sweep's directory, or --growth if its steps differ in length"
            )
        _show_run(run, step=step, device=device, as_json=as_json, html=html)
        return 0
    if step is not None or device is not None:
        raise CommandError(
            "--step and --device are about one peak, and --growth is about all steps; drop --growth"
            if grown.path is None
            else "--step and --device are about one run, and this is the growth of many; give one "
            f"of the directories in {run}"
        )
    from attnprof.cli.growth_report import GrowthOptions, show_growth

    options = GrowthOptions(capacity or (), category, as_json=as_json, html=html)
    options.check()
    show_growth(grown, options, is_quiet=html is not None)
    return 0


def _load_growth(path: Path, *, from_steps: bool) -> "Growth | None":
    """Return the growth in a sweep's directory, or of a run's steps; None for a plain run."""
    from attnprof.store.lengths import GROWTH_FILE

    if (path / GROWTH_FILE).exists():
        from attnprof.growth import Growth

        return Growth.load(path)
    if not from_steps:
        return None
    from attnprof.growth import Growth
    from attnprof.run import load

    return Growth.from_run(load(path))


def _show_run(
    path: Path, *, step: int | None, device: str | None, as_json: bool, html: Path | None
) -> None:
    from attnprof.cli.console import print_report, say, working
    from attnprof.report.summary import summarise
    from attnprof.run import load

    with working("reading the run …"):
        loaded = load(path)
        summary = summarise(loaded, step=step, device=device)
    if as_json:
        from attnprof.report.json import render_json

        print(render_json(summary))
    elif html is not None:
        from attnprof.files import replace_file
        from attnprof.report.html import render_html

        with working("drawing the page …"):
            page = render_html(summary)
        replace_file(html, page, keep_out_of=loaded.path)
        say(f"wrote {html}")
    else:
        from attnprof.report.text import render_text

        print_report(render_text(summary))
