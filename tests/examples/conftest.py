"""Where the examples are, and how they are loaded and run."""

import runpy
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run small ops in one thread: two would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load_route(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a file of examples/escape_routes as its neighbours import it."""
    monkeypatch.syspath_prepend(EXAMPLES / "escape_routes")
    return import_module


@pytest.fixture
def run_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Run an example as ``python examples/FILE ARGUMENTS`` does; return what it printed.

    In this process: to start an interpreter that imports torch and transformers for every example
    would take longer than to run them all.
    """

    def run(file: str, *arguments: str) -> str:
        path = EXAMPLES / file
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        monkeypatch.syspath_prepend(path.parent)
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run
