"""One dispatch mode per thread that does work, and none left behind."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attnprof.capture.imitate import InPlaceForms
from attnprof.capture.ledger import Ledger
from attnprof.capture.ops import Operators, OpMode
from attnprof.capture.recorder import Recorder
from attnprof.capture.replacements import replacing
from attnprof.store.schema import BACKWARD_BEGIN, BACKWARD_END


class ThreadModes:
    """The modes of one trace.

    The thread that opens the trace keeps its mode until the trace closes. Any other thread enters
    one for as long as it is inside a module call or a backward pass. Autograd's own threads
    inherit the mode of the thread that called backward.
    """

    def __init__(self, recorder: Recorder, ledger: Ledger) -> None:
        """Make modes that record into ``recorder``."""
        self._set_tag: Callable[[str], None] | None = None
        self._get_tag: Callable[[], str] | None = None
        self._recorder = recorder
        self._ledger = ledger
        self._operators = Operators(recorder)
        self._in_place_forms = InPlaceForms()
        self._local = threading.local()
        self._numbers = count()
        self._modes: weakref.WeakSet[OpMode] = weakref.WeakSet()
        """Those of threads that still run: a thread holds its own, and takes it along."""
        self._below: list[Any] = []
        """The dispatch modes below the one that was left for a while."""
        self._lock = threading.RLock()

    def tag_ops(self, set_tag: Callable[[str], None], get_tag: Callable[[], str] | None) -> None:
        """Have every mode tag what the CUDA allocator does with the op that runs.

        Args:
            set_tag: Sets the tag of the calling thread.
            get_tag: Returns it, where the program may have set one; it is put back after each op.
        """
        with self._lock:
            self._set_tag, self._get_tag = set_tag, get_tag
            for mode in self._modes:
                mode.set_tag, mode.get_tag = set_tag, get_tag

    def find(self) -> OpMode | None:
        """Return the mode that sees this thread's ops, if there is one."""
        mode: OpMode | None = getattr(self._local, "mode", None)
        if mode is not None:
            return mode
        for entered in _get_current_dispatch_mode_stack():
            if isinstance(entered, OpMode) and entered.recorder is self._recorder:
                return entered
        return None

    def enter(self) -> OpMode:
        """Enter a mode in this thread, which must have none."""
        # The same for all the life of a thread: autograd numbers nodes per thread, and a thread
        # that serves requests enters one for each.
        mode: OpMode | None = getattr(self._local, "own", None)
        if mode is None:
            with self._lock:
                mode = OpMode(
                    self._recorder,
                    self._ledger,
                    next(self._numbers),
                    self._operators,
                    self._in_place_forms,
                )
                mode.set_tag, mode.get_tag = self._set_tag, self._get_tag
                self._modes.add(mode)
            self._local.own = mode
        mode.__enter__()  # type: ignore[no-untyped-call]  # not annotated
        self._local.mode = mode
        return mode

    def pause(self) -> bool:
        """Leave this thread's mode for a while; return whether that was possible.

        It is not while a module call is open in any thread, or the program is in a dispatch mode
        that it entered after this one.
        """
        stack = _get_current_dispatch_mode_stack()
        mode = getattr(self._local, "mode", None)
        with self._lock:
            is_open = any(each.open_scopes for each in self._modes)
        if mode is None or stack[-1:] != [mode] or is_open:
            return False
        self._below = stack[:-1]
        self.leave()
        return True

    def resume(self) -> bool:
        """Enter this thread's mode again; return whether that was possible.

        It is not while the program is in other dispatch modes than when it was left.
        """
        if _get_current_dispatch_mode_stack() != self._below:
            return False
        self.enter()
        return True

    def leave(self) -> None:
        """Leave this thread's mode."""
        mode: OpMode = self._local.mode
        del self._local.mode
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # not annotated

    @contextmanager
    def covering(self) -> Iterator[None]:
        """Have a mode in this thread for the time being, entering one if there is none."""
        if self.find() is not None:
            yield
            return
        self.enter()
        try:
            yield
        finally:
            if getattr(self._local, "mode", None) is not None:  # else it was left for a while
                self.leave()


@contextmanager
def watch_backward(
    modes: ThreadModes, recorder: Recorder, is_recording: Callable[[], bool]
) -> Iterator[None]:
    """Cover every thread that calls backward, and mark when it begins and ends.

    ``Tensor.backward`` looks ``torch.autograd.backward`` up at every call, so replacing the
    module attribute reaches it; no hook exists for this. Code that kept a reference of its own
    to the original is covered in the tracing thread anyway.
    """
    is_watching = True

    def covered(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not (is_watching and is_recording()):
                return original(*args, **kwargs)
            with modes.covering():
                recorder.mark(BACKWARD_BEGIN)
                try:
                    return original(*args, **kwargs)
                finally:
                    recorder.mark(BACKWARD_END)

        return run

    ours = {name: covered(getattr(torch.autograd, name)) for name in ("backward", "grad")}
    try:
        with replacing(torch.autograd, **ours):
            yield
    finally:
        is_watching = False
