"""The command ``attnprof``: its verbs, and what becomes of what they raise."""

import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer
from typer.main import get_command

from attnprof.cli.compare import compare
from attnprof.cli.console import fail
from attnprof.cli.dashboard import dashboard
from attnprof.cli.demo import demo
from attnprof.cli.doctor import doctor
from attnprof.cli.export import export
from attnprof.cli.import_ import import_
from attnprof.cli.kv import kv
from attnprof.cli.predict import predict
from attnprof.cli.report import report
from attnprof.cli.run import RunCommand, run
from attnprof.cli.sweep import sweep
from attnprof.cli.theory import theory
from attnprof.cli.what_if import what_if
from attnprof.errors import AttnprofError

INTERRUPTED = 130
"""The exit code of a program ended by Ctrl-C, as shells count it."""
BROKEN_PIPE = 141
"""The exit code of a program whose reader went away, as shells count it."""
UNUSABLE = 2
"""The exit code for arguments or a run that cannot be used."""


def _unwrap(text: str | None) -> str:
    """Return a docstring with one line per paragraph, for rich to break where the screen ends."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


app = typer.Typer(
    add_completion=False,
    # One line per error is printed below; rich's boxes and tracebacks stay out of it.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Say whose bytes are at the peak of a PyTorch program's memory, and how they grow.

    Start with [bold]attnprof demo[/bold], or record a script of your own with
    [bold]attnprof run train.py[/bold].
    """
    if version:
        print(f"attnprof {find_version()}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command(
    cls=RunCommand, context_settings={"allow_interspersed_args": False}, help=_unwrap(run.__doc__)
)(run)
app.command("import", help=_unwrap(import_.__doc__))(import_)
for verb in (report, compare, export, kv, what_if, sweep, predict, theory, demo, dashboard, doctor):
    app.command(help=_unwrap(verb.__doc__))(verb)


def find_version() -> str:
    """Return the installed version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("attnprof")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "(not installed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows ``attnprof``; by default, this process's arguments.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _open_standard_streams()
    if "--help" in arguments or not arguments:  # a program that is run has its streams as they are
        with suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # see above
    try:
        with get_command(app).make_context("attnprof", list(arguments)) as context:
            code = context.command.invoke(context)
        with suppress(AttributeError, ValueError):  # a program that was run closed or replaced it
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Exit as ended:
        return ended.exit_code
    except BrokenPipeError:
        _abandon_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except (AttnprofError, ValueError) as error:
        return fail(str(error), UNUSABLE)
    except OSError as error:
        if error.filename is None:
            return fail(str(error.strerror or error), UNUSABLE)
        return fail(f"cannot open {error.filename}: {error.strerror}; check the path", UNUSABLE)
    except Exception as error:
        # What typer raises for arguments it cannot use has no public name in all its versions.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        verb = getattr(getattr(error, "ctx", None), "command_path", "attnprof")
        said = _name_the_value(error, format_message())
        return fail(f"{said} (see '{verb} --help')", UNUSABLE)


_PLAINLY = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "greater than or equal to": "at least",
}
"""What typer's checker expects, in words that are not a programmer's."""


def _name_the_value(error: Exception, said: str) -> str:
    """Return what is said about an option's value with that value in it, and what was expected."""
    list_problems = getattr(error.__cause__, "errors", None)
    if list_problems is not None:  # newer typer, whose checker is pydantic's
        problem = list_problems()[0]
        expected = problem["msg"].removeprefix("Input should be ").partition(", ")[0]
        for word, plain in _PLAINLY.items():
            expected = expected.replace(word, plain)
        if problem["msg"].startswith("Input should be "):
            said = said.replace(problem["msg"], f"got {problem['input']!r}, expected {expected}")
    return said.replace("Value error, ", "")


def _open_standard_streams() -> None:
    """Let nobody read what would go to streams that the shell closed (``>&-``).

    Their numbers would go to the next files that are opened, a run's among them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue  # open, and the interpreter was told to leave it alone
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, os.fdopen(null, "w" if number else "r", closefd=False))


def _abandon_stdout() -> None:
    """Let nothing be flushed into the closed pipe when the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
