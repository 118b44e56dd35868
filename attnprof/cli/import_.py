"""``attnprof import``: a run made of a memory snapshot that PyTorch wrote."""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from attnprof.cli.console import say, working
from attnprof.errors import AttnprofError


def import_(
    snapshot: Annotated[
        Path,
        typer.Argument(
            metavar="SNAPSHOT",
            help="What torch.cuda.memory._dump_snapshot() wrote, as it is or gzipped.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to write the run: a new or empty directory. "
            "Without it: runs/<name>-<date>-<time>.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Make a run of a PyTorch memory snapshot, whoever recorded it: attnprof import s.pickle.

    Peak, timeline, stacks and what ran out of memory are as recorded; what blocks were for is
    concluded from call stacks and lifetimes, and marked so. No code in the file can run.
    """
    from attnprof.cli.run import describe_peak, make_directory
    from attnprof.interop.importing import import_snapshot
    from attnprof.run import load

    with working("reading the snapshot …"):
        directory = out if out is not None else make_directory(snapshot.name.partition(".")[0])
        try:
            import_snapshot(snapshot, directory)
        except (AttnprofError, OSError):
            if out is None:
                with suppress(OSError):
                    directory.rmdir()
            raise
        run = load(directory)
        peak = run.peak()
    say(describe_peak(peak))
    path = shlex.quote(str(directory))
    say(f"{run.status}; imported into {path}; see more with: attnprof report {path}")
    return 0
