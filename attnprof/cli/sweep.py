"""``attnprof sweep``: a script's workload at many lengths, and the law of its memory."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnprof.cli.console import fail, is_terminal, printing_to_stderr, say
from attnprof.errors import CommandError, RunFormatError

if TYPE_CHECKING:
    from attnprof.capture.sweep import SweepProgress
    from attnprof.cli.target import Target
    from attnprof.growth import Growth
    from attnprof.report.machine import Machine

_HERE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
"""What torch calls a device of this machine."""


def sweep(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT:FUNCTION",
            help="A function make_step(seq_len, device) that builds model and inputs and returns "
            "a function that runs one step; or MODULE:FUNCTION.",
            show_default=False,
        ),
    ],
    seq_lens: Annotated[
        str,
        typer.Option(
            metavar="LENGTHS",
            help="256,512,1K or first:last:x2 or first:last:256.",
            show_default=False,
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run on fake tensors, which take no memory.")
    ] = False,
    measured: Annotated[
        bool, typer.Option("--measured", help="Measure, with --dry-run too.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            metavar="D",
            help="What make_step is given when it is measured; with --dry-run also a device that "
            "is not here, such as H200: whose memory to answer for, and which to fit.",
        ),
    ] = "cpu",
    dry_target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="T",
            help="Whose memory dry runs answer for: cpu, cuda, or a device such as H200. "
            "Without it, that of --device.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to write the runs; lengths that are there already are not run again. "
            "Without it: runs/<name>-sweep-<date>-<time>.",
            show_default=False,
        ),
    ] = None,
    isolate: Annotated[
        bool,
        typer.Option("--isolate/--no-isolate", help="Measure each length in its own process."),
    ] = True,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Steps per length. Without it one, and a second one if the first left memory.",
            show_default=False,
        ),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(
            metavar="C", help="Speak of this category, such as softmax.", show_default=False
        ),
    ] = None,
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            "--capacity",
            "--fits",
            metavar="SIZE",
            help="Find the longest sequence that fits: '80 GB', or a device such as H200.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; bytes are integers.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a page that needs no network, too.", show_default=False
        ),
    ] = None,
) -> int:
    """Run a workload at several sequence lengths and say by which law its memory grows.

    Each length is measured in a process of its own, so that one which runs out of memory ends
    nothing but itself: it is where the wall is. With --dry-run nothing is computed and no memory
    is taken, at any length.

    Ends with exit code 0 if every length ran or ran out of memory, and 1 if one failed otherwise.
    """
    from attnprof.cli.growth_report import GrowthOptions, show_growth
    from attnprof.cli.lengths import parse_seq_lens
    from attnprof.cli.run import show_path
    from attnprof.cli.target import Target

    lengths = parse_seq_lens(seq_lens)
    if _HERE.fullmatch(device) is None:
        machine = _find_machine(device, is_measured=measured or not dry_run)
        device, dry_target = "cpu", dry_target or machine.target
        capacity = capacity or [machine.name]
    shown = GrowthOptions(capacity or (), category, as_json=as_json, html=html)
    shown.check(out=out)
    settings = {
        "dry_run": dry_run,
        "measured": measured or not dry_run,
        "device": device,
        "target": dry_target,
        "isolate": isolate,
        "steps": steps,
    }
    with printing_to_stderr(as_json):
        growth = _run(Target(target), lengths, out, settings)
    if isinstance(growth, int):
        return growth
    show_growth(growth, shown)
    where = show_path(growth.path or Path(), os.getcwd())
    say(f"the runs are in {where}; see them again with: attnprof report {where}")
    return int(any(length.status in ("failed", "interrupted") for length in growth.lengths))


def _find_machine(device: str, *, is_measured: bool) -> "Machine":
    """Return a device that dry runs can answer for, and nothing can be measured on.

    Raises:
        CommandError: It is to be measured on.
    """
    from attnprof.report.machine import find_machine

    machine = find_machine(device)
    if is_measured:
        raise CommandError(
            f"cannot measure on {device!r}; expected a device of this machine, such as cpu or "
            f"cuda:0; to answer for {machine.name}, add --dry-run"
        )
    return machine


def _run(
    target: "Target", lengths: Sequence[int], out: Path | None, settings: dict[str, Any]
) -> "Growth | int":
    """Sweep; return the growth, or if that was not possible the exit code."""
    from attnprof.cli.run import make_directory
    from attnprof.cli.target import is_from_workload, show_failure

    directory = out
    try:
        target.load()
        directory = out or make_directory(f"{target.name}-sweep")
        from attnprof.capture.sweep import sweep as run_sweep

        progress = None if is_terminal(sys.stderr) else _say_progress
        return run_sweep(target, lengths, directory=directory, progress=progress, **settings)
    except KeyboardInterrupt:
        return _end_interrupted(directory)
    except BaseException as error:
        if is_from_workload(error):
            show_failure(error)
            return 1
        if isinstance(error, TypeError):  # make_step is none
            raise CommandError(str(error)) from None
        raise
    finally:
        if out is None and directory is not None:
            with suppress(OSError):  # it stays unless it is empty
                directory.rmdir()


def _say_progress(at: "SweepProgress") -> None:
    """Say how each length ended, where there is no terminal to draw a bar on."""
    if at.status is not None:
        word = at.source.replace("_", " ")
        ended = at.status.replace("_", " ")
        say(f"{at.done} of {at.total}: n = {at.seq_len}, {word}: {ended}")


def _end_interrupted(directory: Path | None) -> int:
    """Say what an interrupted sweep leaves behind and how to go on; return the exit code."""
    from attnprof.store.lengths import read_growth

    try:
        finished = 0 if directory is None else len(read_growth(directory).lengths)
    except RunFormatError:  # it was interrupted before its first length had ended
        finished = 0
    if not finished:
        return fail("interrupted; no length was finished", 130)
    where = shlex.quote(str(directory))
    return fail(
        f"interrupted; runs finished until then: {finished}, kept in {where}; go on with the same "
        f"command and --out {where}",
        130,
    )
