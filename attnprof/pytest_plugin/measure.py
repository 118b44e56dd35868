"""Run the body of a test under a trace and keep what its markers ask about."""

import gc
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnprof.pytest_plugin.marks import Checks, GrowthLaw

if TYPE_CHECKING:
    from attnprof.capture.tracer import Tracer
    from attnprof.run import Run


@dataclass(frozen=True, slots=True)
class Measured:
    """The runs of one test."""

    runs: tuple["Run", ...]
    """One; with a growth law, one per length, by rising lengths."""
    by_length: tuple["Run", ...] = ()
    """The runs to fit a law to; the same, or those of the marker's ``make_step``."""


def measure(body: Callable[..., Any], checks: Checks, args: Any, kwargs: Any) -> Measured:
    """Run a test's body as often as its markers ask, and return its runs.

    Exceptions of the body pass on as they were raised; then there is nothing to judge.
    """
    law = checks.growth
    if law is None:
        return Measured((_trace(body, args, kwargs),))
    if law.make_step is not None:
        runs = tuple(_run_workload(law, law.make_step, n) for n in law.seq_lens)
        return Measured((_trace(body, args, kwargs),), runs)

    def make_step(seq_len: int, device: str) -> Callable[[], Any]:
        return lambda: body(*args, **{**kwargs, "seq_len": seq_len})

    if law.is_dry:
        runs = tuple(_run_workload(law, make_step, n) for n in law.seq_lens)
    else:
        runs = tuple(_trace(body, args, {**kwargs, "seq_len": n}, seq_len=n) for n in law.seq_lens)
    return Measured(runs, runs)


async def measure_async(
    body: Callable[..., Awaitable[Any]], checks: Checks, args: Any, kwargs: Any
) -> Measured:
    """Do the same for a coroutine function; a growth law runs it once per length."""
    law = checks.growth
    lengths = law.seq_lens if law is not None and law.make_step is None else (None,)
    runs = []
    for n in lengths:
        own = kwargs if n is None else {**kwargs, "seq_len": n}
        tracer = _make_tracer(n)
        _settle()
        with tracer:
            await body(*args, **own)
            gc.collect()
        runs.append(tracer.run)
    if law is not None and law.make_step is not None:
        by_length = tuple(_run_workload(law, law.make_step, n) for n in law.seq_lens)
        return Measured(tuple(runs), by_length)
    return Measured(tuple(runs), tuple(runs))


def _trace(
    body: Callable[..., Any], args: Any, kwargs: Any, *, seq_len: int | None = None
) -> "Run":
    tracer = _make_tracer(seq_len)
    _settle()
    with tracer:
        body(*args, **kwargs)
        gc.collect()  # what only reference cycles hold is not leaked
    return tracer.run


def _make_tracer(seq_len: int | None) -> "Tracer":
    from attnprof.capture.tracer import Tracer

    workload = {"seq_len": seq_len, "source": "measured"}
    return Tracer(samples_per_second=0, info={} if seq_len is None else {"workload": workload})


def _run_workload(
    law: GrowthLaw, make_step: Callable[[int, str], Callable[[], Any]], seq_len: int
) -> "Run":
    from attnprof.capture.dry_run import dry_run
    from attnprof.capture.workload import record_workload

    _settle()
    return (dry_run if law.is_dry else record_workload)(make_step, seq_len)


def _settle() -> None:
    """Free what earlier tests left for the collector, and what CUDA's allocator caches."""
    gc.collect()
    torch = sys.modules.get("torch")  # a test that never imported it has nothing there
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
