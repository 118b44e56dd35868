"""Write a run directory so that a kill at any instant leaves a readable one."""

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from attnprof.errors import CaptureError
from attnprof.store.schema import JOURNAL_FILE, RUN_FILE, SCHEMA_VERSION, TABLES, TABLES_DIR
from attnprof.vocabulary import Status

_BUFFER_BYTES = 1 << 20
"""More than the commit of a step holds, so that it reaches the file in one write."""


def claim_directory(path: Path) -> None:
    """Create ``path`` for a new run, or take it if it is an empty directory.

    Raises:
        CaptureError: The path is a file, holds something already, or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = next(path.iterdir(), None)
    except (FileExistsError, NotADirectoryError):
        raise CaptureError(
            f"cannot record into {path}: it, or a part of it, is a file; give a new directory"
        ) from None
    except OSError as error:
        raise CaptureError(
            f"cannot record into {path}: {error.strerror or error}; give a directory you may write"
        ) from None
    except ValueError as error:  # a character that no path can have
        raise CaptureError(
            f"cannot record into {str(path)!r}: {error}; give a directory by a name without it"
        ) from None
    if occupied is not None:
        raise CaptureError(
            f"cannot record into {path}: it is not empty (it holds {occupied.name!r}) and nothing "
            "is overwritten; give a new directory or remove this one"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise CaptureError(f"cannot record into {path}: no permission to write there")


class RunWriter:
    """An open run directory.

    Each `commit` appends one record batch to every table that has rows and then one line to the
    journal. A reader believes only what a whole journal line covers, so a process killed in the
    middle of a commit loses that commit and nothing else.
    """

    def __init__(self, path: Path, info: Mapping[str, Any]) -> None:
        """Start a run in ``path``.

        Args:
            path: A directory as left by `claim_directory`.
            info: What run.json says besides schema, status and times: environment, settings, …

        Raises:
            CaptureError: The directory cannot be written.
        """
        self.path = path
        self._info: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "status": Status.RECORDING.value,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **info,
        }
        self._files: dict[str, BinaryIO] = {}
        self._streams: dict[str, pa.RecordBatchStreamWriter] = {}
        self._commits = 0
        self._is_writing = False
        self._is_closed = False
        try:
            (path / TABLES_DIR).mkdir()
            self._journal = (path / JOURNAL_FILE).open("ab", buffering=0)
            self._write_info()
        except OSError as error:
            raise CaptureError(
                f"cannot record into {path}: {error.strerror or error}; give a directory you may "
                "write, on a disk with room"
            ) from None

    def commit(self, columns: Mapping[str, Mapping[str, Any]]) -> None:
        """Append rows to tables and make them part of the run.

        Args:
            columns: Per table name, its columns (arrays or sequences of equal length).

        Raises:
            OSError: The disk is full or gone. Further commits would not be readable.
        """
        if self._is_closed:
            return
        self._is_writing = True
        for name, table in columns.items():
            schema = TABLES[name]
            arrays = [_to_array(table[field.name], field.type) for field in schema]
            if len(arrays[0]):
                self._stream(name).write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        for file in self._files.values():
            file.flush()
        good = {name: file.tell() for name, file in self._files.items()}
        self._commits += 1
        line = json.dumps({"commit": self._commits, "bytes": good}, separators=(",", ":"))
        if self._journal.write(line.encode() + b"\n") <= len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / JOURNAL_FILE))
        self._is_writing = False

    def close(self, status: Status, **more: Any) -> None:
        """End the run with its status; further items go into run.json.

        Raises:
            OSError: The disk is full or gone; the tables are readable all the same.
        """
        if self._is_closed:
            return
        self._is_closed = True
        # A stream that a cut-off commit left in mid-batch gets no end mark. Readers need none:
        # what counts is what the journal vouches for, and that is on disk already.
        with suppress(OSError):
            for stream in () if self._is_writing else self._streams.values():
                stream.close()
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._journal.close()
        self._info.update(
            status=status.value, ended=datetime.now(UTC).isoformat(timespec="seconds"), **more
        )
        self._write_info()

    def abandon(self) -> None:
        """Write nothing any more, not even what is still buffered: for a forked child.

        The child has the same open files as its parent, down to the position in them.
        """
        self._is_closed = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for file in (*self._files.values(), self._journal):
            if not file.closed:
                os.dup2(nowhere, file.fileno())
                file.close()
        os.close(nowhere)

    def _stream(self, name: str) -> pa.RecordBatchStreamWriter:
        stream = self._streams.get(name)
        if stream is None:
            file = (self.path / TABLES_DIR / f"{name}.arrows").open("wb", buffering=_BUFFER_BYTES)
            stream = pa.ipc.new_stream(file, TABLES[name])
            self._files[name], self._streams[name] = file, stream
        return stream

    def _write_info(self) -> None:
        # Replaced in one move: a reader sees the old file or the new one, never half of one.
        data = json.dumps(self._info, indent=1).encode() + b"\n"
        new = self.path / (RUN_FILE + ".new")
        try:
            new.write_bytes(data)
            new.replace(self.path / RUN_FILE)
        except OSError:
            with suppress(OSError):
                new.unlink()
            if not _overwrite(self.path / RUN_FILE, data):
                raise


def _overwrite(path: Path, data: bytes) -> bool:
    """Put data into the blocks that a file has, which a full disk cannot refuse; return if it fits.

    Block by block: a file of one is written at once.
    """
    try:
        if len(data) > 512 * path.stat().st_blocks:
            return False
        with path.open("r+b", buffering=0) as file:
            file.write(data)
            file.truncate(len(data))
    except OSError:
        return False
    return True


def _to_array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray) and pa.types.is_primitive(kind):
        # By name, which numpy shares; asking for the dtype takes pandas before pyarrow 26. Arrow's
        # own cast, which checks, is slow.
        values = values.astype(str(kind), copy=False)
    return pa.array(values, type=kind)
