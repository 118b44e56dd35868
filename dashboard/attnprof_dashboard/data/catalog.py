"""The catalogue: every run and sweep below one directory, found by looking, never by name.

What a browser asks for is a key of this table. No text from a request becomes part of a path, and
no link is followed, so nothing outside of the directory can be reached.
"""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from attnprof.store.lengths import GROWTH_FILE
from attnprof.store.reader import StoredRun
from attnprof.store.schema import JOURNAL_FILE, RUN_FILE, SCHEMA_VERSION, TABLES_DIR
from attnprof.vocabulary import Status

MAX_DEPTH = 6
"""Directories below the root that are looked into."""
_FRESH_SECONDS = 1.0
"""Within so long the directory is not looked through again."""
_RANK = re.compile(r"rank[-_]?(\d+)")


class Kind(StrEnum):
    """What a row of the catalogue is."""

    RUN = "run"
    SWEEP = "sweep"
    REFUSED = "refused"
    """A link; it may lead anywhere, so it is shown and not followed."""


UNREADABLE = "unreadable"
DELETED = "deleted"
EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the catalogue."""

    key: str
    """Its path below the root: what the URL says."""
    path: Path
    kind: Kind
    status: str
    """A `Status`, ``"unreadable"``, ``"empty"`` or ``"deleted"``."""
    created: str = ""
    """When recording began, in ISO 8601; empty if it is not known."""
    reason: str = ""
    """Why it cannot be shown, or what ended it."""
    sweep: str = ""
    """The key of the sweep that a run belongs to."""
    rank: int | None = None
    """From a directory called ``rank-3``."""

    @property
    def is_readable(self) -> bool:
        """Whether there is a run to show."""
        return self.kind is Kind.RUN and self.status not in (UNREADABLE, DELETED, EMPTY)


class Catalog:
    """The runs below a directory; safe to use from several threads."""

    def __init__(self, root: str | Path) -> None:
        """Look at a directory, or at a single run or sweep."""
        self.root = Path(root).resolve()
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._entries: dict[str, Entry] = {}
        self._known: dict[Path, tuple[tuple[int, int], dict[str, Any] | None]] = {}

    def entries(self) -> list[Entry]:
        """Return every row, newest first; one that has gone since it was seen is ``deleted``."""
        with self._lock:
            if time.monotonic() - self._looked_at > _FRESH_SECONDS:
                found = {entry.key: entry for entry in self._scan()}
                gone = {
                    key: replace(entry, status=DELETED, reason="its directory is gone")
                    for key, entry in self._entries.items()
                    if key not in found
                }
                self._entries = {**found, **gone}
                self._looked_at = time.monotonic()
            return sorted(self._entries.values(), key=lambda e: (e.created, e.key), reverse=True)

    def find(self, key: str) -> Entry | None:
        """Return the row of a key, or None if there is none."""
        self.entries()
        return self._entries.get(key)

    def is_inside(self, entry: Entry) -> bool:
        """Return whether an entry and its files still lie below the root, with no link on the way.

        A directory may be replaced by a link after it was found.
        """
        files = [entry.path / name for name in (RUN_FILE, JOURNAL_FILE, GROWTH_FILE, TABLES_DIR)]
        with contextlib.suppress(OSError):
            files += (entry.path / TABLES_DIR).iterdir()
        return all(file.resolve() == file for file in (entry.path, *files))

    def _scan(self) -> Iterator[Entry]:
        single = _look(self.root)
        if single is not None:
            yield self._describe(self.root.name or "run", self.root, single, "")
        if single is not Kind.RUN:
            yield from self._walk(self.root, "", 0, self.root.name if single else "")

    def _walk(self, folder: Path, prefix: str, depth: int, sweep: str) -> Iterator[Entry]:
        try:
            with os.scandir(folder) as found:
                children = sorted(found, key=lambda child: child.name)
        except OSError:
            return
        for child in children:
            key = f"{prefix}{child.name}"
            path = folder / child.name
            if child.is_symlink():
                if path.is_dir():
                    yield Entry(key, path, Kind.REFUSED, UNREADABLE, reason="links are refused")
                continue
            if not child.is_dir(follow_symlinks=False):
                continue
            kind = _look(path)
            if kind is not None:
                yield self._describe(key, path, kind, sweep)
            elif _is_empty(path):
                yield Entry(key, path, Kind.RUN, EMPTY, reason="the directory is empty")
            if kind is not Kind.RUN and depth < MAX_DEPTH:
                inner = key if kind is Kind.SWEEP else ""
                yield from self._walk(path, f"{key}/", depth + 1, inner)

    def _describe(self, key: str, path: Path, kind: Kind, sweep: str) -> Entry:
        if kind is Kind.SWEEP:
            return Entry(key, path, kind, Status.COMPLETED.value, created=_date(path))
        info = self._read(path / RUN_FILE)
        rank = _RANK.fullmatch(path.name)
        entry = Entry(key, path, kind, UNREADABLE, sweep=sweep, rank=int(rank[1]) if rank else None)
        if info is None:
            return replace(entry, reason=f"its {RUN_FILE} is missing or damaged")
        version = info.get("schema_version")
        if version != SCHEMA_VERSION:
            reason = f"schema version {version!r}; this attnprof reads {SCHEMA_VERSION}"
            return replace(entry, reason=reason)
        try:
            status = StoredRun(path=path, info=info, good_bytes={}).status.value
        except (KeyError, ValueError, TypeError):
            return replace(entry, reason=f"its {RUN_FILE} has no status that is known")
        return replace(entry, status=status, created=_text(info.get("created")), reason=_end(info))

    def _read(self, file: Path) -> dict[str, Any] | None:
        """Return the content of a run.json, from memory if the file is the same."""
        try:
            stat = file.lstat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            known = self._known.get(file)
            if known is None or known[0] != stamp:
                info = json.loads(file.read_text("utf-8")) if not file.is_symlink() else None
                known = stamp, info if isinstance(info, dict) else None
                self._known[file] = known
            return known[1]
        except (OSError, ValueError, RecursionError):
            return None


def _look(path: Path) -> Kind | None:
    """Return what a directory holds: a run, a sweep, or neither."""
    if (path / RUN_FILE).is_file() or (path / JOURNAL_FILE).is_file():
        return Kind.RUN
    return Kind.SWEEP if (path / GROWTH_FILE).is_file() else None


def _is_empty(path: Path) -> bool:
    try:
        with os.scandir(path) as found:
            return next(found, None) is None
    except OSError:
        return False


def _date(path: Path) -> str:
    seconds = (path / GROWTH_FILE).stat().st_mtime
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _end(info: dict[str, Any]) -> str:
    """Return the first line of what ended a run; nothing if it came to its end."""
    error = info.get("error")
    if not isinstance(error, dict):
        return ""
    message = _text(error.get("message")).strip().splitlines()
    return ": ".join([_text(error.get("type")) or "error", *message[:1]])
