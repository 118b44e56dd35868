"""How long it takes, and how much memory, to make a run of a large memory snapshot.

Writes a snapshot of a million events in the form of torch 2.13's, then reads it with attnprof, with
torch's own viewer and, where it is at hand, with Mosaic, each in a fresh process. Run it with
``python benchmarks/import_snapshot.py``.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Target, add_options, make_table, save_results, show_machine, show_targets
from rich.console import Console

Results = dict[str, Any]

ATTNPROF = """
from attnprof.interop.importing import import_snapshot
import_snapshot(Path(sys.argv[1]), Path(sys.argv[2]))
mark("import")
import attnprof
run = attnprof.load(sys.argv[2])
answer = run.peak().total_bytes
run.peak().by_category()
mark("peak")
from attnprof.report.summary import summarise
summarise(run)
mark("report")
"""
TORCH = """
import pickle
from torch.cuda import _memory_viz
mark("import torch")
with open(sys.argv[1], "rb") as file:
    snapshot = pickle.Unpickler(file).load()
mark("load")
_memory_viz.segsum(snapshot)
mark("stats")
page = _memory_viz.trace_plot(snapshot)
Path(sys.argv[2]).write_text(page)
mark("trace_plot")
answer = None
"""
MOSAIC = """
from mosaic.libmosaic.analyzer.memory_abstract import MemoryAbstract
mark("import mosaic")
abstract = MemoryAbstract(memory_snapshot_file=sys.argv[1])
abstract.load_memory_snapshot()
mark("load")
abstract.memory_snapshot.analyze_memory_snapshot(opt="memory_peak")
answer = abstract.memory_snapshot.dynamic_memory_peak + abstract.memory_snapshot.static_memory
mark("peak")
"""
FRAME = """
import json, resource, sys, time
from pathlib import Path
seconds, cpu_seconds = {}, {}
begun = time.perf_counter(), 0.0
def mark(name):
    global begun
    now = time.perf_counter(), time.process_time()
    seconds[name], cpu_seconds[name] = (b - a for a, b in zip(begun, now))
    begun = now
%s
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds,
                  "max_rss_bytes": usage.ru_maxrss * 1024, "answer": answer}))
"""
"""What each reader runs in: times parts, and says what the process took."""

SIZES = [512, 8192, 100_000, 2**20, 3 * 2**20, 5_000_000, 33 * 2**20]
"""Bytes of requests, of both pools."""


def write_snapshot(path: Path, events: int) -> int:
    """Write a snapshot of a training loop's kind and return the bytes at its peak.

    Stacks have 10 to 32 frames out of 900, as Python stacks in a real program have; each allocation
    has a list of its own, as in torch's files, and pairs for pool ids are made anew.
    """
    from attnprof.interop.builder import SnapshotBuilder

    draw = random.Random(0)
    builder = SnapshotBuilder()
    frames = [
        {"name": f"function_{i}", "filename": f"/lib/site-packages/m/file_{i % 97}.py", "line": i}
        for i in range(900)
    ]
    ends = [
        {
            "name": "_call_impl",
            "filename": "/lib/site-packages/torch/nn/modules/module.py",
            "line": 9,
        },
        {"name": "<module>", "filename": "/home/me/train.py", "line": 10},
    ]
    stacks = [[*draw.choices(frames, k=draw.randint(8, 30)), *ends] for _ in range(4000)]
    builder.is_recording = False
    for size in draw.choices(SIZES, k=300):
        builder.allocate(size)
    builder.is_recording = True
    live: list[int] = []
    count = time_us = peak_bytes = 0
    while count < events:
        time_us += 7
        if len(live) < 2000 or draw.random() < 0.5:
            stack = list(draw.choice(stacks))
            live.append(builder.allocate(draw.choice(SIZES), time_us=time_us, frames=stack))
            peak_bytes = max(peak_bytes, builder.count_allocated_bytes())
            count += 1
        else:
            builder.free(live.pop(draw.randrange(len(live))), time_us=time_us)
            count += 2
    snapshot = builder.build()
    for entry in snapshot["device_traces"][0]:
        entry["pool_id"] = tuple([0, 0])  # a literal would be one object, shared
    path.write_bytes(pickle.dumps(snapshot, protocol=4))
    return peak_bytes


def measure(program: str, arguments: list[str], python: str, path: str) -> Results:
    """Run a reader in a process of its own and return what it took."""
    environment = os.environ | {"PYTHONPATH": path}
    ended = subprocess.run(
        [python, "-c", FRAME % program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(ended.stderr)
    result: Results = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Write the snapshot, measure every reader, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=3)
    parser.add_argument("--events", type=int, default=1_000_000, help="default: 1 000 000")
    parser.add_argument("--mosaic", metavar="DIR", help="the folder that holds Mosaic's package")
    parser.add_argument("--mosaic-python", default=sys.executable, help="with its dependencies")
    options = parser.parse_args()
    console = Console()
    show_machine(console)
    ours = os.environ.get("PYTHONPATH", str(Path(__file__).parents[1]))
    readers = {"attnprof": (ATTNPROF, sys.executable, ours), "torch": (TORCH, sys.executable, ours)}
    if options.mosaic:
        readers["Mosaic"] = (MOSAIC, options.mosaic_python, options.mosaic)
    taken: dict[str, list[Results]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as name:
        snapshot, out = Path(name) / "snapshot.pickle", Path(name) / "out"
        peak_bytes = write_snapshot(snapshot, options.events)
        size = snapshot.stat().st_size
        console.print(f"{options.events:,} events in {size / 2**20:.0f} MiB")
        for _ in range(options.rounds):
            for reader, (program, python, path) in readers.items():
                shutil.rmtree(out, ignore_errors=True)
                out.unlink(missing_ok=True)
                taken[reader].append(measure(program, [str(snapshot), str(out)], python, path))
    show(console, taken)
    answers = [result["answer"] for result in taken["attnprof"]]
    targets = [
        Target("import, seconds", find_median(taken["attnprof"], "seconds", "import"), 10),
        Target("import, CPU seconds", find_median(taken["attnprof"], "cpu_seconds", "import"), 10),
        Target("memory, GiB", max(r["max_rss_bytes"] for r in taken["attnprof"]) / 2**30, 1.5),
        Target("bytes off the true peak", max(abs(a - peak_bytes) for a in answers), 0),
    ]
    show_targets(console, targets)
    results = {"events": options.events, "size_bytes": size, "peak_bytes": peak_bytes, **taken}
    save_results(options.json, "import_snapshot", results, targets)


def find_median(results: list[Results], kind: str, part: str) -> float:
    """Return the median of one part's seconds over the rounds."""
    return statistics.median(result[kind][part] for result in results)


def show(console: Console, taken: dict[str, list[Results]]) -> None:
    """Print what each reader took, part by part."""
    table = make_table("Readers of one file", ["reader and part", "seconds", "CPU s", "RSS MiB"])
    for reader, results in taken.items():
        for part in results[0]["seconds"]:
            figures = (find_median(results, kind, part) for kind in ("seconds", "cpu_seconds"))
            table.add_row(f"{reader}: {part}", *(f"{figure:.2f}" for figure in figures), "")
        rss = max(result["max_rss_bytes"] for result in results) / 2**20
        table.add_row(f"{reader}: all", "", "", f"{rss:.0f}")
    console.print(table)
    for reader, results in taken.items():
        if results[0]["answer"] is not None:
            console.print(f"{reader} says the peak is {results[0]['answer']:,} bytes")


if __name__ == "__main__":
    main()
