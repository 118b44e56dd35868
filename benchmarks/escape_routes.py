"""How each escape route from the quadratic wall grows, and whether that could be told before.

Every route of ``examples/escape_routes`` runs one training step at four lengths. The laws come from
all of them; the prediction for the longest comes from the other three, which are at most a quarter
of it; and the shortest is run dry as well.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Target, make_table, save_results, show_machine, show_targets
from rich.console import Console

import attnprof
from attnprof.errors import DryRunError
from attnprof.units import format_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "escape_routes"))

from compare import ROUTES, find_scores, name_kinds, write_exponent, write_law

PREDICTABLE = {"materialised", "fused", "banded"}
"""Kinds whose prediction is held to a target."""
LOOPING = {"RetNet, recurrent", "RWKV", "Mamba"}
"""Routes that loop over tokens in Python, at a quarter of the lengths: backward fills a gradient of
the whole tensor for every slice, so that their time grows with n²."""


@dataclass(frozen=True)
class Result:
    """What was found of one route."""

    kind: str
    scores: str
    total: str
    law: str
    longest: int
    """The longest length."""
    peak_bytes: int
    """At the longest length."""
    predicted_bytes: int
    """The same, from the other lengths."""
    dry_difference_bytes: int | None
    """Dry run minus measured at the shortest length; None where it cannot be dry-run."""
    wall: int
    """The longest length that fits the device, by the law."""

    @property
    def prediction_error(self) -> float:
        """The error of the prediction, as a share of the peak."""
        return abs(self.predicted_bytes / self.peak_bytes - 1)


def measure(name: str, longest: int, device: str) -> Result:
    """Sweep one route."""
    if name in LOOPING:
        longest //= 4
    seq_lens = [longest // 16, longest // 8, longest // 4, longest]
    growth = attnprof.sweep(ROUTES[name], seq_lens)
    known = attnprof.Growth.from_runs(growth.run(n) for n in seq_lens[:-1])
    total = growth.fit()
    peak_bytes = growth.run(longest).peak().total_bytes
    return Result(
        kind=name_kinds(growth.run(longest)),
        scores=write_exponent(find_scores(growth)),
        total=write_exponent(total),
        law=write_law(total),
        longest=longest,
        peak_bytes=peak_bytes,
        predicted_bytes=known.predict(longest),
        dry_difference_bytes=compare_dry_run(growth, name, seq_lens[0]),
        wall=attnprof.Growth.load(growth.path).max_seq_len(device),  # without dry runs
    )


def compare_dry_run(growth: attnprof.Growth, name: str, seq_len: int) -> int | None:
    """Return by how many bytes a dry run is off."""
    try:
        dry = attnprof.dry_run(ROUTES[name], seq_len)
    except DryRunError:
        return None
    return dry.peak().total_bytes - growth.run(seq_len).peak().total_bytes


def show_results(console: Console, results: dict[str, Result], device: str) -> None:
    """Print a row per route."""
    columns = [
        "route",
        "kind",
        "scores or mask",
        "total",
        "law",
        "n",
        "peak",
        "predicted",
        "dry run",
    ]
    table = make_table("A training step", [*columns, f"wall on {device}"])
    for name, result in results.items():
        dry = result.dry_difference_bytes
        table.add_row(
            name,
            result.kind,
            result.scores,
            result.total,
            result.law,
            str(result.longest),
            format_bytes(result.peak_bytes),
            f"{result.predicted_bytes / result.peak_bytes - 1:+.2%}",
            "–" if dry is None else f"{dry:+} B",
            f"{result.wall:,}",
        )
    console.print(table)


def judge(results: dict[str, Result]) -> list[Target]:
    """Return the targets that the results are held to."""
    held = [r.prediction_error for r in results.values() if r.kind in PREDICTABLE]
    dry = [abs(d) for r in results.values() if (d := r.dry_difference_bytes) is not None]
    return [
        Target("largest error of a prediction (materialised, fused, banded)", max(held), 0.01),
        Target("bytes by which a dry run is off", max(dry), 0),
    ]


def main() -> None:
    """Measure all routes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=4096, metavar="N", help="default: 4096")
    parser.add_argument("--device", default="H200", help="whose wall to find; default: H200")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES), metavar="R")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()

    console = Console(width=170)
    show_machine(console)
    torch.set_num_threads(1)  # more would spend their time waiting: the ops are small
    results: dict[str, Result] = {}
    for name in options.routes:
        with console.status(name):
            results[name] = measure(name, options.longest, options.device)
    show_results(console, results, options.device)
    targets = judge(results)
    show_targets(console, targets)
    found: dict[str, Any] = {name: asdict(result) for name, result in results.items()}
    save_results(options.json, "escape_routes", found, targets)


if __name__ == "__main__":
    main()
