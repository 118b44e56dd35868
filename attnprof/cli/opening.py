"""Whether a run holds what a command is about, and all of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from attnprof.errors import CommandError

if TYPE_CHECKING:
    from attnprof.analysis.peak import Peak
    from attnprof.run import Run


def say_what_is_missing(run: "Run", path: Path) -> None:
    """Say on stderr if a run does not hold all that the program did; a report says so itself.

    Args:
        run: The run.
        path: What the user calls it.
    """
    from attnprof.cli.console import say
    from attnprof.vocabulary import Status

    if run.status is Status.RECORDING:
        say(f"{path} is still being recorded; this is about what was written so far")
    elif run.status is not Status.COMPLETED:
        say(f"{path} ended {run.status.value}; this is about what ran until then")
    if run.has_lost_commits:
        say(f"the newest part of {path} is missing from its files; this is about what came before")


def require_peak(run: "Run", path: Path) -> "Peak":
    """Return a run's peak.

    Args:
        run: The run.
        path: What the user calls it.

    Raises:
        CommandError: Nothing was recorded. No numbers are better than zeros that look like some.
    """
    peak = run.peak()
    if not peak.total_bytes:
        raise CommandError(
            f"nothing was recorded in {path}, which ended {run.status.value}: it holds no "
            "allocations; give a run of a program that made tensors while attnprof watched"
        )
    return peak
