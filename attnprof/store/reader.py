"""Read a run directory, memory-mapped, up to its last whole commit."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from attnprof.errors import RunFormatError
from attnprof.store.info import find_fault
from attnprof.store.process import may_be_alive
from attnprof.store.schema import JOURNAL_FILE, RUN_FILE, SCHEMA_VERSION, TABLES, TABLES_DIR
from attnprof.vocabulary import Status

_READ_FIRST = "expected a directory written by attnprof.trace() or 'attnprof run'"


@dataclass(frozen=True)
class StoredRun:
    """The facts of one run, as written: run.json and the tables.

    The tables are read when first asked for and stay memory-mapped.
    """

    path: Path
    info: dict[str, Any]
    """The content of run.json."""
    good_bytes: dict[str, int] = field(repr=False)
    """Per table, how much of its file the last whole commit covers."""
    lost: bool = False
    """The files are shorter than the journal says: what the last commits held is gone."""

    def table(self, name: str) -> pa.Table:
        """Return the rows of one table (`attnprof.store.schema.TABLES` names them).

        Raises:
            RunFormatError: The file is damaged before the point the journal vouches for.
        """
        schema = TABLES[name]
        size = self.good_bytes.get(name, 0)
        if not size:
            return schema.empty_table()
        file = self.path / TABLES_DIR / f"{name}.arrows"
        try:
            with pa.memory_map(str(file)) as source:
                stream = pa.ipc.open_stream(pa.BufferReader(source.read_buffer(size)))
                table = pa.Table.from_batches(list(_batches(stream)), schema=schema)
            table.validate(full=True)  # unchecked offsets of damaged text would be followed
        except PermissionError:
            raise RunFormatError(f"cannot read {file}: permission denied; ask its owner") from None
        except (OSError, pa.ArrowException) as error:
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunFormatError(
                f"cannot read {file}: {what}; the run is damaged, record it again"
            ) from None
        return table

    def columns(self, name: str) -> dict[str, np.ndarray]:
        """Return the numeric columns of a table as arrays (no copy where there is one batch)."""
        table = self.table(name)
        return {
            column: _join(table[column]).to_numpy(zero_copy_only=False)
            for column in table.column_names
            if pa.types.is_integer(table.schema.field(column).type)
            or pa.types.is_boolean(table.schema.field(column).type)
        }

    @cached_property
    def status(self) -> Status:
        """How the run ended; a run whose writer is known to be dead was interrupted."""
        status = Status(self.info["status"])
        if status is Status.RECORDING and not may_be_alive(self.info.get("writer")):
            return Status.INTERRUPTED
        return status


def _join(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _batches(stream: pa.RecordBatchStreamReader) -> Any:
    # A stream cut off at a commit has no end marker; the last batch is simply the last.
    while True:
        try:
            yield stream.read_next_batch()
        except StopIteration:
            return


def _tell_what_is_there(path: Path) -> str:
    """Return why a directory is no run, and which runs lie in it: a sweep's, or a demo's."""
    if not path.exists():
        return f"no such directory; {_READ_FIRST}"
    runs = sorted(found.parent for found in path.glob(f"*/{RUN_FILE}"))
    if not runs:
        return f"it has no {RUN_FILE}; {_READ_FIRST}"
    if len(runs) == 1:
        return f"it holds a run; give {runs[0]}"
    return f"it holds {len(runs)} runs; give one of them, such as {runs[-1]}"


def open_run(path: str | Path) -> StoredRun:
    """Open the run in ``path``.

    Raises:
        RunFormatError: There is no run there, it was written by another schema version, or its
            files are damaged.
    """
    path = Path(path)
    try:
        info = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        version = info["schema_version"]
        Status(info["status"] if version == SCHEMA_VERSION else Status.RECORDING)
    except FileNotFoundError:
        raise RunFormatError(f"no run at {path}: {_tell_what_is_there(path)}") from None
    except NotADirectoryError:
        raise RunFormatError(f"no run at {path}: it is a file; {_READ_FIRST}") from None
    except OSError as error:
        raise RunFormatError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunFormatError(
            f"no run at {path}: its {RUN_FILE} is damaged or not attnprof's; {_READ_FIRST}"
        ) from None
    if version != SCHEMA_VERSION:
        raise RunFormatError(
            f"cannot read {path}: it has schema version {version!r}, this attnprof reads "
            f"{SCHEMA_VERSION}; read it with the attnprof that wrote it ({_name_writer(info)})"
        )
    if (fault := find_fault(info)) is not None:
        raise RunFormatError(
            f"no run at {path}: its {RUN_FILE} is damaged or not attnprof's: {fault}; copy it "
            "again, or record the run anew"
        )
    # Others may have ended, by a full disk say, in their first commit.
    is_whole = info["status"] == Status.COMPLETED and "recording_stopped" not in info
    good, lost = _last_whole_commit(path, is_whole=is_whole)
    return StoredRun(path=path, info=info, good_bytes=good, lost=lost)


def _name_writer(info: dict[str, Any]) -> str:
    environment = info.get("environment")
    known = environment.get("attnprof") if isinstance(environment, dict) else None
    return f"attnprof {known}" if known else "its version is not recorded"


def _last_whole_commit(path: Path, *, is_whole: bool) -> tuple[dict[str, int], bool]:
    """Return the byte counts of the newest journal line that the files on disk can honour.

    Args:
        path: The run.
        is_whole: Whether a line is missing if there are rows and none vouches for them.

    Returns:
        Bytes per table, and whether something is lost.
    """
    try:
        lines = (path / JOURNAL_FILE).read_bytes().split(b"\n")[:-1]
        # After the journal, so that a table which grows meanwhile is long enough.
        tables: list[Path] = []
        with suppress(FileNotFoundError):
            tables += (path / TABLES_DIR).iterdir()  # unlike glob, it says if it may not look
        sizes = {file.stem: file.stat().st_size for file in tables if file.suffix == ".arrows"}
    except OSError as error:
        why = "ask its owner" if isinstance(error, PermissionError) else "the run is damaged"
        raise RunFormatError(
            f"cannot read {error.filename or path}: {error.strerror or error}; {why}"
        ) from None
    lost = False
    for line in reversed(lines):
        try:
            good: dict[str, int] = json.loads(line)["bytes"]
            whole = all(0 <= size <= sizes.get(name, 0) for name, size in good.items())
            whole = whole and all(type(size) is int for size in good.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if whole:
            return good, lost
        lost = True
    if lost:
        raise RunFormatError(
            f"cannot read {path}: its tables are shorter than its journal says (truncated or "
            "partly copied); copy the whole directory again or record the run anew"
        )
    return {}, is_whole and any(sizes.values())
