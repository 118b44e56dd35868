"""Hold a test to its markers: measure its body, judge it, and say what broke and who held it."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import TestCase

import pytest

from attnprof.errors import BudgetExceeded
from attnprof.growth import Growth
from attnprof.pytest_plugin.baselines import describe_changes, pick_environment
from attnprof.pytest_plugin.growth import describe_laws, judge_growth
from attnprof.pytest_plugin.held import Held
from attnprof.pytest_plugin.keep import describe_more, keep_runs
from attnprof.pytest_plugin.marks import GROWTH, Checks
from attnprof.pytest_plugin.measure import (
    MEASURED,
    Measured,
    complete,
    keeping_house,
    tracing,
    watch,
)
from attnprof.pytest_plugin.session import Reference
from attnprof.pytest_plugin.verdicts import (
    Breach,
    breach_limit,
    find_doubts,
    judge_budget,
    judge_scores,
)
from attnprof.units import format_bytes

_COMPARED = "--attnprof-compare-fail"
_PROPERTY = "attnprof_"


class LimitBroken(
    pytest.fail.Exception,  # type: ignore[name-defined,misc]  # pytest has no other public name
    BudgetExceeded,
):
    """A marked test broke a limit; pytest reports its message alone, without a traceback."""

    __module__ = "builtins"  # in reports the name stands alone, as those of pytest's own failures

    def __init__(self, message: str) -> None:
        super().__init__(message, False)


@contextmanager
def enforcing(item: pytest.Item, checks: Checks, reference: Reference | None) -> Iterator[None]:
    """Measure and judge the body of a test that runs inside.

    Raises:
        LimitBroken: The body ran to its end and broke a limit.
    """
    judge = _Judge(item, checks, reference)
    with keeping_house() as home:
        if isinstance(item, pytest.Function):
            with _watching(item, checks, home, judge):
                yield
        else:  # a doctest, or another plugin's kind of test
            with tracing(home) as tracer:
                yield
            judge(complete((tracer.run,), checks, home))


@contextmanager
def _watching(item: pytest.Function, checks: Checks, home: Path, judge: "_Judge") -> Iterator[None]:
    """Put what measures a test's body in its place while the test runs."""
    body = item.obj
    item.obj = watched = watch(body, checks, home, judge)
    instance = getattr(body, "__self__", None)
    is_unittest = isinstance(instance, TestCase)
    if is_unittest and inspect.iscoroutinefunction(body):
        setattr(instance, item.name, watched)  # where unittest looks it up; pytest does not say so
    try:
        yield
    finally:
        item.obj = body
    if not judge.is_done and not is_unittest:  # unittest skips without an exception
        pytest.fail(
            "the test's memory markers were not checked: what ran it did not call item.obj",
            pytrace=False,
        )


class _Judge:
    """Judges what a test measured, once its body has ended."""

    def __init__(self, item: pytest.Item, checks: Checks, reference: Reference | None) -> None:
        self._item = item
        self._checks = checks
        self._reference = reference
        self.is_done = False

    def __call__(self, measured: Measured) -> None:
        self.is_done = True
        held = [Held(run) for run in measured.every_run]
        growth = Growth.from_runs(measured.by_length) if self._checks.laws else None
        if growth is not None and growth.points.is_empty():
            pytest.fail(f"{GROWTH}: no tensor was used at any length", pytrace=False)
        self._note(growth, held[-1])
        breaches = list(self._find_breaches(growth, held))
        kept = keep_runs(self._item, measured, is_failed=bool(breaches))
        if breaches:
            more = describe_more(self._item, breaches, kept)
            raise LimitBroken("\n".join([*_write(breaches), *more]))
        for doubt in dict.fromkeys(d for run in measured.every_run for d in find_doubts(run)):
            self._item.warn(pytest.PytestWarning(f"{self._item.nodeid}: {doubt}"))

    def _note(self, growth: Growth | None, held: Held) -> None:
        """Put down what was measured for reports; with several lengths, of the longest."""
        laws = {} if growth is None else describe_laws(growth, self._checks.laws)
        self._item.stash[MEASURED] = {
            "test": name_test(self._item),
            "bytes": held.values,
            "laws": laws,
            "environment": pick_environment(held.run.info),
        }
        others = [(k, v) for k, v in self._item.user_properties if not k.startswith(_PROPERTY)]
        sizes = ((f"{_PROPERTY}{name}_bytes", size) for name, size in held.values.items())
        grown = ((f"{_PROPERTY}{category}_growth", law) for category, law in laws.items())
        self._item.user_properties[:] = [*others, *sizes, *grown]

    def _find_breaches(self, growth: Growth | None, held: Sequence[Held]) -> Iterator[Breach]:
        for one in held:
            found = list(self._judge_run(one))
            yield from found
            if found:
                break  # longer sequences break the same limits, only further
        if growth is not None:
            yield from judge_growth(growth, held[-1].run, self._checks.laws)
        if self._reference is not None:
            yield from _judge_reference(held[-1], name_test(self._item), self._reference)

    def _judge_run(self, held: Held) -> Iterator[Breach]:
        seq_len = held.run.info.get("workload", {}).get("seq_len")
        where = "" if seq_len is None else f"at seq_len {seq_len:,}, "
        if self._checks.budget is not None:
            for breach in judge_budget(held, self._checks.budget):
                yield replace(breach, what=where + breach.what)
        if self._checks.forbids_scores:
            for breach in judge_scores(held.run):
                yield replace(breach, what=where + breach.what)


def _judge_reference(held: Held, test: str, reference: Reference) -> Iterator[Breach]:
    """Yield every value that exceeds its baseline by more than its threshold."""
    before = reference.baseline.tests.get(test)
    if before is None:
        return
    now = pick_environment(held.run.info)
    device = {"device": reference.baseline.environment.get("device", "")}
    changes = describe_changes(
        reference.baseline.environment, now | device if now["device"] == "cpu" else now
    )
    note = (f"the baseline was made elsewhere: {changes}",) if changes else ()
    for threshold in reference.thresholds:
        earlier = before.sizes.get(threshold.name, 0)
        limit = threshold.limit(earlier)
        if held.measure(threshold.name) > limit:
            rule = f"baseline {format_bytes(earlier)} and {threshold} more"
            breach = breach_limit(held, _COMPARED, threshold.name, limit, rule)
            yield replace(breach, details=(*note, *breach.details))


def name_test(item: pytest.Item) -> str:
    """Return a test's id as it is without xdist, which appends the name of a group to some."""
    groups = {
        str(mark.args[0] if mark.args else mark.kwargs.get("name", "default"))
        for mark in item.iter_markers("xdist_group")
    }
    return item.nodeid.removesuffix("@" + "_".join(sorted(groups)))


def _write(breaches: Sequence[Breach]) -> Iterator[str]:
    for breach in breaches:
        yield f"{breach.what} [{breach.marker}]"
        yield from (f"    {line}" for line in breach.details)
