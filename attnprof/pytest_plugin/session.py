"""The session's side of the plugin: the table, the files, and the comparison with a baseline."""

import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from attnprof.errors import CommandError
from attnprof.files import replace_file
from attnprof.pytest_plugin.baselines import (
    Baseline,
    Result,
    Threshold,
    compare,
    compare_laws,
    describe_changes,
    read_thresholds,
)
from attnprof.pytest_plugin.marks import LIMITS
from attnprof.units import format_bytes

_COLUMNS = ("peak", "attention_scores", "softmax", "saved_softmax", "kv_cache", "leaked")
_MOST_DIFFERENCES = 30
_NOTHING = "no test with a memory marker was measured"


@dataclass(frozen=True, slots=True)
class Reference:
    """The baseline that a session is compared with."""

    path: Path
    baseline: Baseline
    thresholds: tuple[Threshold, ...]
    """By how much its values may be exceeded; none to only show what changed."""


def read_reference(config: pytest.Config) -> Reference | None:
    """Return the baseline to compare with; None if none is asked for.

    Raises:
        pytest.UsageError: The options or the baseline cannot be used.
    """
    name, limits = (config.getoption(f"attnprof_{n}") for n in ("compare", "compare_fail"))
    if name is None:
        if limits is not None:
            raise pytest.UsageError(
                "--attnprof-compare-fail needs --attnprof-compare NAME, the baseline to hold to"
            )
        return None
    path = locate_baseline(config, name, "--attnprof-compare")
    try:
        thresholds = () if limits is None else read_thresholds(limits, LIMITS)
    except ValueError as error:
        raise pytest.UsageError(f"--attnprof-compare-fail: {error}") from None
    try:
        return Reference(path, Baseline.read(path), thresholds)
    except FileNotFoundError:
        raise pytest.UsageError(
            f"--attnprof-compare: there is no baseline {path}; make one with --attnprof-save {name}"
        ) from None
    except ValueError as error:
        raise pytest.UsageError(f"--attnprof-compare: {error}") from None


def locate_baseline(config: pytest.Config, name: str, option: str) -> Path:
    """Return the file of a baseline: a name in the configured directory, or a path.

    Raises:
        pytest.UsageError: The name is empty.
    """
    if not name.strip():
        raise pytest.UsageError(f"{option} needs a name, such as main")
    if name.endswith(".json") or os.sep in name:
        return config.invocation_params.dir / name
    folder: str = config.getini("attnprof_baselines")
    return config.rootpath / folder / f"{name}.json"


def settle_paths(config: pytest.Config) -> None:
    """Make the paths of files absolute, before a test, or a worker, is in another directory.

    Raises:
        pytest.UsageError: A path is empty, or the directory of pages cannot be made.
    """
    for name, what in (("json", "file"), ("html", "directory")):
        given = config.getoption(f"attnprof_{name}")
        if given is None:
            continue
        if not given.strip():
            raise pytest.UsageError(f"--attnprof-{name} needs a {what}")
        path = config.invocation_params.dir / given
        setattr(config.option, f"attnprof_{name}", str(path))
        if name == "html" and not config.getoption("collectonly"):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise pytest.UsageError(
                    f"--attnprof-html: cannot make the directory {path}: {error.strerror or error}"
                ) from None


class ResultSession:
    """Collects what tests measured, from all workers, and reports it at the end."""

    def __init__(self, config: pytest.Config, reference: Reference | None) -> None:
        """Read the options.

        Raises:
            pytest.UsageError: The baseline to save to is there and cannot be read.
        """
        self._config = config
        self._reference = reference
        self._environment: dict[str, str] = {}
        self._results: dict[str, Result] = {}
        self._lines: list[tuple[str, dict[str, bool]]] = []
        self._save_path: Path | None = None
        self._earlier: Baseline | None = None
        name = config.getoption("attnprof_save")
        if name is not None:
            self._save_path = locate_baseline(config, name, "--attnprof-save")
            self._earlier = _read_earlier(self._save_path)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test measured from its report."""
        measured = getattr(report, "attnprof", None)
        if measured is not None:
            self._results[measured["test"]] = Result(measured["bytes"], measured["laws"])
            device = {"device": self._environment.get("device", "cpu")}
            own = measured["environment"]
            self._environment = own if own["device"] != "cpu" else own | device

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """Write the files and compare; a file that cannot be written fails the session."""
        if not self._config.getoption("collectonly"):
            is_written = self._finish()
            if not is_written and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def _finish(self) -> bool:
        """Return whether all files that were asked for are written."""
        now = Baseline(self._environment, self._results)
        is_written = True
        if self._reference is not None:
            self._compare(self._reference, now)
        path = self._config.getoption("attnprof_json")
        if path is not None:
            is_written &= self._write(Path(path), now)
        if self._save_path is not None:
            is_written &= self._save(self._save_path, now)
        pages = self._config.getoption("attnprof_html")
        if pages is not None and now.tests:
            self._say(f"wrote {pages}: {_count(len(now.tests), 'page')}, and the runs they show")
        return is_written

    def _save(self, path: Path, now: Baseline) -> bool:
        """Write a baseline; tests of an earlier one that did not run keep their values."""
        if not now.tests:
            self._say(f"{path} was left as it is: {_NOTHING}")
            return True
        if self._earlier is None:
            return self._write(path, now)
        left = sorted(self._earlier.tests.keys() - now.tests.keys())
        changes = describe_changes(self._earlier.environment, now.environment)
        if left and changes:
            self._say(
                f"not saved: {path} was made elsewhere ({changes}), and {_name_some(left)} in it "
                "did not run now, so it would mix the two; run all, or delete the file first",
                red=True,
            )
            return False
        if left:
            self._say(
                f"kept in {path}: {_name_some(left)} that did not run now; to forget what is "
                "gone, delete the file and save again"
            )
        return self._write(path, self._earlier.merge(now))

    def _write(self, path: Path, results: Baseline) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, results.to_json())
        except OSError as error:
            self._say(f"cannot write {path}: {error.strerror or error}", red=True)
            return False
        except CommandError as error:
            self._say(str(error), red=True)
            return False
        self._say(f"wrote {path}: {_count(len(results.tests), 'test')}")
        return True

    def _compare(self, reference: Reference, now: Baseline) -> None:
        before = reference.baseline
        if now.tests and (elsewhere := describe_changes(before.environment, now.environment)):
            self._say(
                "the baseline was made elsewhere, and bytes may differ for that alone: "
                f"{elsewhere}",
                yellow=True,
            )
        changes = [*compare_laws(before, now), *map(str, compare(before, now))]
        self._say_differences(changes, reference.path)
        fresh = sorted(now.tests.keys() - before.tests.keys())
        if fresh:
            self._say(f"not in the baseline: {_name_some(fresh)}; add with --attnprof-save")
        left = sorted(before.tests.keys() - now.tests.keys())
        if left:
            self._say(f"in the baseline, but not measured now: {_name_some(left)}")

    def _say_differences(self, differences: list[str], path: Path) -> None:
        count = _count(len(differences), "value differs", "values differ")
        self._say(f"{count} from the baseline {path}")
        for difference in differences[:_MOST_DIFFERENCES]:
            self._say(f"  {difference}")
        more = len(differences) - _MOST_DIFFERENCES
        if more > 0:
            self._say(f"  and {more} more; --attnprof-json FILE has all values")

    def _say(self, line: str, **style: bool) -> None:
        self._lines.append((line, style))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table, what changed, and what was written."""
        is_asked = self._config.getoption("attnprof") and not self._config.getoption("collectonly")
        table = tabulate(self._results) if is_asked else []
        if not table and not self._lines:
            return
        terminalreporter.write_sep("=", "memory (attnprof)")
        for line in table:
            terminalreporter.write_line(line)
        for line, style in self._lines:
            terminalreporter.write_line(line, **style)


def _read_earlier(path: Path) -> Baseline | None:
    try:
        return Baseline.read(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise pytest.UsageError(f"--attnprof-save: {error}") from None


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _name_some(tests: list[str]) -> str:
    also = "" if len(tests) == 1 else f" and {len(tests) - 1} more"
    return _count(len(tests), "test") + f" ({tests[0]}{also})"


def tabulate(results: Mapping[str, Result]) -> list[str]:
    """Return the lines of a table with a row per test."""
    if not results:
        return [_NOTHING]
    has_laws = any(result.laws for result in results.values())
    head = ["", *(name.replace("_", " ") for name in _COLUMNS), *(["growth"] if has_laws else [])]
    rows = [head]
    for test, result in sorted(results.items()):
        sizes = (result.sizes.get(name, 0) for name in _COLUMNS)
        laws = ", ".join(f"{category} {law}" for category, law in sorted(result.laws.items()))
        cells = [format_bytes(size) if size else "-" for size in sizes]
        rows.append([test, *cells, *([laws] if has_laws else [])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(_COLUMNS) + 1
    return [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
