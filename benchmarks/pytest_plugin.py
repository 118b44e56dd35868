"""What the pytest plugin costs a test, beside no plugin and beside pytest-memray.

pytest-memray is installed, with the pytest that runs here, into an environment of its own: a
temporary one, or with ``--peer DIR`` one that is kept for the next time. Without a network the
comparison is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import (
    Target,
    add_options,
    make_table,
    pair_ratio,
    save_results,
    show_machine,
    show_targets,
)
from rich.console import Console

ROOT = Path(__file__).parents[1]
MEMRAY = "pytest-memray==1.11.0"
TESTS = 400
MARKED = 10
MAX_UNMARKED_MS = 1.0

# Times whole tests, hooks of all other plugins included, and the collection of all of them. In
# processor time: a test is over in a millisecond, and a busy machine would time its other users.
CONFTEST = """
import json, os, time
import pytest

seconds = {"tests": [], "collection": []}

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    begin = time.process_time()
    try:
        return (yield)
    finally:
        seconds["tests"].append(time.process_time() - begin)

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection(session):
    begin = time.process_time()
    try:
        return (yield)
    finally:
        seconds["collection"].append(time.process_time() - begin)

def pytest_unconfigure(config):
    with open(os.environ["SECONDS"], "w") as file:
        json.dump(seconds, file)
"""
MARKED_TEST = """
import pytest

{marker}
@pytest.mark.parametrize("number", range({count}))
def test_marked(number):
    bytearray(1000)
"""
STEP_TEST = """
import pytest, torch
from torch import nn

@pytest.fixture(scope="module")
def model():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 4)

{marker}
@pytest.mark.parametrize("number", range({count}))
def test_step(model, number):
    model(torch.randn(2, 64, 64)).sum().backward()
    model.zero_grad()
"""
BUDGET = "@pytest.mark.memory_budget(peak='1 GiB')"
LIMIT = "@pytest.mark.limit_memory('1 GB')"

UNMARKED = "an unmarked test: attnprof"
COSTS = {
    UNMARKED: ("unmarked, attnprof", "unmarked, no plugin", "test"),
    "an unmarked test: attnprof --attnprof": (
        "unmarked, attnprof --attnprof", "unmarked, no plugin", "test",
    ),
    "an unmarked test: pytest-memray": (
        "unmarked, pytest-memray", "unmarked, no plugin (peer)", "test",
    ),
    "an unmarked test: pytest-memray --memray": (
        "unmarked, pytest-memray --memray", "unmarked, no plugin (peer)", "test",
    ),
    "a marked test: attnprof": ("marked, attnprof", "marked, no plugin", "test"),
    "a marked test: pytest-memray --memray": (
        "marked, pytest-memray --memray", "marked, no plugin (peer)", "test",
    ),
    "a marked training step: attnprof": (
        "training step, attnprof", "training step, no plugin", "test",
    ),
    "the first marked test: attnprof": ("marked, attnprof", "marked, no plugin", "first"),
}  # fmt: skip
"""Which session is compared with which, by which of its values."""


@dataclass(frozen=True)
class Session:
    """One way to run pytest on one file of tests."""

    name: str
    file: str
    python: str
    arguments: tuple[str, ...] = ()


def write_tests(folder: Path) -> None:
    """Write the tests that all sessions run."""
    (folder / "conftest.py").write_text(CONFTEST)
    unmarked = "\n".join(f"def test_{number}(): pass" for number in range(TESTS))
    (folder / "test_unmarked.py").write_text(unmarked)
    for name, text, marker in (
        ("plain", MARKED_TEST, ""),
        ("budget", MARKED_TEST, BUDGET),
        ("limit", MARKED_TEST, LIMIT),
        ("step", STEP_TEST, ""),
        ("step_budget", STEP_TEST, BUDGET),
    ):
        (folder / f"test_{name}.py").write_text(text.format(marker=marker, count=MARKED))


def list_sessions(peer: str | None) -> list[Session]:
    """Return all sessions of a round."""
    here, ours = sys.executable, ("-p", "attnprof.pytest_plugin")
    sessions = [
        Session("unmarked, no plugin", "test_unmarked.py", here),
        Session("unmarked, attnprof", "test_unmarked.py", here, ours),
        Session("unmarked, attnprof --attnprof", "test_unmarked.py", here, (*ours, "--attnprof")),
        Session("marked, no plugin", "test_plain.py", here),
        Session("marked, attnprof", "test_budget.py", here, ours),
        Session("training step, no plugin", "test_step.py", here),
        Session("training step, attnprof", "test_step_budget.py", here, ours),
    ]
    if peer is not None:
        theirs = ("-p", "pytest_memray.plugin")
        sessions += [
            Session("unmarked, no plugin (peer)", "test_unmarked.py", peer),
            Session("unmarked, pytest-memray", "test_unmarked.py", peer, theirs),
            Session("unmarked, pytest-memray --memray", "test_unmarked.py", peer,
                    (*theirs, "--memray")),
            Session("marked, no plugin (peer)", "test_plain.py", peer),
            Session("marked, pytest-memray --memray", "test_limit.py", peer,
                    (*theirs, "--memray")),
        ]  # fmt: skip
    return sessions


def run_session(session: Session, folder: Path) -> dict[str, float]:
    """Run one session; return ms: of a test with its share of collection, and of the first."""
    times = folder / "seconds.json"
    finished = subprocess.run(
        [session.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *session.arguments,
         session.file],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1",
             "SECONDS": str(times),
             "PYTHONPATH": str(ROOT) if session.python == sys.executable else ""},
    )  # fmt: skip
    if finished.returncode:
        raise SystemExit(f"{session.name} failed:\n{finished.stdout}{finished.stderr}")
    seconds: dict[str, list[float]] = json.loads(times.read_text())
    tests = seconds["tests"]
    collection = sum(seconds["collection"]) / len(tests)
    return {
        "test": 1e3 * (statistics.median(tests) + collection),
        "first": 1e3 * tests[0],
    }


def measure(sessions: Sequence[Session], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run all sessions in every round, every other one backwards."""
    found: dict[str, list[dict[str, float]]] = {session.name: [] for session in sessions}
    with tempfile.TemporaryDirectory(prefix="attnprof-benchmark-") as scratch:
        folder = Path(scratch)
        write_tests(folder)
        for number in range(rounds + 1):  # the first warms the caches of files, uncounted
            for session in sessions if number % 2 == 0 else reversed(sessions):
                result = run_session(session, folder)
                if number:
                    found[session.name].append(result)
    return found


def make_peer(folder: Path) -> str | None:
    """Return a Python that has pytest-memray and this pytest; None if it cannot be had."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    wanted = (MEMRAY, f"pytest=={version('pytest')}")
    install = [str(python), "-m", "pip", "install", "--quiet", *wanted]
    return None if subprocess.run(install, check=False).returncode else str(python)


def show(console: Console, found: Mapping[str, list[dict[str, float]]]) -> list[Target]:
    """Print what plugins add to a test, and return the targets."""
    table = make_table("Added by the plugin", ["what", "ms", "× no plugin"])
    targets = []
    for what, (name, base, value) in COSTS.items():
        if name not in found:
            continue
        with_plugin, without = ([r[value] for r in found[n]] for n in (name, base))
        added = statistics.median(a - b for a, b in zip(with_plugin, without, strict=True))
        table.add_row(what, f"{added:.3f}", f"{pair_ratio(with_plugin, without):.2f}")
        if what == UNMARKED:
            targets.append(Target(f"{what}, ms", added, MAX_UNMARKED_MS))
    console.print(table)
    return targets


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=5)
    parser.add_argument("--peer", type=Path, metavar="DIR", help="keep pytest-memray there")
    options = parser.parse_args()
    console = Console(width=110)
    show_machine(console)
    with tempfile.TemporaryDirectory(prefix="attnprof-peer-") as scratch:
        peer = make_peer(options.peer or Path(scratch) / "venv")
        if peer is None:
            console.print("pytest-memray cannot be installed: it is left out")
        sessions = list_sessions(peer)
        found = measure(sessions, options.rounds)
    table = make_table("One test, its share of collection included", ["session", "ms"])
    for name, rounds in found.items():
        table.add_row(name, f"{statistics.median(r['test'] for r in rounds):.3f}")
    console.print(table)
    targets = show(console, found)
    show_targets(console, targets)
    results: dict[str, Any] = {"sessions": found}
    save_results(options.json, "pytest_plugin", results, targets)


if __name__ == "__main__":
    main()
