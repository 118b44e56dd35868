"""Keep the runs of a test where a command can open them, and their pages."""

import os
import re
import shlex
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from attnprof.growth import Growth
from attnprof.pytest_plugin.measure import Measured
from attnprof.pytest_plugin.verdicts import Breach
from attnprof.run import Run
from attnprof.store.lengths import Length, StoredGrowth, run_directory, write_growth

_BODY = "body"
"""Where the test's own run is kept, beside the runs of a marker's ``make_step``."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The runs of one test, on disk."""

    root: Path
    """A run, or if there are runs of several lengths, what `Growth.load` opens."""
    of_runs: dict[Path, Path]
    """Where each run went."""

    def find(self, run: Run | None) -> Path:
        """Return where a run is kept; the runs of all lengths for None."""
        return self.root if run is None else self.of_runs[run.path]


def keep_runs(item: pytest.Item, measured: Measured, *, is_failed: bool) -> Kept | None:
    """Copy a test's runs to where they stay, and write its page if pages are wanted.

    With ``--attnprof-html`` that is below its directory. Without, the runs of a failed test are
    kept in pytest's cache until the test fails again. None if nothing was kept, or could be: a
    broken limit is still to be told where nothing can be written.
    """
    folder: str | None = item.config.getoption("attnprof_html")
    cache: pytest.Cache | None = getattr(item.config, "cache", None)
    name = _name_files(item.nodeid)
    try:
        if folder:
            kept = _copy_runs(measured, Path(folder) / "runs" / name, item.nodeid)
            _write_page(kept, measured, Path(folder) / f"{name}.html", item.nodeid)
            return kept
        if is_failed and cache is not None:
            return _copy_runs(measured, cache.mkdir("attnprof") / name, item.nodeid)
    except OSError:
        if not is_failed:
            raise
    return None


def describe_more(item: pytest.Item, breaches: Sequence[Breach], kept: Kept | None) -> list[str]:
    """Return the commands that show more of what broke."""
    if kept is None:
        path = os.path.relpath(item.path, item.config.invocation_params.dir)
        test = shlex.quote("::".join([path, *item.nodeid.split("::")[1:]]))
        return [f"To see every byte: pytest {test} --attnprof-html DIR"]
    directories = dict.fromkeys(kept.find(breach.run) for breach in breaches)
    here = item.config.invocation_params.dir
    return [
        f"To see every byte: attnprof report {shlex.quote(os.path.relpath(directory, here))}"
        for directory in directories
    ]


def _name_files(test: str) -> str:
    """Return a file name for a test that no other test has."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", test).strip("-")[-100:]
    return f"{readable}-{zlib.crc32(test.encode()):08x}"


def _copy_runs(measured: Measured, root: Path, test: str) -> Kept:
    shutil.rmtree(root, ignore_errors=True)
    if not measured.by_length:
        (run,) = measured.runs
        shutil.copytree(run.path, root)
        return Kept(root, {run.path: root})
    lengths = [_describe_length(run) for run in measured.by_length]
    of_runs = {
        run.path: run_directory(root, length.source, length.seq_len)
        for run, length in zip(measured.by_length, lengths, strict=True)
    }
    for run in measured.runs:
        of_runs.setdefault(run.path, root / _BODY)
    for old, new in of_runs.items():
        shutil.copytree(old, new)
    placed = [
        Length(length.seq_len, length.source, length.status, path=of_runs[run.path])
        for run, length in zip(measured.by_length, lengths, strict=True)
    ]
    write_growth(root, StoredGrowth(test, {}, tuple(placed)))
    return Kept(root, of_runs)


def _describe_length(run: Run) -> Length:
    workload = run.info["workload"]
    return Length(workload["seq_len"], workload["source"], run.status.value)


def _write_page(kept: Kept, measured: Measured, path: Path, test: str) -> None:
    from attnprof.report.growth_gather import summarise_growth
    from attnprof.report.growth_html import render_growth_html
    from attnprof.report.html import render_html
    from attnprof.report.summary import summarise

    if measured.by_length:
        page = render_growth_html(summarise_growth(Growth.load(kept.root), name=test))
    else:
        page = render_html(summarise(Run.load(kept.root)))
    path.write_text(page, encoding="utf-8")
