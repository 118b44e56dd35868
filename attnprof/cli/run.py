"""``attnprof run``: record any script or module, unchanged."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from attnprof.cli.console import say, working
from attnprof.errors import CommandError
from attnprof.vocabulary import Detail

if TYPE_CHECKING:
    from attnprof.capture.tracer import Tracer
    from attnprof.cli.program import Program

_INTERRUPTED = 130
"""The exit code of a program ended by Ctrl-C, as shells count it."""


class RunCommand(TyperCommand):
    """A command whose own options end where the program begins, as python's do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Hand everything behind ``-m MODULE`` to the program, even ``--out`` and ``--help``.

        Behind a script the parser does so by itself (``allow_interspersed_args``).
        """
        result: list[str] = super().parse_args(ctx, _end_options_at_module(args))
        return result


def _end_options_at_module(args: list[str]) -> list[str]:
    at = 0
    while at < len(args) and args[at].startswith("-") and args[at] != "--":
        if args[at].startswith("-m"):
            end = at + (2 if args[at] == "-m" else 1)
            return [*args[:end], "--", *args[end:]] if end <= len(args) else args
        takes_value = args[at] in ("--out", "--samples-per-second", "--detail")
        at += 2 if takes_value else 1
    return args


def run(
    program: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SCRIPT ARGS",
            help="The script and its arguments; all that follows it is for the script.",
            show_default=False,
        ),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option("-m", metavar="MODULE", help="Run a module, as python -m does."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to write the run: a new or empty directory. "
            "Without it: runs/<name>-<date>-<time>.",
            show_default=False,
        ),
    ] = None,
    samples_per_second: Annotated[
        float,
        typer.Option(metavar="X", min=0, help="How often host and GPU totals are read; 0: never."),
    ] = 10.0,
    detail: Annotated[
        Detail,
        typer.Option(
            help="full: record every step. auto: the same, but of a long training loop on CUDA "
            "only the first steps and those after a higher peak.",
        ),
    ] = Detail.AUTO,
) -> int:
    """Record a Python script, unchanged: attnprof run [--out DIR] train.py --its-own-options.

    The script runs as python would run it and its exit code is passed on. At the end one line on
    stderr says what the peak was; see the rest with attnprof report.

    torch is imported before the script, so environment variables that torch reads on import must
    be set outside of it.
    """
    from attnprof.cli.program import end_program, find_module, find_script

    arguments = program or []
    if module is None and not arguments:
        raise CommandError(
            "nothing to run; give a script, as in 'attnprof run train.py', or a module with -m"
        )
    try:
        if module is not None:
            found = find_module(module, arguments)
        else:
            found = find_script(arguments[0], arguments[1:])
    except CommandError:
        raise
    except BaseException as error:  # a package above the module failed when it was imported
        return end_program(error)
    return _record(found, out, samples_per_second, detail)


def _record(program: "Program", out: Path | None, samples_per_second: float, detail: Detail) -> int:
    """Run the program under a trace and return its exit code."""
    from attnprof.capture.tracer import Tracer
    from attnprof.cli.program import end_program, enter_process

    enter_process(program.arguments, program.search_path)  # the run notes what was run
    here = os.getcwd()  # the program may go elsewhere; the user stays
    process = os.getpid()
    directory = (out if out is not None else make_directory(program.name)).absolute()
    path = show_path(directory, here)
    path = path if path[0] != "-" else f"./{path}"  # else it would be taken for an option
    options: dict[str, Any] = {"samples_per_second": samples_per_second, "detail": detail.value}
    tracer = Tracer(directory, **options, command="'attnprof run'")
    ended = _run_traced(program, tracer, directory if out is None else None)
    code = 0 if ended is None else _INTERRUPTED
    with suppress(KeyboardInterrupt):  # a second one, while the first one's traceback is shown
        code = 0 if ended is None else end_program(ended)
    try:
        if os.getpid() == process:  # a child that the program forked ends here, too
            summarise_run(tracer, directory, path)
    except KeyboardInterrupt:
        with _ignoring_interrupts():
            say(f"interrupted; the run is in {path}")
    return code


def _run_traced(program: "Program", tracer: "Tracer", made: Path | None) -> BaseException | None:
    """Run the program under a trace and return what it raised.

    Args:
        program: What to run.
        tracer: The trace; it has not begun.
        made: The directory that was made for the run, to go if recording cannot begin.
    """
    from attnprof.cli.program import run_program

    has_begun = False
    ended: BaseException | None = None
    try:
        with tracer:
            has_begun = True
            try:
                run_program(program)
            except BaseException as error:
                ended = error
                raise  # the run notes how the program ended
    except BaseException as error:
        if not has_begun:  # so the program never ran
            if made is not None:
                with suppress(OSError):
                    made.rmdir()
            raise
        if error is ended or not isinstance(error, Exception):
            return error
        say(f"the run could not be written to its end: {error}")  # no affair of the program's
    return ended


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let nobody's third Ctrl-C hide what is said after the second."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if before is not None:  # None: it was not set from Python
            signal.signal(signal.SIGINT, before)


def make_directory(name: str) -> Path:
    """Make and return a new directory for a run: ``runs/<name>-<date>-<time>``.

    Made at once, so that of several processes started together each has its own.

    Raises:
        CommandError: It cannot be made here.
    """
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory, number = stem, 1
    while True:
        try:
            directory.parent.mkdir(exist_ok=True)
            directory.mkdir()
            return directory
        except FileExistsError:
            if not directory.parent.is_dir():
                raise CommandError(
                    "cannot record into runs/: it is a file; give a directory with --out"
                ) from None
            number += 1
            directory = stem.with_name(f"{stem.name}-{number}")
        except OSError as error:
            raise CommandError(
                f"cannot record into {directory}: {error.strerror}; give a directory with --out"
            ) from None


def summarise_run(tracer: "Tracer", directory: Path, path: str) -> None:
    """Say on stderr what the peak of a run was, who held it, how it ended and how to see more.

    Fails by Ctrl-C only: the program has its own exit code, and a run that cannot be summarised is
    still on disk, unless the program removed it.

    Args:
        tracer: The trace, ended.
        directory: Where it wrote the run.
        path: The same, as the user can type it.
    """
    from attnprof.store.schema import RUN_FILE

    _flush(sys.stdout)
    try:
        with working("attnprof reads the run …"):
            run = tracer.run
            peak, status = run.peak(), run.status
    except Exception as error:
        if not (directory / RUN_FILE).exists():
            say(f"there is no run in {path}: the program, or another, removed what was recorded")
            return
        reason = str(error) or type(error).__name__
        say(f"the run is in {path}, but was not summarised: {reason}")
        return
    say(describe_peak(peak))
    say(f"{status}; recorded in {path}; see more with: attnprof report {path}")


def describe_peak(peak: Any) -> str:
    """Return in one line how high a peak was, where, and who held most of it."""
    from attnprof.units import format_bytes

    if not peak.total_bytes:
        return "no torch operator ran, so there is no peak"
    where = f"step {peak.step}, {peak.phase}" + (f", {peak.layer}" if peak.layer else "")
    largest = [f"{name} {format_bytes(size)}" for name, size in peak.by_category().items()]
    more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    total = format_bytes(peak.total_bytes)
    return f"peak {total} on {peak.device} ({where}): {', '.join(largest[:3])}{more}"


def show_path(path: Path, here: str) -> str:
    """Return a path as it can be typed in the folder ``here``."""
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _flush(file: Any) -> None:
    with suppress(OSError, ValueError, AttributeError):
        file.flush()  # if it is closed, or its reader is gone, that is the program's affair
