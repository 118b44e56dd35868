"""``attnprof export``: a run in the formats of other tools."""

from pathlib import Path
from typing import Annotated

import typer

from attnprof.cli.console import say, working
from attnprof.errors import CommandError


def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A directory that attnprof wrote.", show_default=False),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="memory_viz, perfetto, parquet or csv.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write it. Without it: a file named as the run, here.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Write a run in a format of other tools.

    memory_viz is a snapshot for pytorch.org/memory_viz with categories and layers for stacks,
    perfetto a trace for ui.perfetto.dev; parquet and csv are the table of allocations.
    """
    from attnprof.cli.opening import say_what_is_missing
    from attnprof.files import replace_file
    from attnprof.interop.exporting import FORMATS
    from attnprof.run import load
    from attnprof.units import format_bytes

    chosen = FORMATS.get(to)
    if chosen is None:
        raise CommandError(f"there is no format {to!r}; give --to {', '.join(FORMATS)}")
    loaded = load(run)
    say_what_is_missing(loaded, run)
    name = loaded.path.resolve().name
    target = out if out is not None else Path(f"{name}{chosen.suffix}")
    with working(f"writing {target} …"):
        content = chosen.render(loaded)
        replace_file(target, content, keep_out_of=loaded.path)
    size = len(content) if isinstance(content, bytes) else len(content.encode())
    done = f"wrote {target} ({format_bytes(size)})"
    if loaded.allocations.is_empty():
        say(f"{done}, which is empty: no blocks of memory were recorded in the run")
    else:
        say(f"{done}; open it with {chosen.opens_with}")
    return 0
