"""The exceptions attnprof raises.

    AttnprofError
    ├── CaptureError         tracing could not start, or was used wrongly
    ├── DryRunError          a program cannot run without values, or without a real device
    │   └── LengthError      a sequence is longer than the program can take
    ├── RunFormatError       a directory is not a run, or not one this version can read
    ├── SnapshotError        a file is not a memory snapshot, or not one that can be trusted
    ├── AttributionError     the recorded facts contradict each other
    ├── BudgetExceeded       a memory budget or growth law was broken
    └── CommandError         a command line could not be carried out

A bad argument is a ``ValueError`` or a ``TypeError``, as everywhere in Python.
Every message says what happened, what was found, what was expected and what to do.
"""

from collections.abc import Sequence


class AttnprofError(Exception):
    """Base of everything attnprof raises on purpose."""


class CaptureError(AttnprofError):
    """Tracing could not start, or was used in a way it does not support."""


class DryRunError(AttnprofError):
    """A program does what a dry run cannot; the message names the line."""


class LengthError(DryRunError):
    """A sequence is longer than the program can take: a table of positions ends before it."""

    rows: int = 0
    """How many rows the table has, or the length at which it ends, where that is known: the first
    guess at how long a sequence may be."""


class RunFormatError(AttnprofError):
    """A directory is not an attnprof run, or not one that this version can read."""


class SnapshotError(AttnprofError):
    """A file is no memory snapshot of PyTorch, is damaged, or would do more than hold data."""


class AttributionError(AttnprofError):
    """The recorded facts contradict each other, so no honest attribution exists."""


class BudgetExceeded(AttnprofError):
    """A memory budget or a growth law was broken."""


class CommandError(AttnprofError):
    """A command could not be carried out; its message is the one line the user sees."""


def require_known(
    ok: bool,
    what: str,
    got: object,
    known: Sequence[object],
    *,
    where: str = "the run",
    most: int = 12,
) -> None:
    """Raise a ValueError that says what there is, unless something is there.

    Args:
        ok: Whether it is there.
        what: What it is, such as ``"step"``.
        got: Which was asked for.
        known: Which there are.
        where: In what it was looked for.
        most: Name no more than so many.
    """
    if not ok:
        choices = ", ".join(map(str, known[:most])) + (", …" if len(known) > most else "")
        raise ValueError(f"{where} has no {what} {got!r}; it has: {choices or 'none'}")
