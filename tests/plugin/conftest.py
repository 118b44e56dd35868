"""Runs of pytest inside a test, in the same process where that is enough."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from plugin_models import Run


class KeptImports:
    """What runs inside a test have imported, which pytest forgets: torch bears only one import."""

    def __init__(self, tests: Path) -> None:
        self._tests = tests
        self._modules: dict[str, ModuleType] = {}

    def pytest_unconfigure(self) -> None:
        """Remember the modules of a run, all but its tests, before they are forgotten."""
        for name, module in sys.modules.items():
            file = vars(module).get("__file__") or ""  # not getattr: some import on being asked
            if not Path(file).is_relative_to(self._tests):
                self._modules[name] = module

    def put_back(self) -> None:
        """Make them known again."""
        sys.modules.update(self._modules)


@pytest.fixture(autouse=True)
def kept_imports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeptImports]:
    """Keep imports beyond the end of ``pytester``, which forgets them a second time."""
    kept = KeptImports(tmp_path_factory.getbasetemp())
    yield kept
    kept.put_back()


@pytest.fixture
def quick() -> Iterator[None]:
    """Spare the collector, which pytest calls often, all that torch has made on import."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def options(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave plugins out of inner runs that warn when they are loaded."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:dash -p no:asyncio")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(pytester: pytest.Pytester, options: None, kept_imports: KeptImports) -> Run:
    """Run pytest in this process, in the directory of ``pytester``."""

    def run_here(*arguments: str, **settings: bool) -> pytest.RunResult:
        try:
            return pytester.runpytest_inprocess(*arguments, plugins=[kept_imports], **settings)
        finally:
            kept_imports.put_back()

    return run_here


@pytest.fixture
def run_apart(pytester: pytest.Pytester, options: None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a process of its own, which finds `plugin_models`."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return pytester.runpytest_subprocess
