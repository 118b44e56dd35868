"""The pytest plugin: memory budgets and laws of growth, as markers of tests.

Loaded by every pytest run of an environment that has attnprof installed, so it imports nothing
heavy before a test with a marker, or with the fixture, runs.
"""

from collections.abc import Callable, Generator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attnprof.pytest_plugin.marks import GROWTH, HELP, SEQ_LEN, SetByMarker, read_checks
from attnprof.pytest_plugin.measure import MEASURED

if TYPE_CHECKING:
    from attnprof.capture.tracer import Tracer
    from attnprof.pytest_plugin.session import Reference

_REFERENCE: "pytest.StashKey[Reference | None]" = pytest.StashKey()
_SESSION = "attnprof-session"
_USAGE_ERROR = "attnprof_usage_error"
"""In what an xdist worker tells the controller."""
_OPTIONS = ("save", "compare", "compare_fail", "json", "html")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("attnprof", "memory budgets (attnprof)")
    group.addoption(
        "--attnprof", action="store_true", help="Print what every marked test measured."
    )
    group.addoption(
        "--attnprof-save",
        metavar="NAME",
        help="Keep what was measured as a baseline: a JSON file to commit.",
    )
    group.addoption(
        "--attnprof-compare", metavar="NAME", help="Show what changed since a baseline."
    )
    group.addoption(
        "--attnprof-compare-fail",
        metavar="LIMIT:MORE,...",
        help="Fail a test if a value is that much above the baseline: peak:5%%,softmax:0.",
    )
    group.addoption(
        "--attnprof-json", metavar="FILE", help="Write what was measured to a JSON file."
    )
    group.addoption(
        "--attnprof-html",
        metavar="DIR",
        help="Keep the run of every marked test, with a page for each.",
    )
    parser.addini(
        "attnprof_baselines",
        "The directory of the baselines, relative to the root directory.",
        default="attnprof-baselines",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known, and collect results where the session is reported."""
    for line in HELP:
        config.addinivalue_line("markers", line)
    config.stash[_REFERENCE] = None
    given = [name for name in _OPTIONS if config.getoption(f"attnprof_{name}") is not None]
    if not given and not config.getoption("attnprof"):
        return
    from attnprof.pytest_plugin.session import ResultSession, read_reference, settle_paths

    settle_paths(config)
    config.stash[_REFERENCE] = reference = read_reference(config)
    if not hasattr(config, "workerinput"):  # xdist's workers only run tests
        config.pluginmanager.register(ResultSession(config, reference), _SESSION)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let a test with a law of growth take ``seq_len``; its lengths are run within the one test."""
    mark = metafunc.definition.get_closest_marker(GROWTH)
    if mark is None or "make_step" in mark.kwargs or SEQ_LEN not in metafunc.fixturenames:
        return
    if not any(_sets_seq_len(m) for m in metafunc.definition.iter_markers("parametrize")):
        metafunc.parametrize(SEQ_LEN, [SetByMarker()], ids=["growth"])


def _sets_seq_len(mark: pytest.Mark) -> bool:
    names = mark.args[0] if mark.args else mark.kwargs.get("argnames", "")
    return SEQ_LEN in (names.replace(" ", "").split(",") if isinstance(names, str) else names)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Read every test's markers, so that a wrong one is found before anything runs."""
    try:
        for item in items:
            read_checks(item)
    except pytest.UsageError as error:
        told: dict[str, Any] = getattr(config, "workeroutput", {})
        told[_USAGE_ERROR] = str(error)
        raise


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Pass on what an xdist worker found wrong with a marker, which xdist calls a crash."""
    message = getattr(node, "workeroutput", {}).get(_USAGE_ERROR)
    if message is not None:
        raise pytest.UsageError(message)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Trace the body of a marked test: after its fixtures are set up, before they go."""
    try:
        checks = read_checks(item)  # again: a fixture may have added a marker
    except pytest.UsageError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    if checks is None:
        return (yield)
    from attnprof.pytest_plugin.enforce import enforcing

    if MEASURED in item.stash:
        del item.stash[MEASURED]  # of an earlier try of the same test
    with enforcing(item, checks, item.config.stash[_REFERENCE]):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send what a test measured along with its report, from an xdist worker too."""
    report = yield
    if call.when == "call" and MEASURED in item.stash:
        report.attnprof = item.stash[MEASURED]  # type: ignore[attr-defined]  # reports take extras
    return report


@pytest.fixture
def attnprof_trace(tmp_path: Path) -> "Callable[[], Tracer]":
    """Trace a part of a test; the run is kept in the test's temporary directory.

    ::

        def test_step(attnprof_trace):
            with attnprof_trace() as tracer:
                step()
            assert tracer.run.peak().by_category().get("softmax", 0) < 2**20
    """
    numbers = count()

    def begin() -> "Tracer":
        from attnprof.capture.tracer import trace

        return trace(tmp_path / f"attnprof-{next(numbers)}", samples_per_second=0)

    return begin
