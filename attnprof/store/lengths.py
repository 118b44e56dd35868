"""``growth.json``: the lengths of a sweep, how each went, and which settings they share.

A directory of runs holds::

    growth.json                 the list (`GROWTH_VERSION` inside)
    measured-000001024/         the run of a measured length
    dry_run-000001024/          the run of a dry one
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnprof.errors import RunFormatError
from attnprof.store.reader import open_run
from attnprof.vocabulary import Status

GROWTH_FILE = "growth.json"
GROWTH_VERSION = 1

MEASURED, DRY_RUN, STEPS = "measured", "dry_run", "steps"
"""Where a length's points come from: a real run, a dry run, or (not in a sweep) a run's steps."""
_SOURCES = (MEASURED, DRY_RUN)
SKIPPED = "skipped"
"""The status of a length that was not run: a shorter one had run out of memory."""
_EXPECTED = "expected a directory written by attnprof.sweep() or 'attnprof sweep'"


@dataclass(frozen=True, slots=True)
class Length:
    """One length and how running it went."""

    seq_len: int
    source: str
    """``"measured"``, ``"dry_run"`` or ``"steps"``."""
    status: str
    """A `Status`, or ``"skipped"``."""
    reason: str = ""
    """Why it is not completed."""
    path: Path | None = None
    """The directory of its run; None if it left none."""


@dataclass(frozen=True, slots=True)
class StoredGrowth:
    """The content of growth.json."""

    make_step: str
    """The name of the function that was swept."""
    settings: dict[str, Any]
    """What all its runs have in common: devices, steps."""
    lengths: tuple[Length, ...]


def run_directory(path: Path, source: str, seq_len: int) -> Path:
    """Return where the run of a length is kept, in an order that listings keep."""
    return path / f"{source}-{seq_len:09d}"


def write_growth(path: Path, growth: StoredGrowth) -> None:
    """Write growth.json in one move: a reader sees the old list or the new one.

    Raises:
        OSError: The directory cannot be written.
    """
    content = {
        "growth_version": GROWTH_VERSION,
        "make_step": growth.make_step,
        "settings": growth.settings,
        "lengths": [
            {
                "seq_len": length.seq_len,
                "source": length.source,
                "status": length.status,
                "reason": length.reason,
                "run": length.path.name if length.path is not None else None,
            }
            for length in growth.lengths
        ],
    }
    new = path / (GROWTH_FILE + ".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path / GROWTH_FILE)


def read_growth(path: Path) -> StoredGrowth:
    """Read the growth.json in ``path``.

    A length whose run is gone or damaged is ``failed``, with the reason.

    Raises:
        RunFormatError: There is no growth.json, or it is damaged or of another version.
    """
    try:
        content = json.loads((path / GROWTH_FILE).read_text(encoding="utf-8"))
        version = content["growth_version"]
    except (FileNotFoundError, NotADirectoryError):
        what = "it is a file" if path.exists() else "no such directory"
        what = f"it has no {GROWTH_FILE}" if path.is_dir() else what
        raise RunFormatError(f"no growth at {path}: {what}; {_EXPECTED}") from None
    except OSError as error:
        raise RunFormatError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(path) from None
    if version != GROWTH_VERSION:
        raise RunFormatError(
            f"cannot read {path}: its {GROWTH_FILE} has version {version!r}, this attnprof reads "
            f"{GROWTH_VERSION}; read it with the attnprof that wrote it, or sweep again"
        )
    try:
        lengths = tuple(_check_run(_read_length(path, row)) for row in content["lengths"])
        return StoredGrowth(str(content["make_step"]), dict(content["settings"]), lengths)
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None


def _damaged(path: Path) -> RunFormatError:
    return RunFormatError(
        f"no growth at {path}: its {GROWTH_FILE} is damaged or not attnprof's; {_EXPECTED}"
    )


def _read_length(path: Path, row: dict[str, Any]) -> Length:
    status, source, seq_len = row["status"], row["source"], int(row["seq_len"])
    if source not in _SOURCES:
        raise ValueError(source)
    return Length(
        seq_len=seq_len,
        source=source,
        status=SKIPPED if status == SKIPPED else Status(status).value,
        reason=str(row["reason"]),
        # Not the name in the list, which whoever made it could have lead anywhere.
        path=None if row["run"] is None else run_directory(path, source, seq_len),
    )


def _check_run(length: Length) -> Length:
    if length.path is None:
        return length
    try:
        open_run(length.path)
    except RunFormatError as error:
        return replace(length, status=Status.FAILED.value, reason=str(error), path=None)
    return length
