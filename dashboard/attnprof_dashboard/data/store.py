"""Keeps what is derived from runs: derived once per state of a run, then only mapped."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from attnprof import vocabulary
from attnprof.store.lengths import GROWTH_FILE
from attnprof.store.schema import JOURNAL_FILE, RUN_FILE, TABLES_DIR
from attnprof_dashboard.data.catalog import Catalog, Entry, Kind
from attnprof_dashboard.data.derive import FACTS_FILE, FORMAT, HELD, derive
from attnprof_dashboard.data.digest import Digest
from attnprof_dashboard.data.growth_digest import GrowthDigest

_LONG_RUN_BYTES = 16 << 20
"""Of its operators' table: from here on a run is derived in a process of its own."""
_MOST_OPEN = 64
_BETWEEN = "-"
"""In the name of a state: the run before it, what was written of it after."""
_MOST_KEPT = 200
_MOST_KEPT_BYTES = 8 << 30
"""Derived runs on disk, in number and bytes; those that were not used for longest go first."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A run or sweep as far as it is known: what was derived, or why there is nothing (yet)."""

    digest: Digest | None = None
    growth: GrowthDigest | None = None
    error: str = ""
    is_pending: bool = False
    """It is being derived; ask again."""


class DigestStore:
    """The digests of a catalogue's runs; safe to use from several threads."""

    def __init__(self, catalog: Catalog, folder: Path | None = None) -> None:
        """Keep them in ``folder``; without, in the user's cache directory."""
        self.catalog = catalog
        self.folder = folder or default_folder()
        self._code_ns = _find_code_ns()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, tuple[str, Opened]] = OrderedDict()
        self._working: dict[str, threading.Thread] = {}
        self._failed: dict[str, str] = {}
        # One after the other, or the ranks of a job would take the machine's memory together. Short
        # runs do not wait for long ones.
        self._turns = {is_long: threading.Lock() for is_long in (False, True)}

    def open(self, key: str, *, is_fresh: bool = True) -> Opened:
        """Return a run's digest, deriving it if need be.

        Args:
            key: A key of the catalogue.
            is_fresh: Of a run that is still written, its state now. Else the state that was last
                opened will do, so that what belongs to one page speaks of one state.
        """
        entry = self.catalog.find(key)
        with self._lock:
            known = self._open.get(key)
            if known is not None and (not is_fresh or entry is None or not entry.is_readable):
                self._open.move_to_end(key)
                return known[1]
        if entry is None:
            return Opened(error=f"there is no run {key!r} here")
        if not entry.is_readable and entry.kind is not Kind.SWEEP:
            return Opened(error=entry.reason or entry.status)
        if not self.catalog.is_inside(entry):
            return Opened(error="it leads out of the directory that is shown")
        return self._open_entry(entry)

    def fingerprint(self, path: Path) -> str:
        """Return a name for the state of a run: another one as soon as something was written.

        Those of one run begin alike.
        """
        parts = [str(FORMAT), str(self._code_ns)]
        for file in (path / name for name in (RUN_FILE, JOURNAL_FILE, GROWTH_FILE)):
            if file.exists():
                stat = file.stat()
                parts += [str(stat.st_size), str(stat.st_mtime_ns), str(stat.st_ino)]
        return f"{_hash(str(path))}{_BETWEEN}{_hash(*parts)}"

    def _open_entry(self, entry: Entry) -> Opened:
        try:
            name = self.fingerprint(entry.path)
        except OSError as error:
            return Opened(error=f"it cannot be read: {error.strerror or error}")
        with self._lock:
            known = self._open.get(entry.key)
            is_there = (self.folder / name / FACTS_FILE).exists()
            if known is not None and known[0] == name and is_there:
                return known[1]
            if name in self._failed:
                return Opened(error=self._failed[name])
            worker = self._working.get(name)
            if worker is None and not is_there:
                worker = threading.Thread(target=self._derive, args=(entry.path, name), daemon=True)
                self._working[name] = worker
                worker.start()
        if worker is not None:
            worker.join(timeout=0.05 if _is_long(entry.path) else 30.0)
            if worker.is_alive():
                return Opened(is_pending=True)
        return self._map(entry.key, name)

    def _map(self, key: str, name: str) -> Opened:
        with self._lock:
            if name in self._failed:
                return Opened(error=self._failed[name])
            try:
                opened = _open_folder(self.folder / name)
                os.utime(self.folder / name)
            except (OSError, ValueError, KeyError) as error:
                return Opened(error=f"what was derived from it cannot be read: {error}")
            self._open[key] = name, opened
            self._open.move_to_end(key)
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
            self._drop_older(name)
            return opened

    def _derive(self, path: Path, name: str) -> None:
        """Derive a run into a new directory and put that where it is looked for."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".new-") as new:
                out = Path(new) / "run"
                out.mkdir()
                with self._turns[_is_long(path)]:
                    _run_derive(path, out)
                if not (self.folder / name).exists():
                    out.rename(self.folder / name)
            self._evict()
        except Exception as error:  # whatever a damaged run raises: it has a page that says so
            message = str(error).splitlines()
            self._failed[name] = message[-1] if message else type(error).__name__
        finally:
            with self._lock:
                self._working.pop(name, None)

    def _drop_older(self, name: str) -> None:
        """Delete what was derived of the same run before: nobody will ask for it again."""
        for other in self.folder.glob(f"{name.partition(_BETWEEN)[0]}{_BETWEEN}*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def _evict(self) -> None:
        """Delete what is too many or too much; the newest stays, however large it is."""
        found = (_measure(p) for p in self.folder.iterdir() if not p.name.startswith("."))
        total_bytes = 0
        for number, (_, size_bytes, path) in enumerate(sorted(found, reverse=True)):
            total_bytes += size_bytes
            if number >= _MOST_KEPT or (number and total_bytes > _MOST_KEPT_BYTES):
                shutil.rmtree(path, ignore_errors=True)


def _measure(folder: Path) -> tuple[float, int, Path]:
    """Return when a directory was used last, its bytes, and the directory."""
    try:
        size_bytes = sum(file.stat().st_size for file in folder.rglob("*"))
        return folder.stat().st_mtime, size_bytes, folder
    except OSError:  # another dashboard is deleting it
        return 0.0, 0, folder


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _open_folder(folder: Path) -> Opened:
    """Open what was derived: of a run, or of a sweep."""
    if (folder / "device-0").exists():
        return Opened(digest=Digest(folder))
    return Opened(growth=GrowthDigest.open(folder / FACTS_FILE))


def default_folder() -> Path:
    """Return the directory for derived files below the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attnprof" / "dashboard"


def _run_derive(path: Path, out: Path) -> None:
    """Derive here if that is quick; else in a process of its own, whose memory goes with it."""
    if not _is_long(path):
        derive(path, out)
        return
    module = "attnprof_dashboard.data.derive"
    command = [sys.executable, "-m", module, str(path), str(out), HELD]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ours, held = os.pipe()
    try:  # it reads from the pipe, whose other end closes with this process, however that ends
        done = subprocess.run(
            command, stdin=ours, capture_output=True, text=True, env=environment, check=False
        )
    finally:
        os.close(ours)
        os.close(held)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise RuntimeError(lines[-1].partition(": ")[2] or lines[-1])


def _is_long(path: Path) -> bool:
    """Return whether a run is long, or the runs of a sweep are together."""
    try:
        name = f"{TABLES_DIR}/ops.arrows"
        files = [*path.glob(name), *path.glob(f"*/{name}")]
        return sum(file.stat().st_size for file in files) > _LONG_RUN_BYTES
    except OSError:
        return False


def _find_code_ns() -> int:
    """Return when attnprof last changed: what an older one derived is not what this one would."""
    packages = (Path(vocabulary.__file__).parent, Path(__file__).parents[1])
    files = (file for package in packages for file in package.rglob("*.py"))
    return max(file.stat().st_mtime_ns for file in files)
