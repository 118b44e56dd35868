"""Record a workload in a process of its own, so that whatever ends it ends nothing else."""

import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from attnprof.capture.endings import status_of, text_of
from attnprof.capture.workload import MakeStep, name_of, record_workload
from attnprof.vocabulary import Status

_ENDING_SECONDS = 60.0
"""What a workload's threads are given to end, once it is recorded."""


def record_isolated(
    make_step: MakeStep, seq_len: int, *, device: str, directory: Path, steps: int | None
) -> tuple[Status, str]:
    """Record a workload in a fresh process; arguments as for `record_workload`.

    Returns:
        How it ended, and why if it is not completed. A process that the kernel killed has run out
        of memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, make_step, seq_len, device, directory, steps)
    process = context.Process(target=_record, args=arguments, name=f"attnprof-{seq_len}")
    # A process that is interrupted while it starts shows how far it got in importing things.
    resource_tracker.ensure_running()  # when it starts, it lets interrupts through
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process.start()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        sender.close()  # the child's own is open; this one would keep the pipe open if it dies
        with receiver, suppress(EOFError):
            status, reason = json.loads(receiver.recv_bytes())
            process.join(_ENDING_SECONDS)
            return Status(status), reason
        process.join()
        return _explain_end(process.exitcode or 0)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


def check_importable(make_step: MakeStep) -> None:
    """Raise if another process could not be told which function is meant.

    Raises:
        TypeError: It is a lambda, is defined inside a function, or was typed into a prompt.
    """
    try:
        ForkingPickler.dumps(make_step)
        main = sys.modules["__main__"]
        is_typed = (
            getattr(inspect.unwrap(make_step), "__module__", None) == "__main__"
            and getattr(main, "__file__", None) is None
            and getattr(main, "__spec__", None) is None
        )
        problem = "it was defined at a prompt, not in a file" if is_typed else ""
    except Exception as error:  # pickling runs the object's own code, which may raise anything
        problem = str(error)
    if problem:
        raise TypeError(
            f"{name_of(make_step)} cannot be run in a process of its own: {problem}. Define it at "
            "the top level of a file, or use isolate=False"
        )


def _record(
    sender: Connection,
    make_step: MakeStep,
    seq_len: int,
    device: str,
    directory: Path,
    steps: int | None,
) -> None:
    """Record the workload, in the child, and say how it ended."""
    _volunteer_for_the_kernel()
    _end_with_parent()
    status, reason = Status.COMPLETED, ""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        record_workload(make_step, seq_len, device=device, directory=directory, steps=steps)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # the parent has been interrupted too
    except BaseException as error:
        status, reason = status_of(error), describe_error(error)
    sender.send_bytes(json.dumps([status.value, reason]).encode())


def describe_error(error: BaseException) -> str:
    """Return an exception as one line."""
    text = " ".join(text_of(error).split())
    return f"{type(error).__qualname__}: {text}" if text else type(error).__qualname__


def _volunteer_for_the_kernel() -> None:
    """Ask Linux, when memory runs out, to end this process and not its parent."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _end_with_parent() -> None:
    """Let this process end when the one that sweeps has, however it did: nobody else ends it."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="attnprof-parent", daemon=True).start()


def _explain_end(code: int) -> tuple[Status, str]:
    """Return what an exit code says of a process that could not say it itself."""
    if code == -signal.SIGKILL:
        return Status.OUT_OF_MEMORY, "killed by SIGKILL, as the kernel does when memory runs out"
    if code < 0:
        return Status.FAILED, f"its process was ended by a signal: {signal.strsignal(-code)}"
    return Status.FAILED, (
        f"its process ended with exit code {code} before the workload could be recorded; what it "
        "wrote to stderr says why. A script that sweeps itself must do so under "
        "'if __name__ == \"__main__\":'"
    )
