"""Load a pickle of plain data, whoever made it: containers, text, numbers, and nothing else.

What is guarded, and by what:

- *Code.* No opcode that imports or calls anything passes `check_opcodes`, and the unpickler below
  finds no class and no persistent object even if one did.
- *Memory.* Declared lengths must lie in the file, integers have 64 bits, and what all objects take
  together, with the unpickler's stack and memo, is estimated before the first is made.
- *Compression.* What a gzipped file unpacks to is limited by the size it has packed.
- *The interpreter's stack.* Tuples, whose hashes are computed by recursion, hold numbers only.

Not guarded: the time that a large file takes, which grows with its size, and keys of dicts that are
made to collide.
"""

import gc
import gzip
import pickle
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import psutil

from attnprof.errors import SnapshotError
from attnprof.interop.opcodes import check_opcodes
from attnprof.units import format_bytes

_GZIP_MAGIC = b"\x1f\x8b"
_MOST_UNPACKED_TIMES = 100
"""How many times its packed size a file may unpack to; snapshots come to 5 to 30 times."""
_LEAST_UNPACKED_BYTES = 1 << 24
"""Small files may unpack to this whatever their packed size."""
_CHUNK_BYTES = 1 << 20


def load_plain(path: Path) -> Any:
    """Return what the pickle in ``path``, gzipped or not, holds.

    Raises:
        SnapshotError: The file is no pickle, is damaged, holds anything but plain data, or needs
            more memory than there is.
        OSError: The file cannot be read.
    """
    with _open_unpacked(path) as file:
        if not file.seek(0, 2):
            raise SnapshotError(f"cannot read {path}: the file is empty; copy or dump it again")
        needed = check_opcodes(np.memmap(file, np.uint8, "r"), str(path))
        available = psutil.virtual_memory().available
        if needed > available:
            raise SnapshotError(
                f"cannot read {path}: its objects need about {format_bytes(needed)} of memory, and "
                f"{format_bytes(available)} are available; record fewer events (max_entries) or "
                "read it on a larger machine"
            )
        file.seek(0)
        return _load(file, path)


def _load(file: IO[bytes], path: Path) -> Any:
    try:
        return _PlainUnpickler(file).load()
    except SnapshotError:
        raise
    except MemoryError:
        raise SnapshotError(
            f"cannot read {path}: it needs more memory than there is; record fewer events "
            "(max_entries)"
        ) from None
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        what = str(error) or type(error).__name__
        raise SnapshotError(
            f"cannot read {path}: the pickle is damaged ({what}); copy or dump it again"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    """Makes containers, text and numbers, and refuses to look up anything by name."""

    def find_class(self, module: str, name: str, /) -> NoReturn:
        """Refuse a class or function."""
        raise SnapshotError(f"the pickle asks for {module}.{name}; a snapshot needs no code")

    def persistent_load(self, key: object, /) -> NoReturn:
        """Refuse an object from elsewhere."""
        raise SnapshotError(f"the pickle refers to an object outside of it ({key!r})")


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Make no attempts to find garbage among millions of new objects, all of which are in use."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    if path.is_dir():
        raise SnapshotError(
            f"cannot read {path}: it is a directory; give a file that "
            "torch.cuda.memory._dump_snapshot() wrote"
        )
    with path.open("rb") as file:
        is_packed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        if not is_packed:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            _unpack(file, unpacked, path)
            yield unpacked


def _unpack(packed: IO[bytes], unpacked: IO[bytes], path: Path) -> None:
    size = packed.seek(0, 2)
    packed.seek(0)
    limit = max(_MOST_UNPACKED_TIMES * size, _LEAST_UNPACKED_BYTES)
    try:
        with gzip.GzipFile(fileobj=packed) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                unpacked.write(chunk)
                if unpacked.tell() > limit:
                    raise SnapshotError(
                        f"{path} is refused: it unpacks to more than {_MOST_UNPACKED_TIMES} times "
                        f"its {format_bytes(size)}, which no snapshot does"
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SnapshotError(
            f"cannot read {path}: it is not whole gzip data ({error}); copy or dump it again"
        ) from None
    unpacked.flush()
