"""`trace`: everything that watches a program, owned by one ExitStack."""

import math
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from attnprof.capture.cuda import AllocatorHistory
from attnprof.capture.detail import DetailSwitch
from attnprof.capture.devices import describe_environment, describe_gpus, sampling
from attnprof.capture.dynamo import leave_alone
from attnprof.capture.endings import status_of, text_of, without_own_frames
from attnprof.capture.ledger import Ledger, watching_resizes
from attnprof.capture.main_thread import (
    do_in_main_thread,
    ending_on_sigterm,
    leave_when_on_top,
)
from attnprof.capture.modules import ModuleNames, ModuleWatch
from attnprof.capture.optimizers import OptimizerWatch
from attnprof.capture.recorder import Recorder
from attnprof.capture.threads import ThreadModes, watch_backward
from attnprof.errors import CaptureError
from attnprof.store.process import describe_process
from attnprof.store.schema import STEP
from attnprof.store.writer import RunWriter, claim_directory
from attnprof.vocabulary import Detail, Status

if TYPE_CHECKING:
    from attnprof.capture.fake_twins import Twins
    from attnprof.run import Run

_active: "Tracer | None" = None
_active_lock = threading.Lock()


class Tracer:
    """A trace: use it as ``with attnprof.trace() as tracer:``, then read `run`.

    Results, gradients, random state and the peak of the traced program stay as they are, but for
    the peak of a few backward formulas that `attnprof.capture.imitate` names; and nothing of the
    tracer remains on it after the ``with`` block, however that ends.

    Known limitations:
        A fused kernel or a compiled region is one op: what it takes inside itself is seen by the
        CUDA allocator's history only, not on the CPU.
        Work done by other threads outside of a module call or backward pass is not seen.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        samples_per_second: float = 10.0,
        detail: str = "auto",
        info: dict[str, Any] | None = None,
        twins: "Twins | None" = None,
        command: str | None = None,
    ) -> None:
        """Prepare a trace; nothing happens before ``with``.

        Args:
            directory: Where to write the run: a new or empty directory. Without it the run is
                kept in a temporary one, for as long as this tracer or its run is in use.
            samples_per_second: How often host and GPU totals are sampled; 0 for never.
            detail: ``"auto"`` or ``"full"``; see `trace`.
            info: What run.json says besides; read when the trace begins and again when it ends.
            twins: In a dry run, the fakes that stand for real tensors.
            command: The command that traces, where the program itself does not.

        Raises:
            TypeError: ``directory`` is not a path.
            ValueError: ``samples_per_second`` is negative or not a number; ``detail`` is unknown.
        """
        if directory is not None and not isinstance(directory, str | os.PathLike):
            raise TypeError(
                f"attnprof.trace() takes the directory to write to, got {type(directory).__name__};"
                " use it as 'with attnprof.trace(\"runs/name\"):'"
            )
        if not isinstance(samples_per_second, int | float):
            raise TypeError(
                f"samples_per_second must be a number, got {type(samples_per_second).__name__}"
            )
        if not 0 <= samples_per_second < math.inf:
            raise ValueError(
                f"samples_per_second must be 0 or more and finite, got {samples_per_second!r}"
            )
        if detail not in list(Detail):
            raise ValueError(f"detail must be one of {', '.join(Detail)}, got {detail!r}")
        self._directory = None if directory is None else Path(directory)
        self._samples_per_second = samples_per_second
        self._is_adaptive = detail == Detail.AUTO
        self._info = {} if info is None else info
        self._twins = twins
        self._command = command
        self._stack = ExitStack()
        self._recorder: Recorder | None = None
        self._ledger: Ledger | None = None
        self._names: ModuleNames | None = None
        self._history: AllocatorHistory | None = None
        self._detail: DetailSwitch | None = None
        self._optimizers: OptimizerWatch | None = None
        self._writer: RunWriter | None = None
        self._modes: ThreadModes | None = None
        self._thread: threading.Thread | None = None
        self._process = -1

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Say what to do instead of decorating a function: a trace is one run."""
        raise TypeError(
            "attnprof.trace() is no decorator, as a trace is of one run; write 'with "
            'attnprof.trace("runs/name"):\' inside of the function'
        )

    @property
    def run(self) -> "Run":
        """The run as recorded so far; complete once the ``with`` block has ended.

        Raises:
            CaptureError: Tracing has not begun.
        """
        from attnprof.run import Run

        if self._directory is None or self._recorder is None:
            raise CaptureError("this trace has not begun: read tracer.run inside or after 'with'")
        if _active is self:
            self._recorder.commit()
        return Run.load(self._directory, keep_alive=self)

    @property
    def ledger(self) -> Ledger:
        """The storages that are live now.

        Raises:
            CaptureError: Tracing has not begun.
        """
        if self._ledger is None:
            raise CaptureError("this trace has not begun: ask inside or after 'with'")
        return self._ledger

    @property
    def is_recording(self) -> bool:
        """Whether ops are recorded now; not while the steps of a long loop are only counted."""
        return _active is self and self._detail is not None and self._detail.is_on

    @leave_alone
    def step(self) -> None:
        """Mark the end of a step. Loops whose steps attnprof finds itself need no mark.

        Raises:
            CaptureError: The trace is not running.
        """
        if _active is not self or self._recorder is None or self._detail is None:
            raise CaptureError("tracer.step() was called outside of the 'with' block of its trace")
        if self._detail.is_on:
            self._recorder.mark(STEP)
            self._recorder.commit()
        self._detail.note_mark()

    @leave_alone
    def __enter__(self) -> Self:
        """Begin tracing."""
        global _active
        with _active_lock:
            if _active is not None:
                raise CaptureError(_active._say_it_runs())
            if self._recorder is not None:
                raise CaptureError("this trace has ended; make a new one with attnprof.trace()")
            _active = self
        try:
            self._begin()
        except BaseException:
            _active = None
            self._stack.close()
            if self._writer is not None:
                self._writer.close(Status.FAILED)
            raise
        return self

    def _say_it_runs(self) -> str:
        where = f", into {self._directory}" if self._directory is not None else ""
        if self._command is not None:
            return (
                f"{self._command} records this program already{where}; traces do not nest: run "
                "the program with python, or without a trace of its own"
            )
        return (
            f"a trace is already running in this process{where}; traces do not nest: end that one "
            "first, or mark its parts with tracer.step()"
        )

    def _begin(self) -> None:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="attnprof-"))
            weakref.finalize(self, _remove_directory, self._directory, os.getpid())
        else:
            self._directory = self._directory.absolute()
            claim_directory(self._directory)
        info = {
            "environment": describe_environment(),
            "writer": describe_process(),
            **self._info,
        }
        self._process = os.getpid()
        self._thread = threading.current_thread()
        self._writer = RunWriter(self._directory, info)
        self._recorder = recorder = Recorder(self._writer)
        self._ledger = ledger = Ledger(recorder, twins=self._twins)
        self._names = names = ModuleNames(recorder, ledger)
        self._modes = modes = ThreadModes(recorder, ledger)
        if self._twins is None:  # else nothing is allocated where it is counted
            self._history = AllocatorHistory(recorder, modes.tag_ops)
        self._detail = detail = DetailSwitch(
            recorder, modes, self._history if self._is_adaptive else None
        )
        enter = self._stack.enter_context
        self._stack.callback(ledger.close)
        enter(sampling(recorder, per_second=self._samples_per_second))
        enter(ending_on_sigterm(lambda: self._end(Status.INTERRUPTED)))
        if self._history is not None:
            enter(self._history.recording())
        enter(ModuleWatch(modes, names, recorder, detail).watching())
        self._optimizers = OptimizerWatch(names, ledger, recorder, detail)
        enter(self._optimizers.watching())
        enter(watching_resizes(ledger))
        enter(watch_backward(modes, recorder, lambda: detail.is_on))
        enter(modes.covering())

    @leave_alone
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End tracing; the program's exception, if there is one, passes on as it was raised.

        Raises:
            CaptureError: This is not the thread that began the trace. It has ended all the same.
        """
        if error is not None:
            error.__traceback__ = without_own_frames(error.__traceback__)
        if _active is self and self._thread is not threading.current_thread():
            self._end_elsewhere(error)
        else:
            self._end(status_of(error), error)

    def _end_elsewhere(self, error: BaseException | None) -> None:
        assert self._modes is not None
        assert self._thread is not None
        problem = CaptureError(
            f"a trace must end in the thread that began it, {self._thread.name}, and this is "
            f"{threading.current_thread().name}; it has ended now, and what was recorded is in "
            f"{self._directory}"
        )
        shown = problem if error is None or isinstance(error, GeneratorExit) else error
        self._end(status_of(shown), shown)
        do_in_main_thread(partial(leave_when_on_top, self._modes))
        if shown is problem:
            raise problem from None

    def _end(self, status: Status, error: BaseException | None = None) -> None:
        global _active
        assert self._recorder is not None
        assert self._writer is not None
        if self._process != os.getpid() or _active is not self:
            return  # a child forked inside the 'with' block leaves it, or it has ended before
        try:
            with suppress(Exception):  # of a model half-way through something
                assert self._names is not None
                assert self._detail is not None
                assert self._optimizers is not None
                self._names.identify_late()
                self._optimizers.identify_late()
                self._detail.finish()
            self._recorder.commit()
        finally:
            try:
                self._stack.close()
            finally:
                _active = None
                # Only now: what GPUs there are may not be asked before the program uses them.
                environment = {**describe_environment(), **describe_gpus()}
                more: dict[str, Any] = {**self._info, "environment": environment}
                if self._history is not None and self._history.info:
                    more["allocator"] = self._history.info
                if error is not None:
                    more["error"] = {"type": type(error).__qualname__, "message": text_of(error)}
                if self._recorder.stopped_by is not None:
                    more["recording_stopped"] = self._recorder.stopped_by
                self._close_writer(status, more)

    def _close_writer(self, status: Status, more: dict[str, Any]) -> None:
        assert self._writer is not None
        try:
            self._writer.close(status, **more)
        except OSError as error:
            # Not raised: it would take the place of the program's own exception.
            warnings.warn(
                f"attnprof could not note that the run in {self._writer.path} has ended: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _abandon(self) -> None:
        """Take everything off a forked child: it is not traced, and the run is its parent's."""
        global _active
        _active = None
        if self._writer is not None:
            self._writer.abandon()
        with suppress(Exception):  # a thread or device that the child does not have
            self._stack.close()


def trace(
    directory: str | Path | None = None,
    *,
    samples_per_second: float = 10.0,
    detail: str = "auto",
) -> Tracer:
    """Record the memory of everything torch does inside ``with attnprof.trace() as tracer:``.

    Args:
        directory: Where to write the run: a new or empty directory. Without it the run is kept
            in a temporary one, for as long as the tracer or its run is in use.
        samples_per_second: How often host and GPU totals are sampled; 0 for never.
        detail: ``"full"`` records every step. ``"auto"`` does so too, but for long training loops
            on CUDA: there it records the first steps, and then only reads what the allocator
            counts, until a step needs at least 1 % more than those recorded.

    Returns:
        A `Tracer`; its ``run`` holds the answers.

    Raises:
        CaptureError: On ``with``: another trace is running, or the directory is not empty or
            cannot be written.
    """
    return Tracer(directory, samples_per_second=samples_per_second, detail=detail)


_held: Recorder | None = None
"""Whose lock is held by the thread that forks the process."""


def _hold_commits() -> None:
    """Wait for another thread's commit to end: in the child its locks would never be released."""
    global _held
    recorder = None if _active is None else _active._recorder
    if recorder is not None:
        recorder.lock.acquire()
        _held = recorder


def _release_commits() -> None:
    global _held
    recorder, _held = _held, None
    if recorder is not None:
        recorder.lock.release()


def _abandon_in_child() -> None:
    _release_commits()
    if _active is not None:
        _active._abandon()


os.register_at_fork(
    before=_hold_commits, after_in_parent=_release_commits, after_in_child=_abandon_in_child
)


def _remove_directory(directory: Path, owner: int) -> None:
    """Remove a temporary run, if this is the process that made it and not a forked child."""
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
