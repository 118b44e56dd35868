"""Runs of pytest inside a test, in the same process where that is enough."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import plugin_models
import pytest
from plugin_models import Run

import attnprof
import attnprof.pytest_plugin.enforce  # what an inner run imports first, it takes with it
from attnprof.report.growth_gather import summarise_growth
from attnprof.report.growth_html import render_growth_html
from attnprof.report.html import render_html
from attnprof.report.summary import summarise


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """Import what an inner run would, which forgets its imports: torch bears only one."""
    growth = attnprof.sweep(plugin_models.make_step, seq_lens=[8, 16, 32], dry_run=True)
    growth.fit("softmax")
    render_growth_html(summarise_growth(growth, name="imported"))
    with attnprof.trace() as tracer:
        plugin_models.train(plugin_models.make_gpt2("sdpa", dropout=0.1), 8)
    render_html(summarise(tracer.run))
    tracer.run.simulate_allocator()


@pytest.fixture
def quick(imported: None) -> Iterator[None]:
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
def run(pytester: pytest.Pytester, options: None) -> Run:
    """Run pytest in this process, in the directory of ``pytester``."""
    return pytester.runpytest_inprocess


@pytest.fixture
def run_apart(pytester: pytest.Pytester, options: None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest in a process of its own, which finds `plugin_models`."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return pytester.runpytest_subprocess
