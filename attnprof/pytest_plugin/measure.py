"""Run the body of a test under a trace, as often as its markers ask."""

import functools
import gc
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attnprof.errors import CaptureError, DryRunError
from attnprof.pytest_plugin.marks import GROWTH, SEQ_LEN, Checks, Lengths

if TYPE_CHECKING:
    from attnprof.capture.tracer import Tracer
    from attnprof.run import Run

Body = Callable[..., Any]

MEASURED = pytest.StashKey[dict[str, Any]]()
"""What a test measured, to be sent along with its report: values that JSON knows."""

RESERVED_PEAK = "reserved_peak_bytes"
"""In run.json: per CUDA device, the most bytes its allocator reserved while the test ran."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The runs of one test."""

    runs: "tuple[Run, ...]"
    """Of the test's body: one, or one per length, by rising lengths."""
    by_length: "tuple[Run, ...]" = ()
    """What laws of growth are fitted to: the same, or the runs of the marker's ``make_step``."""

    @property
    def every_run(self) -> "tuple[Run, ...]":
        """All of them; the longest length last."""
        return self.runs + tuple(run for run in self.by_length if run not in self.runs)


@contextmanager
def keeping_house() -> Iterator[Path]:
    """Give a directory for the runs of one test, and remove it whatever becomes of the test.

    What still refers to a run, such as the traceback of a failure, is no reason to keep it: a
    process that ``--forked`` made for one test never gets to clean up after itself.
    """
    home, owner = Path(tempfile.mkdtemp(prefix="attnprof-")), os.getpid()
    try:
        yield home
    finally:
        if os.getpid() == owner:  # not a child that the test forked, and which failed
            shutil.rmtree(home, ignore_errors=True)


def _find_room(home: Path) -> Path:
    """Return a new directory for a run."""
    return Path(tempfile.mkdtemp(dir=home))


def watch(body: Body, checks: Checks, home: Path, judge: Callable[[Measured], None]) -> Body:
    """Return a function to run in place of a test's body: it measures the body, then judges.

    An exception of the body passes on as it was raised, and then nothing is judged.

    Args:
        body: The test's function, a coroutine function maybe.
        checks: What the test's markers ask for.
        home: A directory for runs.
        judge: Called with what was measured.
    """
    if inspect.iscoroutinefunction(body):

        @functools.wraps(body)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            runs, result = [], None
            for seq_len in _list_lengths(checks):
                with tracing(home, seq_len) as tracer:
                    result = await body(*args, **_tell_length(kwargs, seq_len))
                runs.append(tracer.run)
            judge(complete(tuple(runs), checks, home))
            return result

        return run_async

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        if checks.lengths is not None and checks.runs_test_by_length and checks.lengths.is_dry:
            dry = _run_dry(body, checks.lengths, home, args, kwargs)
            judge(Measured(dry, dry))
            return None
        runs, result = [], None
        for seq_len in _list_lengths(checks):
            with tracing(home, seq_len) as tracer:
                result = body(*args, **_tell_length(kwargs, seq_len))
            runs.append(tracer.run)
        judge(complete(tuple(runs), checks, home))
        return result

    return run


def complete(runs: "tuple[Run, ...]", checks: Checks, home: Path) -> Measured:
    """Add the runs that laws of growth are fitted to, where a marker says what to run."""
    if checks.lengths is None:
        return Measured(runs)
    if checks.runs_test_by_length:
        return Measured(runs, runs)
    return Measured(runs, _run_workload(checks.lengths, home))


@contextmanager
def tracing(home: Path, seq_len: int | None = None) -> "Iterator[Tracer]":
    """Trace what runs inside; what earlier tests left behind is cleared away before.

    Args:
        home: A directory for runs.
        seq_len: The length that it is run with, if it has one.
    """
    from attnprof.capture.tracer import Tracer

    info: dict[str, Any] = {}
    if seq_len is not None:
        info["workload"] = {"seq_len": seq_len, "source": "measured"}
    tracer = Tracer(_find_room(home), samples_per_second=0, detail="full", info=info)
    _settle()
    with ExitStack() as stack:
        try:
            stack.enter_context(tracer)
        except CaptureError as error:
            pytest.fail(f"the test cannot be measured for its markers: {error}", pytrace=False)
        before = tracer.ledger.mark()
        try:
            yield tracer
        except Exception as error:
            _explain(error, seq_len, "the test")
            raise
        if tracer.ledger.count_bytes(since=before):
            gc.collect()  # what only reference cycles hold is not leaked
        reserved = _read_reserved()
        if reserved:
            info[RESERVED_PEAK] = reserved


def _explain(error: Exception, seq_len: int | None, what: str) -> None:
    if seq_len is not None:
        error.add_note(f"{GROWTH} ran {what} with seq_len = {seq_len}")
    if isinstance(error, CaptureError):
        error.add_note(
            "The body of a test with a memory marker is traced already: take the marker or the "
            "trace away"
        )


def _settle() -> None:
    """Free what earlier tests left for the collector and what CUDA's allocator caches."""
    gc.collect()
    cuda = _find_cuda()
    if cuda is not None:
        cuda.empty_cache()
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def _read_reserved() -> dict[str, int]:
    """Return per CUDA device the most bytes that its allocator reserved since `_settle`."""
    cuda = _find_cuda()
    if cuda is None:
        return {}
    return {f"cuda:{n}": cuda.max_memory_reserved(n) for n in range(cuda.device_count())}


def _find_cuda() -> Any:
    """Return ``torch.cuda`` if this process uses it: asking would start what no test wanted."""
    torch: Any = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _list_lengths(checks: Checks) -> tuple[int | None, ...]:
    if checks.lengths is None or not checks.runs_test_by_length:
        return (None,)
    return checks.lengths.seq_lens


def _tell_length(kwargs: Mapping[str, Any], seq_len: int | None) -> dict[str, Any]:
    return dict(kwargs) if seq_len is None else {**kwargs, SEQ_LEN: seq_len}


def _run_dry(
    body: Body, lengths: Lengths, home: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> "tuple[Run, ...]":
    """Run a test's body on fake tensors at every length, once each."""
    from attnprof.capture.dry_run import dry_run

    def make_step(seq_len: int, device: str) -> Callable[[], Any]:
        return lambda: body(*args, **_tell_length(kwargs, seq_len))

    _settle()
    runs = []
    for seq_len in lengths.seq_lens:
        with _explaining(seq_len, "the test"):
            runs.append(dry_run(make_step, seq_len, directory=_find_room(home), steps=1))
    return tuple(runs)


def _run_workload(lengths: Lengths, home: Path) -> "tuple[Run, ...]":
    """Run a marker's ``make_step`` at every length."""
    from attnprof.capture.dry_run import dry_run
    from attnprof.capture.workload import record_workload

    assert lengths.make_step is not None
    record = dry_run if lengths.is_dry else record_workload
    runs = []
    for seq_len in lengths.seq_lens:
        _settle()
        with _explaining(seq_len, "make_step"):
            runs.append(record(lengths.make_step, seq_len, directory=_find_room(home)))
    return tuple(runs)


_OF_A_TEST = {
    "inside make_step": "in the body of the test",
    "the device that make_step is given": "the CPU",
}
"""What the reasons of a failed dry run call by names that a test does not have."""


@contextmanager
def _explaining(seq_len: int, what: str) -> Iterator[None]:
    """Say of a failure which length it was; where a program cannot be run dry, in one line."""
    try:
        yield
    except DryRunError as error:
        reason = str(error)
        for name, own_name in _OF_A_TEST.items() if what == "the test" else ():
            reason = reason.replace(name, own_name)
        text = f"{GROWTH}: no dry run of {what} at seq_len {seq_len}: {reason}"
        raise pytest.fail.Exception(text, pytrace=False) from None
    except Exception as error:
        _explain(error, seq_len, what)
        raise
