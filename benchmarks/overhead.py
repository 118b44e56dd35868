"""What tracing costs: time on launch-bound and on real steps, bytes on disk, memory in long loops.

Run it with ``python benchmarks/overhead.py``; ``--part`` limits it to one of its parts.
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import (
    Target,
    Timing,
    Variant,
    add_options,
    make_table,
    pair_ratio,
    pair_spread,
    save_results,
    show_machine,
    show_targets,
    time_interleaved,
)
from rich.console import Console
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from workloads import NoOpMode, count_ops, make_gpt2, make_toy

import attnprof
from attnprof.capture.tracer import Tracer
from attnprof.store import open_run

UNTRACED, NO_OP, ATTNPROF = "untraced", "no-op mode", "attnprof"
MEM_TRACKER, PROFILER = "MemTracker", "torch.profiler"

Results = dict[str, Any]


@contextmanager
def tracing(parent: Path) -> Iterator[Tracer]:
    """Trace into a new directory below ``parent``."""
    with attnprof.trace(tempfile.mkdtemp(dir=parent)) as tracer:
        yield tracer


def read_attnprof(tracer: Tracer) -> None:
    """Ask what a user would: the peak by category, and the attention layers."""
    run = attnprof.load(tracer.run.path)
    run.peak().by_category()
    run.layers()


def make_profiler() -> AbstractContextManager[Any]:
    """Return the profiler with all that its memory timeline needs."""
    return profile(
        activities=[ProfilerActivity.CPU],
        profile_memory=True,
        record_shapes=True,
        with_stack=True,
    )


def read_profiler(profiler: Any) -> None:
    """Build the profiler's memory timeline by category."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and the only such view the profiler has
        profiler.export_memory_timeline(file.name, device="cpu")


def measure_toy(rounds: int, scratch: Path, *, optimize: bool) -> Results:
    """Time the launch-bound toy under every tracer."""
    torch.set_num_threads(1)
    step = make_toy(optimize=optimize)
    ops = count_ops(step)
    variants = [
        Variant(UNTRACED, nullcontext, steps=20),
        Variant(NO_OP, NoOpMode, steps=20),
        Variant(ATTNPROF, lambda: tracing(scratch), steps=20, warm_steps=5, finish=read_attnprof),
        Variant(
            MEM_TRACKER,
            MemTracker,
            steps=2,
            warm_steps=1,
            between=lambda tracker: tracker.reset_mod_stats(),  # or it refuses the next step
            finish=lambda tracker: tracker.get_tracker_snapshot("peak"),
        ),
        Variant(PROFILER, make_profiler, steps=2, warm_steps=1, finish=read_profiler),
    ]
    timings = time_interleaved(step, variants, rounds)
    results = {
        name: _summarise(timing, timings[UNTRACED], timings[NO_OP])
        for name, timing in timings.items()
    }
    for variant in variants:
        results[variant.name]["steps_until_usable"] = variant.steps + variant.warm_steps
    return {"ops": ops, "variants": results, "bytes_per_op": measure_disk(scratch)}


def _summarise(timing: Timing, untraced: Timing, no_op: Timing) -> Results:
    added = [a - b for a, b in zip(timing.step_seconds, untraced.step_seconds, strict=True)]
    return {
        "step_seconds": timing.step,
        "best_step_seconds": min(timing.best_seconds),
        "best_to_untraced": min(timing.best_seconds) / min(untraced.best_seconds),
        "best_to_no_op": min(timing.best_seconds) / min(no_op.best_seconds),
        "mean_step_seconds": timing.mean,
        "added_seconds": statistics.median(added),
        "to_untraced": pair_ratio(timing.step_seconds, untraced.step_seconds),
        "to_no_op": pair_ratio(timing.step_seconds, no_op.step_seconds),
        "to_no_op_quartiles": pair_spread(timing.step_seconds, no_op.step_seconds),
        "mean_to_no_op": pair_ratio(timing.mean_seconds, no_op.mean_seconds),
        "usable_seconds": timing.finish,
        "rounds": {"step_seconds": timing.step_seconds, "mean_seconds": timing.mean_seconds},
    }


def show_toy(console: Console, title: str, results: Results) -> None:
    """Print the table of the toy."""
    console.print()
    columns = [
        "tracer",
        "ms/step",
        "× untraced",
        "× no-op",
        "quartiles",
        "best steps",
        "means",
        "+ µs/op",
        "usable after, s (steps)",
    ]
    table = make_table(f"{title}: {results['ops']} ops a step", columns)
    for name, row in results["variants"].items():
        first, third = row["to_no_op_quartiles"]
        reads = name in (ATTNPROF, MEM_TRACKER, PROFILER)
        table.add_row(
            name,
            f"{row['step_seconds'] * 1e3:.1f}",
            f"{row['to_untraced']:.2f}",
            f"{row['to_no_op']:.2f}",
            f"{first:.2f}–{third:.2f}",
            f"{row['best_to_no_op']:.2f}",
            f"{row['mean_to_no_op']:.2f}",
            f"{row['added_seconds'] / results['ops'] * 1e6:.1f}" if name != UNTRACED else "",
            f"{row['usable_seconds']:.2f} ({row['steps_until_usable']})" if reads else "",
        )
    console.print(table)


def judge_toy(label: str, results: Results) -> list[Target]:
    """Return the targets of the toy."""
    rows = results["variants"]
    cheaper = pair_ratio([rows[MEM_TRACKER]["added_seconds"]], [rows[ATTNPROF]["added_seconds"]])
    return [
        Target(f"{label}: attnprof / no-op mode", rows[ATTNPROF]["to_no_op"], 1.5),
        Target(f"{label}: time added by MemTracker / by attnprof", cheaper, 10, at_least=True),
        Target(f"{label}: bytes on disk per op", results["bytes_per_op"], 200),
    ]


def measure_disk(scratch: Path) -> float:
    """Return the bytes on disk per recorded op, over all runs below ``scratch``."""
    runs = [path.parent for path in scratch.glob("*/run.json")]
    size = sum(file.stat().st_size for run in runs for file in run.rglob("*") if file.is_file())
    return size / sum(len(open_run(run).table("ops")) for run in runs)


def measure_real(rounds: int, scratch: Path) -> Results:
    """Time a training step of a small GPT-2, in which the arithmetic dominates."""
    torch.set_num_threads(2)
    step = make_gpt2(layers=6, width=384, heads=6, seq_len=512, batch=2, vocabulary=50257)
    ops = count_ops(step)
    variants = [
        Variant(UNTRACED, nullcontext, steps=2, warm_steps=1),
        Variant(ATTNPROF, lambda: tracing(scratch), steps=2, warm_steps=1, finish=read_attnprof),
    ]
    timings = time_interleaved(step, variants, rounds)
    untraced = timings[UNTRACED]
    rows = {name: _summarise(timing, untraced, untraced) for name, timing in timings.items()}
    return {"ops": ops, "variants": rows, "bytes_per_op": measure_disk(scratch)}


def show_real(console: Console, results: Results) -> None:
    """Print the table of the real step."""
    console.print()
    columns = ["tracer", "s a step", "× untraced", "quartiles", "best steps"]
    title = f"GPT-2, 6 layers, d 384, n 512, batch 2, AdamW: {results['ops']} ops a step"
    table = make_table(title, columns)
    for name, row in results["variants"].items():
        first, third = row["to_no_op_quartiles"]
        table.add_row(
            name,
            f"{row['step_seconds']:.3f}",
            f"{row['to_untraced']:.3f}",
            f"{first:.3f}–{third:.3f}",
            f"{row['best_to_untraced']:.3f}",
        )
    console.print(table)


def measure_loop(steps: int, scratch: Path) -> Results:
    """Trace a long loop, and watch the memory of the process and what the tracer holds."""
    torch.set_num_threads(1)
    step = make_toy(layers=2, optimize=True)
    process = psutil.Process()
    for _ in range(100):
        step()
    marks = sorted({min(steps, at) for at in (1, 100, 500, 1000, 1500, 2000)} | {steps})
    rows: list[Results] = []
    most_waiting = 0
    with tracing(scratch) as tracer:
        for number in range(1, steps + 1):
            step()
            waiting = count_waiting(tracer)
            most_waiting = max(most_waiting, waiting)
            if number in marks:
                rows.append(
                    {
                        "step": number,
                        "rss_bytes": process.memory_info().rss,
                        "waiting": waiting,
                        **count_kept(tracer),
                    }
                )
    return {
        "rows": rows,
        "most_waiting": most_waiting,
        "ops": count_ops(step),
        "bytes_per_op": measure_disk(scratch),
    }


def count_waiting(tracer: Tracer) -> int:
    """Return how many facts are in memory and not yet on disk."""
    recorder: Any = tracer._recorder
    names = ("ops", "storage_events", "scopes", "identities", "marks", "modules", "samples")
    return sum(len(getattr(recorder, name)) for name in names)


def count_kept(tracer: Tracer) -> dict[str, int]:
    """Return the sizes of the tables that the tracer keeps for as long as it runs."""
    found = {}
    for owner in (tracer._recorder, tracer._ledger, tracer._names):
        for name, value in vars(owner).items():
            if isinstance(value, dict):
                found[f"{type(owner).__name__}.{name.strip('_')}"] = len(value)
    return found


def show_loop(console: Console, results: Results) -> None:
    """Print how the memory of the long loop went."""
    console.print()
    kept = [name for name in results["rows"][0] if "." in name]
    growing = [n for n in kept if results["rows"][-1][n] > results["rows"][0][n]]
    columns = ["step", "RSS MiB", "facts waiting", *growing]
    table = make_table(f"A loop of {results['rows'][-1]['step']} traced steps", columns)
    for row in results["rows"]:
        table.add_row(
            str(row["step"]),
            f"{row['rss_bytes'] / 2**20:.1f}",
            str(row["waiting"]),
            *(str(row[name]) for name in growing),
        )
    console.print(table)
    console.print(
        f"{results['ops']} ops a step, {results['bytes_per_op']:.0f} bytes on disk per op; at most "
        f"{results['most_waiting']} facts waiting after a step; columns: the tables that grow"
    )


def judge_loop(results: Results) -> list[Target]:
    """Return the targets of the long loop."""
    first = next(row for row in results["rows"] if row["step"] >= 100)
    grown = (results["rows"][-1]["rss_bytes"] - first["rss_bytes"]) / 2**20
    return [
        Target("loop: RSS grown from step 100 to the last, MiB", grown, 16),
        Target("loop: facts waiting after a step", results["most_waiting"], 5000),
    ]


def main() -> None:
    """Run the parts asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=11)
    parser.add_argument("--part", choices=["loop", "toy", "real"], action="append")
    parser.add_argument("--loop-steps", type=int, default=2000, help="default: 2000")
    options = parser.parse_args()
    parts = options.part or ["loop", "toy", "real"]
    console = Console(width=130)
    show_machine(console)
    results: Results = {}
    targets: list[Target] = []

    def run(name: str, measure: Callable[[Path], Results]) -> Results:
        with tempfile.TemporaryDirectory(prefix="attnprof-benchmark-") as scratch:
            results[name] = measure(Path(scratch))
        found: Results = results[name]
        return found

    if "loop" in parts:
        loop = run("loop", lambda scratch: measure_loop(options.loop_steps, scratch))
        show_loop(console, loop)
        targets += judge_loop(loop)
    if "toy" in parts:
        for label, optimize in (("forward and backward", False), ("with AdamW", True)):

            def measure(scratch: Path, optimize: bool = optimize) -> Results:
                return measure_toy(options.rounds, scratch, optimize=optimize)

            toy = run(f"toy, {label}", measure)
            show_toy(console, f"Launch-bound toy, {label}", toy)
            targets += judge_toy(label, toy)
    if "real" in parts:
        real = run("real", lambda scratch: measure_real(options.rounds, scratch))
        show_real(console, real)
        ratio = real["variants"][ATTNPROF]["to_untraced"]
        targets.append(Target("GPT-2: attnprof / untraced", ratio, 1.05))
    console.print()
    show_targets(console, targets)
    save_results(options.json, "overhead", results, targets)


if __name__ == "__main__":
    main()
