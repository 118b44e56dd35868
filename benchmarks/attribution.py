"""How long it takes, and how much memory, to read what a long run means.

Records a training run of about a million ops, then opens it in a fresh process and asks for
everything. Run it with ``python benchmarks/attribution.py``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Target, add_options, make_table, save_results, show_machine, show_targets
from rich.console import Console

Results = dict[str, Any]

_SINCE_IMPORT = ("load", "allocations", "peak", "layers", "steps")


def record(directory: Path, ops: int) -> Results:
    """Train a GPT-2 of tiny widths under the tracer until ``ops`` ops have run."""
    import torch
    from workloads import count_ops, make_gpt2

    import attnprof

    torch.set_num_threads(1)
    step = make_gpt2(layers=12, width=32, heads=2, seq_len=32, batch=2, vocabulary=64)
    step()  # the optimizer makes its state
    steps = -(-ops // count_ops(step))
    begin = time.perf_counter()
    with attnprof.trace(directory):
        for _ in range(steps):
            step()
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return {"steps": steps, "seconds": seconds, "size_bytes": size}


def measure(directory: Path, profile_rows: int) -> Results:
    """Open the run and ask for everything, in this process; to be called in a fresh one."""
    import cProfile
    import pstats
    import resource

    seconds: dict[str, float] = {}
    rss: dict[str, int] = {}

    def take(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - begin
        rss[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
        return result

    attnprof: Any = take("import", _import_attnprof)
    profiler = cProfile.Profile()
    if profile_rows:
        profiler.enable()
    run = take("load", lambda: attnprof.load(directory))
    allocations = take("allocations", lambda: run.allocations)
    peak = take("peak", lambda: run.peak())
    layers = take("layers", lambda: run.layers())
    steps = take("steps", lambda: run.steps)
    profiler.disable()
    if profile_rows:
        stats = pstats.Stats(profiler, stream=sys.stderr)
        stats.sort_stats("tottime").print_stats(profile_rows)
    assert sum(peak.by_category().values()) == peak.total_bytes
    return {
        "seconds": seconds,
        "peak_rss_bytes": rss,
        "ops": len(run.attribution.facts.code),
        "allocations": len(allocations),
        "layers": len(layers),
        "steps": len(steps),
        "peak_bytes": peak.total_bytes,
        "imports_torch": "torch" in sys.modules,
    }


def _import_attnprof() -> Any:
    import attnprof

    _ = attnprof.load  # names are imported when first asked for
    return attnprof


def ask_fresh(task: str, directory: Path, *more: str) -> Results:
    """Do a task in a process of its own and return its results.

    This process stays small meanwhile: Linux counts the memory of a parent towards the peak of
    its children.
    """
    command = [sys.executable, __file__, task, str(directory), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Results = json.loads(done.stdout)
    return found


def summarise(rounds: list[Results]) -> Results:
    """Return the medians over the rounds; the largest of the memory."""
    names = list(rounds[0]["seconds"])
    seconds = {name: statistics.median(r["seconds"][name] for r in rounds) for name in names}
    rss = {name: max(r["peak_rss_bytes"][name] for r in rounds) for name in names}
    totals = [sum(r["seconds"][name] for name in _SINCE_IMPORT) for r in rounds]
    return {
        **rounds[0],
        "seconds": seconds,
        "peak_rss_bytes": rss,
        "total_seconds": statistics.median(totals),
        "rounds": totals,
    }


def show(console: Console, results: Results) -> None:
    """Print what each part took."""
    title = (
        f"{results['ops']} ops, {results['allocations']} allocations, {results['steps']} steps, "
        f"{results['layers']} layers"
    )
    table = make_table(title, ["part", "s", "peak RSS so far, MiB"])
    for name, seconds in results["seconds"].items():
        table.add_row(name, f"{seconds:.2f}", f"{results['peak_rss_bytes'][name] / 2**20:.0f}")
    table.add_section()
    most = max(results["peak_rss_bytes"].values()) / 2**20
    table.add_row("all but import", f"{results['total_seconds']:.2f}", f"{most:.0f}")
    console.print(table)


def main() -> None:
    """Record a run, or take one that is there, and measure its attribution."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=3)
    parser.add_argument("--ops", type=int, default=1_000_000, help="default: a million")
    parser.add_argument("--run", type=Path, metavar="DIR", help="measure this run, record none")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="record there and keep the run")
    parser.add_argument(
        "--profile", type=int, metavar="N", default=0, help="print the N hottest functions"
    )
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record is not None:
        print(json.dumps(record(options.record, options.ops)))
        return
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.profile)))
        return
    console = Console(width=130)
    show_machine(console)
    with tempfile.TemporaryDirectory(prefix="attnprof-benchmark-") as scratch:
        directory = options.run or options.keep or Path(scratch) / "run"
        recorded = None
        if options.run is None:
            recorded = ask_fresh("--record", directory, "--ops", str(options.ops))
        rounds = [ask_fresh("--measure", directory) for _ in range(options.rounds)]
        if options.profile:
            ask_fresh("--measure", directory, "--profile", str(options.profile))
    results = summarise(rounds)
    results["recorded"] = recorded
    if recorded is not None:
        console.print(
            f"recorded {recorded['steps']} steps of GPT-2 in {recorded['seconds']:.0f} s, "
            f"{recorded['size_bytes'] / results['ops']:.0f} bytes on disk per op"
        )
    show(console, results)
    per_million = 1e6 / results["ops"]
    targets = [
        Target("seconds per million ops", results["total_seconds"] * per_million, 5),
        Target("peak RSS, GiB", max(results["peak_rss_bytes"].values()) / 2**30, 1),
    ]
    show_targets(console, targets)
    save_results(options.json, "attribution", results, targets)


if __name__ == "__main__":
    main()
