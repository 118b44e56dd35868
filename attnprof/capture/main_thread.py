"""Signal handlers and dispatch modes: what only the main thread can undo, whoever ends a trace."""

import ctypes
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attnprof.capture.threads import ThreadModes

_waiting: deque[Callable[[], object]] = deque()


def _work_off(_: int | None) -> int:
    while _waiting:
        _waiting.popleft()()
    return 0


# Kept here: the interpreter calls it after the call that asked for it has returned.
_FOR_INTERPRETER = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(_work_off)


def do_in_main_thread(work: Callable[[], object]) -> None:
    """Call ``work``: at once in the main thread, else have that one do it between two instructions.

    Signal handlers and dispatch modes cannot be changed from elsewhere. Nobody waits for the main
    thread, which may itself be waiting for this one to end.
    """
    if threading.current_thread() is threading.main_thread():
        work()
        return
    _waiting.append(work)
    ctypes.pythonapi.Py_AddPendingCall(_FOR_INTERPRETER, None)


def leave_when_on_top(modes: ThreadModes) -> None:
    """Leave this thread's mode of a trace that has ended, now or as soon as no op is inside it.

    While an op is on its way through a mode, torch has that one off the stack and puts it back
    afterwards. Under a profiler of the program's own the mode stays then; it only passes ops on.
    """
    mode = modes.find()
    if mode is None:
        return

    def look(*_: object) -> None:
        if _get_current_dispatch_mode_stack()[-1:] == [mode]:
            if sys.getprofile() is look:
                sys.setprofile(None)
            modes.leave()

    if sys.getprofile() is None:
        sys.setprofile(look)  # it is called from here on, whenever a function is called or returns
    else:
        look()


@contextmanager
def ending_on_sigterm(end: Callable[[], None]) -> Iterator[None]:
    """Call ``end`` when SIGTERM would end the process, which still dies of it."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield  # a program's own handler raises or exits, and the end of 'with' sees that
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            end()
        finally:
            os.kill(os.getpid(), number)

    def restore() -> None:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        do_in_main_thread(restore)
