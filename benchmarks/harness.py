"""What the benchmarks share: options, interleaved rounds, tables, and the JSON they leave."""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Variant:
    """One way to run the same step."""

    name: str
    context: Callable[[], AbstractContextManager[Any]]
    """Entered around the steps of a round."""
    steps: int
    """Steps timed in a round."""
    warm_steps: int = 2
    """Steps before those, untimed."""
    between: Callable[[Any], None] | None = None
    """Called after every step, untimed, with what ``context`` returned."""
    finish: Callable[[Any], None] | None = None
    """Makes the result usable, from what ``context`` returned, after it was left."""


@dataclass
class Timing:
    """What the rounds of one variant took."""

    step_seconds: list[float]
    """Median of the steps of each round."""
    best_seconds: list[float]
    """Fastest step of each round: what a busy machine disturbs least."""
    mean_seconds: list[float]
    """Mean of the steps of each round: it also has what happens in some steps only."""
    finish_seconds: list[float]
    """From the last step of each round to a usable result."""

    @property
    def step(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.step_seconds)

    @property
    def mean(self) -> float:
        """Median over the rounds of the mean step, in seconds."""
        return statistics.median(self.mean_seconds)

    @property
    def finish(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.finish_seconds)


def time_interleaved(
    step: Callable[[], None], variants: Sequence[Variant], rounds: int
) -> dict[str, Timing]:
    """Time every variant in every round, one after the other, and return the timings by name.

    Machines drift; variants that take turns drift together, so the ratio within a round is
    steadier than the seconds. Every other round goes backwards, so that none always comes first.
    """
    timings = {variant.name: Timing([], [], [], []) for variant in variants}
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            _time_round(step, variant, timings[variant.name])
    return timings


def _time_round(step: Callable[[], None], variant: Variant, timing: Timing) -> None:
    gc.collect()  # what the variant before left behind is not this one's cost
    seconds = []
    with variant.context() as entered:
        for _ in range(variant.warm_steps + variant.steps):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
            if variant.between is not None:
                variant.between(entered)
        del seconds[: variant.warm_steps]
        begin = time.perf_counter()
    if variant.finish is not None:
        variant.finish(entered)
    timing.finish_seconds.append(time.perf_counter() - begin)
    timing.step_seconds.append(statistics.median(seconds))
    timing.best_seconds.append(min(seconds))
    timing.mean_seconds.append(statistics.fmean(seconds))


def pair_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median of the ratios of values of the same round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def pair_spread(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float]:
    """Return the quartiles of the ratios of values of the same round."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    if len(ratios) < 2:
        return ratios[0], ratios[0]
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return first, third


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def describe_machine() -> dict[str, Any]:
    """Return versions and processor, for the JSON file and the head of the tables."""
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _find_version(name) for name in ("torch", "transformers", "polars", "pyarrow")},
    }


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show_machine(console: Console) -> None:
    """Print one line that says where the numbers come from."""
    known = describe_machine()
    parts = [f"{known.pop('cpus')} CPUs ({known.pop('machine')})"]
    parts += [f"{name} {value}" for name, value in known.items() if value]
    console.print(", ".join(parts), style="dim")


def make_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table whose first column holds names and the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


@dataclass(frozen=True)
class Target:
    """What a benchmark is held to."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    """The value must reach the limit instead of staying below it."""

    @property
    def met(self) -> bool:
        """Whether the value keeps to the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def show_targets(console: Console, targets: Sequence[Target]) -> None:
    """Print every target, what was measured, and whether that meets it."""
    table = make_table("Targets", ["target", "measured", "limit", "met"])
    for target in targets:
        sign = "≥" if target.at_least else "≤"
        answer = "[green]yes[/]" if target.met else "[red]no[/]"
        table.add_row(target.name, f"{target.value:.4g}", f"{sign} {target.limit:g}", answer)
    console.print(table)


def save_results(
    path: Path | None, benchmark: str, results: Mapping[str, Any], targets: Sequence[Target]
) -> None:
    """Write everything to a JSON file, if one was asked for."""
    if path is None:
        return
    judged = [
        {
            "name": t.name,
            "value": t.value,
            "limit": t.limit,
            "at_least": t.at_least,
            "met": t.met,
        }
        for t in targets
    ]
    content = {
        "benchmark": benchmark,
        "machine": describe_machine(),
        "results": results,
        "targets": judged,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
