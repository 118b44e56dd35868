"""The pytest plugin: memory budgets and laws of growth, as markers of tests.

Loaded by every pytest run of an environment that has attnprof installed, so it imports nothing
heavy before a marker or the fixture is met.
"""

import functools
import inspect
from collections.abc import Callable, Generator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attnprof.pytest_plugin.marks import GROWTH, HELP, Checks, read_checks

if TYPE_CHECKING:
    from attnprof.capture.tracer import Tracer
    from attnprof.pytest_plugin.measure import Measured

_CHECKS = pytest.StashKey[Checks]()
_VALUES = pytest.StashKey[dict[str, int]]()
_SESSION = "attnprof-session"


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
        metavar="NAME:MORE,...",
        help="Fail if a value is that much above the baseline, such as peak:5%%,softmax:0.",
    )
    group.addoption(
        "--attnprof-json", metavar="FILE", help="Write what was measured to a JSON file."
    )
    group.addoption(
        "--attnprof-html", metavar="DIR", help="Write a report page for every marked test."
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
    options = ("save", "compare", "compare_fail", "json", "html")
    is_wanted = config.getoption("attnprof") or any(
        config.getoption(f"attnprof_{name}") for name in options
    )
    if is_wanted and not hasattr(config, "workerinput"):  # xdist's workers only run tests
        from attnprof.pytest_plugin.session import ResultSession

        config.pluginmanager.register(ResultSession(config), _SESSION)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test with a growth law its ``seq_len``; the lengths are run within the one test."""
    mark = metafunc.definition.get_closest_marker(GROWTH)
    if mark is None or "make_step" in mark.kwargs or "seq_len" not in metafunc.fixturenames:
        return
    parametrised = [m for m in metafunc.definition.iter_markers("parametrize") if _names(m)]
    if not parametrised:
        metafunc.parametrize("seq_len", [None], ids=["growth"])


def _names(mark: pytest.Mark) -> bool:
    names = mark.args[0] if mark.args else mark.kwargs.get("argnames", "")
    return "seq_len" in (names.replace(" ", "").split(",") if isinstance(names, str) else names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Read every test's markers, so that a wrong one is found before anything runs."""
    for item in items:
        checks = read_checks(item)
        if checks is not None:
            item.stash[_CHECKS] = checks


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Trace the body of a marked test: after its fixtures are set up, before they go."""
    checks = item.stash.get(_CHECKS, None)
    if checks is None:
        return (yield)
    test: Any = item  # a function, or a method of a unittest class: both look `obj` up when run
    original = test.obj
    test.obj = _watch(item, original, checks)
    try:
        return (yield)
    finally:
        test.obj = original


def _watch(item: pytest.Item, body: Callable[..., Any], checks: Checks) -> Callable[..., Any]:
    from attnprof.pytest_plugin.measure import measure, measure_async

    if inspect.iscoroutinefunction(body):

        @functools.wraps(body)
        async def run_async(*args: Any, **kwargs: Any) -> None:
            _judge(item, await measure_async(body, checks, args, kwargs), checks)

        return run_async

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> None:
        _judge(item, measure(body, checks, args, kwargs), checks)

    return run


def _judge(item: pytest.Item, measured: "Measured", checks: Checks) -> None:
    from attnprof.pytest_plugin.session import keep_pages
    from attnprof.pytest_plugin.verdicts import find_breaches, format_breaches, measure_all

    last = measured.runs[-1]
    item.stash[_VALUES] = values = measure_all(last)
    item.user_properties += [(f"attnprof_{name}_bytes", size) for name, size in values.items()]
    breaches = find_breaches(measured.runs, measured.by_length, checks)
    kept = keep_pages(item, last)
    if breaches:
        pytest.fail(format_breaches(breaches, kept), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send what a test measured along with its report, from an xdist worker too."""
    report = yield
    if call.when == "call" and _VALUES in item.stash:
        report.attnprof = item.stash[_VALUES]  # type: ignore[attr-defined]  # reports take extras
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
