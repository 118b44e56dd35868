"""The session's side of the plugin: the table, the files, and the comparison with a baseline."""

import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from attnprof.pytest_plugin.marks import LIMITS
from attnprof.pytest_plugin.results import (
    Difference,
    Results,
    Threshold,
    Values,
    compare,
    describe_changes,
    describe_environment,
    find_regressions,
    read_thresholds,
)
from attnprof.units import format_bytes

if TYPE_CHECKING:
    from attnprof.run import Run

_COLUMNS = ("peak", "attention_scores", "softmax", "saved_softmax", "kv_cache", "leaked")


class ResultSession:
    """Collects what tests measured, from all workers, and reports it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        """Read the options.

        Raises:
            pytest.UsageError: One of them cannot be used.
        """
        self._config = config
        self._values: dict[str, Values] = {}
        self._differences: list[Difference] | None = None
        self._regressions: list[tuple[Difference, Threshold]] = []
        self._said: list[str] = []
        fail = config.getoption("attnprof_compare_fail")
        name = config.getoption("attnprof_compare")
        if fail and not name:
            raise pytest.UsageError(
                "--attnprof-compare-fail needs --attnprof-compare NAME, the baseline to hold to"
            )
        try:
            self._thresholds = read_thresholds(fail, LIMITS) if fail else []
            self._baseline = Results.read(self._locate(name)) if name else None
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None

    def _locate(self, name: str) -> Path:
        """Return the file of a baseline: a name in the configured directory, or a path."""
        if name.endswith(".json") or "/" in name:
            return self._config.rootpath / name
        folder: str = self._config.getini("attnprof_baselines")
        return self._config.rootpath / folder / f"{name}.json"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test measured from its report."""
        values = getattr(report, "attnprof", None)
        if values is not None:
            self._values[report.nodeid] = values

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """Write the files, compare, and fail the session where that was asked for."""
        now = Results(describe_environment(), dict(sorted(self._values.items())))
        option = self._config.getoption
        if option("attnprof_json"):
            self._write(Path(option("attnprof_json")), now)
        if option("attnprof_save"):
            self._write(self._locate(option("attnprof_save")), now)
        if self._baseline is not None:
            self._compare(self._baseline, now)
        if self._regressions and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def _write(self, path: Path, results: Results) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(results.to_json(), encoding="utf-8")
        except OSError as error:
            self._said.append(f"cannot write {path}: {error.strerror or error}")
        else:
            self._said.append(f"wrote {path}: {len(results.tests)} tests")

    def _compare(self, before: Results, now: Results) -> None:
        changes = describe_changes(before.environment, now.environment)
        if changes:
            self._said.append(
                f"the baseline was made elsewhere, so bytes may differ for that reason: {changes}"
            )
        self._differences = compare(before, now)
        self._regressions = list(find_regressions(self._differences, self._thresholds))
        fresh = [test for test in now.tests if test not in before.tests]
        if fresh:
            self._said.append(
                f"{len(fresh)} tests are not in the baseline, {fresh[0]} among them; add them "
                "with --attnprof-save"
            )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table, what changed, and what was written."""
        write = terminalreporter.write_line
        terminalreporter.write_sep("=", "memory (attnprof)")
        if self._config.getoption("attnprof"):
            for line in _tabulate(self._values):
                write(line)
        if self._differences is not None:
            write(f"{len(self._differences)} values differ from the baseline")
            for difference in self._differences:
                write(f"  {difference}")
        for difference, threshold in self._regressions:
            write(f"FAILED {difference}; {threshold} more is allowed", red=True)
        for line in self._said:
            write(line)


def _tabulate(tests: dict[str, Values]) -> list[str]:
    if not tests:
        return ["no test with a memory marker ran"]
    rows = [("", *(name.replace("_", " ") for name in _COLUMNS))]
    for test, values in sorted(tests.items()):
        sizes = (values.get(name, 0) for name in _COLUMNS)
        rows.append((test, *(format_bytes(size) if size else "-" for size in sizes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


def keep_pages(item: pytest.Item, run: "Run") -> Path | None:
    """Write a test's run and its report page where the session asks for them.

    Returns:
        The directory of the run, which ``attnprof report`` opens; None if none was asked for.
    """
    folder = item.config.getoption("attnprof_html")
    if not folder:
        return None
    from attnprof.report.html import render_html
    from attnprof.report.summary import summarise

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", item.nodeid).strip("-")[-150:]
    kept = Path(folder) / f"{name}.run"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(run.path, kept)
    page = render_html(summarise(run))
    (Path(folder) / f"{name}.html").write_text(page, encoding="utf-8")
    return kept
