"""A dry run in a process of its own, while this process is busy with another."""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnprof.cli.target import Target, load_without_collecting

if TYPE_CHECKING:
    from attnprof.run import Run


@contextmanager
def dry_running_aside(
    target: Target, seq_len: int, *, device: str, directory: Path
) -> Iterator[Callable[[], "Run"]]:
    """Start a dry run elsewhere, and yield a function that waits for it and returns it.

    What the workload prints there is dropped: the user sees it once, from this process. The other
    process is ended with the ``with`` block. It is a fork of this one where that is possible:
    importing what the workload needs a second time takes longer than to run it dry.

    Args:
        target: The workload, loaded.
        seq_len: Its length.
        device: What `dry_run` answers for.
        directory: Where the run goes.

    Yields:
        A function that raises RuntimeError, with the reason in one line, if there is no run.
    """
    from attnprof.capture.forks import can_fork

    context: Any = multiprocessing.get_context("fork" if can_fork() else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, target, seq_len, device, directory)
    process = context.Process(target=_dry_run, args=arguments, daemon=True)
    with warnings.catch_warnings():  # of threads that a library has; `can_fork` says which matter
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()  # the child has its own; this one would keep the pipe open if the child dies

    def wait() -> "Run":
        from attnprof.run import load

        try:
            reason = receiver.recv_bytes().decode()
        except EOFError:
            process.join()
            reason = f"its process ended with exit code {process.exitcode}"
        if reason:
            raise RuntimeError(f"no dry run at n = {seq_len}: {reason}")
        return load(directory)

    try:
        with receiver:
            yield wait
    finally:
        process.kill()
        process.join()
        process.close()


def _dry_run(
    sender: Connection, target: Target, seq_len: int, device: str, directory: Path
) -> None:
    """Make the dry run, in the other process, and say why if that is not possible."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    reason = ""
    try:
        load_without_collecting(target)
        from attnprof.capture.dry_run import dry_run
        from attnprof.capture.forks import enter_child

        enter_child()
        dry_run(target, seq_len, target=device, directory=directory)
    except KeyboardInterrupt:  # so was the process that waits
        sys.exit(1)
    except BaseException as error:
        text = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    sender.send_bytes(reason.encode())
