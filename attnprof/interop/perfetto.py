"""A run as a trace that https://ui.perfetto.dev opens: live bytes by category, and what ran."""

import json
from collections.abc import Iterator
from typing import Any

import polars as pl

from attnprof.run import Run

_MOST_POINTS = 20_000
"""Of each counter; extremes are kept."""
_PROCESS = 1
_STEPS, _PHASES, _MODULES = 1, 2, 10
"""Numbers of the rows below a device: steps, phases, and from the last on a row per thread."""

Event = dict[str, Any]


def render_perfetto(run: Run) -> str:
    """Return the run in Chrome's trace event format, which Perfetto reads."""
    devices = sorted(run.allocations["device"].cast(pl.String).unique().to_list())
    events = [*_name_rows(devices), *_list_steps(run), *_list_phases(run), *_list_modules(run)]
    for number, device in enumerate(devices):
        events += _list_counters(run, device, _PROCESS + 1 + number)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def _name_rows(devices: list[str]) -> Iterator[Event]:
    names = ["program", *(f"memory of {device}" for device in devices)]
    for number, name in enumerate(names):
        yield _describe("process_name", _PROCESS + number, 0, name)
    for thread, name in ((_STEPS, "steps"), (_PHASES, "phases")):
        yield _describe("thread_name", _PROCESS, thread, name)


def _describe(what: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _span(name: str, begin_ns: int, end_ns: int, thread: int) -> Event:
    return {
        "ph": "X",
        "name": name,
        "pid": _PROCESS,
        "tid": thread,
        "ts": begin_ns / 1000,
        "dur": max(end_ns - begin_ns, 0) / 1000,
    }


def _list_counters(run: Run, device: str, process: int) -> Iterator[Event]:
    timeline = run.timeline(_MOST_POINTS, device=device)
    for name in timeline.columns[1:]:
        for time_ns, size in timeline.select("time_ns", name).iter_rows():
            yield {
                "ph": "C",
                "name": "total" if name == "total_bytes" else name,
                "pid": process,
                "ts": time_ns / 1000,
                "args": {"bytes": size},
            }


def _list_steps(run: Run) -> Iterator[Event]:
    if run.allocations.is_empty():
        return
    for step, begin, end in run.steps.select("step", "begin_ns", "end_ns").iter_rows():
        yield _span(f"step {step}", begin, end, _STEPS)


def _list_phases(run: Run) -> Iterator[Event]:
    """Yield a span for each stretch of blocks that were taken in one phase."""
    frame = run.attribution.allocations.sort("start_ns", "allocation_id")
    frame = frame.select(pl.col("phase").cast(pl.String), "start_ns")
    stretches = (
        frame.with_columns(stretch=pl.col("phase").rle_id())
        .group_by("stretch", maintain_order=True)
        .agg(pl.col("phase").first(), pl.col("start_ns").first(), last_ns=pl.col("start_ns").last())
    )
    for _, phase, begin, last in stretches.iter_rows():
        yield _span(phase, begin, last, _PHASES)


def _list_modules(run: Run) -> Iterator[Event]:
    """Yield a span for each call of a module; imported runs have their annotations instead."""
    facts = run.attribution.facts
    scopes = facts.scopes
    columns = ("module", "thread", "enter_ns", "exit_ns")
    for module, thread, enter, leave in zip(*(scopes[c].tolist() for c in columns), strict=True):
        name = facts.module_paths[module] or "(root module)"
        yield _span(name, enter, leave, _MODULES + thread)
    open_at: dict[str, list[int]] = {}
    for row in facts.stored.table("annotations").to_pylist():
        if row["begins"]:
            open_at.setdefault(row["name"], []).append(row["time_ns"])
        elif open_at.get(row["name"]):
            yield _span(row["name"], open_at[row["name"]].pop(), row["time_ns"], _MODULES)
