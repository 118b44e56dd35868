"""How long it takes to predict a workload's memory, and how that grows with n and with layers.

Times the command ``attnprof predict``, imports included, and dry runs at growing lengths and
depths, beside torch's own tracker. Run it with ``python benchmarks/predict.py``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import Target, add_options, make_table, save_results, show_machine, show_targets
from rich.console import Console

Results = dict[str, Any]

ROOT = Path(__file__).parents[1]
EXAMPLES = ("make_inference_step", "make_step")
"""Functions of examples/llama.py: 32 layers, 8 billion parameters."""
LENGTHS = (2**10, 2**12, 2**14, 2**16, 2**18, 2**20)
DEPTHS = (4, 8, 16, 32, 64, 96)
_LENGTH, _DEPTH = 2**20, 32
"""At which the other one is varied."""
_SHORT, _PEER_LAYERS = 512, 8
"""Where the peers are compared, small enough to be run for real."""


def make_llama(layers: int) -> Callable[[int, str], Callable[[], None]]:
    """Return the ``make_step`` of a Llama's forward and backward; its width costs nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make_step(seq_len: int, device: str) -> Callable[[], None]:
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            attn_implementation="sdpa",
        )
        with torch.device(device):
            model = LlamaForCausalLM(config)
            tokens = torch.randint(config.vocab_size, (1, seq_len))

        def step() -> None:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

        return step

    return make_step


def time_command(function: str, rounds: int) -> list[Results]:
    """Return wall and processor seconds of ``attnprof predict`` for an example, per round.

    Its two processes run side by side; on a busy machine only the processor's seconds say much.
    """
    command = [
        sys.executable, "-m", "attnprof", "predict", f"examples/llama.py:{function}",
        "--seq-len", "1M", "--device", "H200", "--json",
    ]  # fmt: skip
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    taken = []
    for _ in range(rounds):
        begin, before = time.perf_counter(), os.times()
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        wall, after = time.perf_counter() - begin, os.times()
        user = after.children_user - before.children_user
        system = after.children_system - before.children_system
        taken.append({"wall_seconds": wall, "cpu_seconds": user + system})
        if json.loads(ended.stdout)["fits"] == (ended.returncode == 1):
            raise RuntimeError(f"exit code {ended.returncode} contradicts the report")
    return taken


def time_dry_runs(cases: Sequence[tuple[int, int]], rounds: int) -> list[Results]:
    """Return per pair of layers and length what a dry run took: the median of the rounds."""
    from attnprof.capture.dry_run import dry_run

    makers = {layers: make_llama(layers) for layers, _ in cases}
    dry_run(makers[cases[0][0]], _SHORT, steps=1)  # what is imported on the way is not the cost
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    peaks: dict[tuple[int, int], int] = {}
    for number in range(rounds):
        for layers, seq_len in cases if number % 2 == 0 else reversed(cases):
            begin = time.perf_counter()
            run = dry_run(makers[layers], seq_len, steps=1)
            peaks[layers, seq_len] = run.peak().total_bytes
            seconds[layers, seq_len].append(time.perf_counter() - begin)
    return [
        {
            "layers": layers,
            "seq_len": n,
            "seconds": statistics.median(seconds[layers, n]),
            "peak_bytes": peaks[layers, n],
        }
        for layers, n in cases
    ]


def compare_peers(layers: int, rounds: int) -> dict[str, Results]:
    """Return what attnprof and MemTracker say of a step on fake tensors and for real, and when.

    Building the model is inside both, as neither has seen anything of it before.
    """
    from contextlib import nullcontext

    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    from attnprof.capture.dry_run import dry_run
    from attnprof.capture.workload import record_workload

    make_step = make_llama(layers)

    def run_attnprof(*, fake: bool) -> int:
        record = dry_run if fake else record_workload
        peak = record(make_step, _SHORT, steps=1).peak()
        assert sum(peak.by_category().values()) == peak.total_bytes
        return peak.total_bytes

    def run_tracker(*, fake: bool) -> int:
        with FakeTensorMode() if fake else nullcontext(), MemTracker() as tracker:
            make_step(_SHORT, "cpu")()
        snapshot = tracker.get_tracker_snapshot("peak")
        return max(int(sizes["Total"]) for sizes in snapshot.values())

    runs = [("attnprof", run_attnprof), ("MemTracker", run_tracker)]
    seconds: dict[str, list[float]] = {name: [] for name, _ in runs}
    peaks = {name: {"fake": run(fake=True), "real": run(fake=False)} for name, run in runs}
    for number in range(rounds):
        for name, run in runs if number % 2 == 0 else reversed(runs):
            begin = time.perf_counter()
            run(fake=True)
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "fake_peak_bytes": peaks[name]["fake"],
            "real_peak_bytes": peaks[name]["real"],
        }
        for name, _ in runs
    }


def show_scaling(console: Console, results: Results) -> None:
    """Print dry runs against length and against depth."""
    for name, varied in (("seq_len", "n"), ("layers", "layers")):
        rows = results[f"by_{name}"]
        table = make_table(f"Dry runs by {varied}", [varied, "s", "× first", "peak, GiB"])
        for row in rows:
            ratio = row["seconds"] / rows[0]["seconds"]
            peak = row["peak_bytes"] / 2**30
            table.add_row(str(row[name]), f"{row['seconds']:.2f}", f"{ratio:.2f}", f"{peak:.1f}")
        console.print(table)


def show_peers(console: Console, results: Results) -> None:
    """Print attnprof's dry run beside torch's tracker."""
    title = f"Forward and backward of {_PEER_LAYERS} layers at n = {_SHORT}"
    columns = ["tracker", "s, on fake tensors", "peak so, bytes", "for real, bytes"]
    table = make_table(title, columns)
    for name, row in results["peers"].items():
        sizes = (f"{row[key]:,}" for key in ("fake_peak_bytes", "real_peak_bytes"))
        table.add_row(name, f"{row['seconds']:.2f}", *sizes)
    console.print(table)


def judge(results: Results) -> list[Target]:
    """Return what the results are held to."""
    by_length, by_depth = results["by_seq_len"], results["by_layers"]
    flat = by_length[-1]["seconds"] / by_length[0]["seconds"]
    per_layer = by_depth[-1]["seconds"] / by_depth[0]["seconds"] * DEPTHS[0] / DEPTHS[-1]
    ours, theirs = results["peers"]["attnprof"], results["peers"]["MemTracker"]
    off_dry = abs(ours["fake_peak_bytes"] - ours["real_peak_bytes"])
    off_real = abs(ours["real_peak_bytes"] - theirs["real_peak_bytes"])
    return [
        *(
            Target(f"predict {name}, s", statistics.median(t["wall_seconds"] for t in taken), 10)
            for name, taken in results["command"].items()
        ),
        Target(f"dry run of {_DEPTH} layers at n = 1M, s", by_length[-1]["seconds"], 3),
        Target("cost at 1M, × at 1K", flat, 1.25),
        Target(f"cost per layer at {DEPTHS[-1]}, × at {DEPTHS[0]}", per_layer, 1.25),
        Target("seconds, × MemTracker", ours["seconds"] / theirs["seconds"], 1),
        Target("dry peak, bytes off the real one", off_dry, 0),
        Target("real peak, bytes off MemTracker's", off_real, 0),
    ]


def main() -> None:
    """Time predictions and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=3)
    options = parser.parse_args()
    console = Console(width=130)
    show_machine(console)
    command = {name: time_command(name, options.rounds) for name in EXAMPLES}
    title = "attnprof predict, imports included: n = 1M on an H200"
    table = make_table(title, ["step", "s, each round", "of both processors, s"])
    for name, taken in command.items():
        kinds = ("wall_seconds", "cpu_seconds")
        table.add_row(name, *(" ".join(f"{t[kind]:.1f}" for t in taken) for kind in kinds))
    console.print(table)
    results: Results = {
        "command": command,
        "by_seq_len": time_dry_runs([(_DEPTH, n) for n in LENGTHS], options.rounds),
        "by_layers": time_dry_runs([(layers, _LENGTH) for layers in DEPTHS], options.rounds),
        "peers": compare_peers(_PEER_LAYERS, options.rounds),
    }
    show_scaling(console, results)
    show_peers(console, results)
    targets = judge(results)
    show_targets(console, targets)
    save_results(options.json, "predict", results, targets)


if __name__ == "__main__":
    main()
