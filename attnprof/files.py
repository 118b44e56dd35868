"""Write a file whole or not at all."""

import os
import secrets
from pathlib import Path

from attnprof.errors import CommandError


def replace_file(path: Path, content: str | bytes, *, keep_out_of: Path | None = None) -> None:
    """Write ``content`` to ``path``, replacing a file that is there in one move.

    Args:
        path: A file, new or not; a link is followed. A pipe or a device is written to.
        content: Bytes, or text that is written as UTF-8.
        keep_out_of: A run; its own files are not replaced, nor are others put into it.

    Raises:
        CommandError: The path is a directory, one of the run's files, or cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    target = _follow(path)
    if target.is_dir():
        raise CommandError(f"cannot write {path}: it is a directory; give the name of a file, too")
    is_inside = keep_out_of is not None and target.is_relative_to(keep_out_of.resolve())
    if is_inside and not _is_page(target):
        raise CommandError(f"cannot write {path}: that is inside of the run; give another file")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            _replace(target, data)
    except BrokenPipeError:  # its reader has seen enough, which is no fault of the path
        raise
    except OSError as error:
        raise CommandError(
            f"cannot write {path}: {error.strerror or error}; give a file in a directory that "
            "exists and that you may write to"
        ) from None


def check_can_write(path: Path) -> None:
    """Raise if a file cannot be written, before what it is about costs anything.

    Raises:
        CommandError: The path is a directory, or lies in none that can be written to.
    """
    target = _follow(path)
    why = ""
    if target.is_dir():
        why = "it is a directory"
    elif not target.parent.is_dir():
        why = "there is no such directory"
    elif not os.access(target if target.exists() else target.parent, os.W_OK):
        why = "permission denied"
    if why:
        raise CommandError(
            f"cannot write {path}: {why}; give a file in a directory that exists and that you may "
            "write to"
        )


def _follow(path: Path) -> Path:
    """Return what a path leads to; an open pipe, such as /dev/stdout, has no other path."""
    target = path.resolve()
    return path if path.exists() and not target.exists() else target


def _is_page(path: Path) -> bool:
    return path.suffix.lower() in (".html", ".htm")


def _replace(target: Path, data: bytes) -> None:
    # As readable as what is there; a new file as the process has its files, which the kernel knows.
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    number = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode)
    try:
        with open(number, "wb") as file:
            if mode is not None:
                os.fchmod(number, mode)
            file.write(data)
        new.replace(target)
    except BaseException:
        new.unlink()
        raise
