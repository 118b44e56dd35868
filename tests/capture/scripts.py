"""Programs of their own, for endings that take the interpreter with them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

PRELUDE = """
import os, signal, sys, threading
import torch
import attnprof
from torch import nn

torch.set_num_threads(1)
directory = sys.argv[1]
model = nn.Sequential(nn.Linear(4, 4), nn.GELU())

def step():
    model(torch.ones(2, 4)).sum().backward()
"""


def start_script(code: str, directory: Path) -> subprocess.Popen[str]:
    """Start a program with `PRELUDE` before it; it may write lines to standard output."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(code), str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program with `PRELUDE` before it to its end."""
    with start_script(code, directory) as process:
        output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def wait_for_line(process: subprocess.Popen[str], expected: str) -> None:
    """Wait until the program has written ``expected`` as a line of its own."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == expected:
            return
    assert process.stderr is not None
    raise AssertionError(f"ended without saying {expected!r}: {process.stderr.read()}")
