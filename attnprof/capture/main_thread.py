"""What only the main thread can undo, where another one ends a trace."""

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attnprof.capture.threads import ThreadModes

_waiting: deque[Callable[[], object]] = deque()


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
def _work_off(_: int | None) -> int:
    while _waiting:
        _waiting.popleft()()
    return 0


def do_in_main_thread(work: Callable[[], object]) -> None:
    """Call ``work``: at once in the main thread, else have that one do it between two instructions.

    Signal handlers and dispatch modes cannot be changed from elsewhere. Nobody waits for the main
    thread, which may itself be waiting for this one to end.
    """
    if threading.current_thread() is threading.main_thread():
        work()
        return
    _waiting.append(work)
    ctypes.pythonapi.Py_AddPendingCall(_work_off, None)


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
