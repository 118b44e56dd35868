"""Where the command line writes: reports to stdout, all that is said about them to stderr."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_WIDTH = 110
"""Characters per line where there is no terminal: the same everywhere, so that files compare."""
LEAST_WIDTH = 60
"""Below this a report is laid out for so many characters and the terminal folds its lines."""
_IN_ASCII = str.maketrans({
    "²": "^2", "ᵀ": "^T", "×": "x", "·": "-", "–": "-", "−": "-", "…": "...", "◀": "<",
    "≥": ">=", "≤": "<=", "µ": "u", "∂": "d",
})  # fmt: skip
"""What a report's signs become where the output cannot show them."""


def fail(message: str, code: int) -> int:
    """Print one line about what went wrong and return the exit code."""
    say(" ".join(message.split()))
    return code


def say(message: str) -> None:
    """Print one line to stderr, under attnprof's name.

    The traced program may have closed or replaced stderr; then nobody is told, and nothing fails.
    """
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    with suppress(OSError, ValueError, AttributeError, UnicodeError):
        print(f"attnprof: {printable}", file=sys.stderr, flush=True)


def print_report(report: "RenderableType") -> None:
    """Print a report to stdout: with colour on a terminal, else plain, without trailing blanks."""
    console = make_console(sys.stdout)
    if console.is_terminal:
        console.print(report)
        return
    with console.capture() as captured:
        console.print(report)
    text = "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # a latin-1 or ASCII pipe
        text = text.translate(_IN_ASCII).encode(encoding, "replace").decode(encoding)
    sys.stdout.write(text)


def make_console(file: TextIO) -> "Console":
    """Return a rich console for ``file`` that takes text as it is: no markup, no emoji."""
    from rich.console import Console

    console = Console(file=file, markup=False, emoji=False, highlight=False, soft_wrap=False)
    width = console.width if console.is_terminal else PLAIN_WIDTH
    console.width = max(width, LEAST_WIDTH)
    return console


@contextmanager
def printing_to_stderr(is_wanted: bool) -> Iterator[None]:
    """Send what a workload and its processes print to stderr, where stdout is to be JSON alone.

    Args:
        is_wanted: Whether it is; else nothing changes.
    """
    if not is_wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show on a terminal that something takes a while."""
    if not is_terminal(sys.stderr):
        yield
        return
    with make_console(sys.stderr).status(message):
        yield


def is_terminal(file: TextIO) -> bool:
    """Return whether someone may be watching ``file``, who can be shown what moves."""
    try:
        return file.isatty() and os.environ.get("TERM") != "dumb"
    except (ValueError, AttributeError):  # closed, or None
        return False
