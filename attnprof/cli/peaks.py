"""The peak of a run that a command is about."""

from pathlib import Path
from typing import TYPE_CHECKING

from attnprof.errors import CommandError

if TYPE_CHECKING:
    from attnprof.analysis.peak import Peak
    from attnprof.run import Run


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
