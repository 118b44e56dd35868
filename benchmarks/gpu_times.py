"""What tracing costs on a GPU, beside others that watch: a part of ``gpu.py``."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from gpu_cases import Results, attempt
from gpu_models import Step, make_step

import attnprof


@contextmanager
def tracing() -> Iterator[None]:
    """Record every step; the first of a trace, which names everything, is not timed."""
    with attnprof.trace(detail="full"):
        yield


@contextmanager
def recording_history() -> Iterator[None]:
    """Have the allocator record its history, as people do by hand."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def profiling() -> AbstractContextManager[Any]:
    """Have torch's profiler record memory."""
    return torch.profiler.profile(profile_memory=True)


def tracking() -> AbstractContextManager[Any]:
    """Have torch's MemTracker look on."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker: AbstractContextManager[Any] = MemTracker()
    return tracker


WATCHERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "untraced": nullcontext,
    "attnprof": tracing,
    "history only": recording_history,
    "torch.profiler": profiling,
    "MemTracker": tracking,
}


def time_watchers(tiny: bool, rounds: int) -> Results:
    """Time steps under each watcher, as ratios to the untraced step beside them."""
    cases = [("gpt2", n) for n in (1024, 2048, 4096)] + [("llama", 4096)]
    cases = [("gpt2", 64)] if tiny else cases
    return {f"{k} bf16 sdpa n={n}": attempt(time_model, k, n, rounds, tiny) for k, n in cases}


def time_model(kind: str, length: int, rounds: int, tiny: bool) -> Results:
    """Time all watchers in turn, round by round."""
    step = make_step(kind, length, "cuda", tiny=tiny)
    step()
    seconds: dict[str, list[float]] = {name: [] for name in WATCHERS}
    for _ in range(rounds):
        for name, watch in WATCHERS.items():
            with watch() as watcher:
                times = []
                for _ in range(4):
                    if name == "MemTracker":
                        watcher.reset_mod_stats()
                    times.append(time_step(step))
                seconds[name].append(statistics.median(times[1:]))
    plain = seconds.pop("untraced")
    return {
        "untraced_seconds": statistics.median(plain),
        "ratio": {
            name: statistics.median(a / b for a, b in zip(own, plain, strict=True))
            for name, own in seconds.items()
        },
    }


def time_loops(tiny: bool) -> Results:
    """Time long loops of training as people trace them: with detail in some steps only."""
    cases = [("gpt2", 1024), ("llama", 4096)]
    cases = [("gpt2", 64)] if tiny else cases
    return {f"{k} bf16 sdpa n={n}": attempt(time_loop, k, n, tiny) for k, n in cases}


def time_loop(kind: str, length: int, tiny: bool, count: int = 200) -> Results:
    """Compare ``count`` steps inside one trace with as many outside, half before and half after."""
    step = make_step(kind, length, "cuda", tiny=tiny)
    step()
    before = _time_steps(step, count // 2)
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with attnprof.trace() as tracer:
        traced = _time_steps(step, count)
    whole = time.perf_counter() - begin
    untraced = before + _time_steps(step, count - count // 2)
    return {
        "steps": count,
        "steps_recorded": int(tracer.run.steps["is_detailed"].sum()),
        "untraced_seconds": untraced,
        "ratio": traced / untraced,
        "ratio_with_begin_and_end": whole / untraced,
    }


def _time_steps(step: Step, count: int) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def time_step(step: Step) -> float:
    """Return the seconds of a step."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
