"""`sweep`: one workload at many sequence lengths, measured, dry, or both."""

import gc
import operator
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, SupportsIndex, TextIO

import torch

from attnprof.analysis.wall import Probe, count_needed_bytes
from attnprof.capture.dry_run import dry_run as dry_run_once
from attnprof.capture.endings import status_of
from attnprof.capture.isolated import check_importable, describe_error, record_isolated
from attnprof.capture.sweep_journal import FINISHED, SweepJournal
from attnprof.capture.workload import (
    MakeStep,
    check_workload,
    record_workload,
)
from attnprof.errors import DryRunError
from attnprof.growth import Growth
from attnprof.store.lengths import (
    DRY_RUN,
    MEASURED,
    SKIPPED,
    Length,
)
from attnprof.vocabulary import Status


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """What a sweep is about to do, or has just done."""

    done: int
    """How many of its runs are over."""
    total: int
    """How many there are to make; those that were found finished are not counted."""
    seq_len: int
    source: str
    """``"measured"`` or ``"dry_run"``."""
    status: str | None
    """How the run ended; None if it is about to begin."""


ShowProgress = Callable[[SweepProgress], object]


def sweep(
    make_step: MakeStep,
    seq_lens: Iterable[SupportsIndex],
    *,
    dry_run: bool = False,
    measured: bool | None = None,
    device: str | torch.device = "cpu",
    target: str | None = None,
    directory: str | Path | None = None,
    isolate: bool = False,
    steps: int | None = None,
    progress: ShowProgress | None = None,
) -> Growth:
    """Run a workload at several sequence lengths, the shortest first, and return its growth.

    A measured length that runs out of memory is a point too: the wall lies below it. Longer ones
    are then skipped, unless each has its own process.

    Args:
        make_step: ``make_step(seq_len, device)`` builds model and inputs and returns a function
            without arguments that runs one step.
        seq_lens: The lengths n, in tokens, each once.
        dry_run: Run the lengths dry, on fake tensors: that takes no memory.
        measured: Run them for real; without it, if they are not run dry.
        device: The device handed to ``make_step``, as text, in measured runs.
        target: Whose memory dry runs answer for: ``"cpu"``, ``"cuda"``, or a device such as
            ``"H200"``. Without it ``"cuda"`` if ``device`` is a CUDA device, else ``"cpu"``.
        directory: Where to keep the runs; a temporary directory without it. Lengths finished there
            by an earlier sweep of the same function, given the same arguments, are not run again.
        isolate: Give each measured length a process of its own. If it crashes or is killed, the
            sweep goes on. ``make_step`` must then be importable: no lambda or inner function.
        steps: How many steps to run per length; see
            `attnprof.capture.workload.record_workload`.
        progress: Called before and after each run; without it a terminal shows a bar.

    Raises:
        TypeError: ``make_step`` cannot be called so, or cannot be isolated; a length is not a
            whole number.
        ValueError: There are no lengths, one is under 1 or given twice, nothing is to be run, or
            there is a target and no dry run.
        CaptureError: The directory holds something else, or another sweep's runs.
        DryRunError: The workload cannot be run dry. If it is measured too, or was run dry at a
            shorter length, that is said in `Growth.lengths` instead.
        Exception: What else the workload raises, unless it is isolated. Finished lengths are kept.
    """
    lengths = _check_lengths(seq_lens)
    if target is not None and not dry_run:
        raise ValueError(
            f"only a dry run answers for another device, and target is {target!r}; run dry, too"
        )
    _, steps = check_workload(make_step, lengths[0], steps)
    device = str(device)
    plan = _Plan(
        make_step=make_step,
        measured=not dry_run if measured is None else measured,
        dry_run=dry_run,
        device=device,
        target=target or ("cuda" if device.startswith("cuda") else "cpu"),
        isolate=isolate,
        steps=steps,
        what_remains=(
            "finished lengths are lost: give a directory to keep them"
            if directory is None
            else f"finished lengths are kept in {directory}"
        ),
    )
    if not plan.sources:
        raise ValueError("nothing to sweep: measured and dry_run are both False; set one of them")
    if isolate and plan.measured:
        check_importable(make_step)
    home = _Home(directory)
    journal = SweepJournal(home.path, plan.make_step, plan.settings)
    todo = [(source, n) for source in plan.sources for n in lengths if not journal.has(source, n)]
    with _showing(progress, len(todo)) as show:
        for done, (source, n) in enumerate(todo):
            show(SweepProgress(done, len(todo), n, source, None))
            length = _run_length(plan, journal, source, n)
            journal.add(length)
            show(SweepProgress(done + 1, len(todo), n, source, length.status))
    return Growth(
        journal.lengths.values(), probe=_make_probe(plan), path=home.path, keep_alive=home
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """The arguments of a sweep that all lengths share."""

    make_step: MakeStep
    measured: bool
    dry_run: bool
    device: str
    target: str
    isolate: bool
    steps: int | None
    what_remains: str
    """Of a sweep that is cut short."""

    @property
    def sources(self) -> list[str]:
        """What to run, in this order: some caches of libraries keep what a dry run leaves there."""
        return [MEASURED] * self.measured + [DRY_RUN] * self.dry_run

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Per source, what has to be the same for its runs to be compared."""
        known = {
            MEASURED: {"device": self.device, "steps": self.steps},
            DRY_RUN: {"target": self.target, "steps": self.steps},
        }
        return {source: known[source] for source in self.sources}


class _Home:
    """The directory of a sweep; a temporary one is removed when nobody uses it any more."""

    def __init__(self, directory: str | Path | None) -> None:
        if directory is None:
            self.path = Path(tempfile.mkdtemp(prefix="attnprof-sweep-"))
            weakref.finalize(self, _remove, self.path, os.getpid())
        else:
            self.path = Path(directory).absolute()


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a forked child, whose exit would take its parent's runs along
        shutil.rmtree(path, ignore_errors=True)


def _run_length(plan: _Plan, journal: SweepJournal, source: str, seq_len: int) -> Length:
    full = journal.find_full(source, seq_len)
    if full is not None and not plan.isolate:
        return Length(seq_len, source, SKIPPED, f"n = {full} had run out of memory")
    directory = journal.directory_of(source, seq_len)
    # A run gets its name when it is whole: what an interrupted sweep leaves is no run of it.
    unfinished = directory.with_name(f".{directory.name}")
    for left in (directory, unfinished):
        shutil.rmtree(left, ignore_errors=True)
    _free_memory()
    try:
        status, reason = _RECORD[source](plan, seq_len, unfinished)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # Measured lengths, and shorter ones run dry, are worth having all the same.
        if isinstance(error, DryRunError) and (plan.measured or journal.has_any(source)):
            return Length(seq_len, source, Status.FAILED.value, describe_error(error))
        error.add_note(f"attnprof.sweep() was at n = {seq_len} ({source}); {plan.what_remains}")
        raise
    if status not in FINISHED or not unfinished.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        return Length(seq_len, source, status.value, reason)
    unfinished.rename(directory)
    return Length(seq_len, source, status.value, reason, directory)


def _record_measured(plan: _Plan, seq_len: int, directory: Path) -> tuple[Status, str]:
    options: dict[str, Any] = {"device": plan.device, "directory": directory, "steps": plan.steps}
    if plan.isolate:
        return record_isolated(plan.make_step, seq_len, **options)
    try:
        record_workload(plan.make_step, seq_len, **options)
    except Exception as error:
        if status_of(error) is Status.OUT_OF_MEMORY:
            return Status.OUT_OF_MEMORY, describe_error(error)
        raise
    return Status.COMPLETED, ""


def _record_dry(plan: _Plan, seq_len: int, directory: Path) -> tuple[Status, str]:
    dry_run_once(plan.make_step, seq_len, target=plan.target, directory=directory, steps=plan.steps)
    return Status.COMPLETED, ""


def _free_memory() -> None:
    """Let nothing of one length be there when the next begins."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # not annotated
        torch.cuda.empty_cache()


def _make_probe(plan: _Plan) -> Probe:
    def measure(seq_len: int, capacity_bytes: int) -> int:
        run = dry_run_once(plan.make_step, seq_len, target=plan.target, steps=plan.steps)
        return count_needed_bytes(run.attribution.allocations, capacity_bytes)

    return Probe(measure, "live" if plan.target == "cpu" else "reserved")


def _check_lengths(seq_lens: Iterable[SupportsIndex]) -> list[int]:
    """Return the lengths, ascending."""
    try:
        lengths = [_check_whole(given) for given in seq_lens]
    except TypeError as error:
        raise TypeError(
            f"seq_lens must be a list of whole numbers of tokens, got {seq_lens!r}: {error}"
        ) from None
    if not lengths:
        raise ValueError("seq_lens is empty; give at least two lengths, and three to fit n²")
    lengths.sort()
    if lengths[0] < 1:
        raise ValueError(f"seq_lens must be 1 or more, got {lengths[0]}")
    twice = [n for n, following in pairwise(lengths) if n == following]
    if twice:
        raise ValueError(f"seq_lens has {twice[0]} twice; give each length once")
    return lengths


def _check_whole(value: SupportsIndex) -> int:
    if isinstance(value, bool):
        raise TypeError("bool is no length")
    return operator.index(value)


@contextmanager
def _showing(progress: ShowProgress | None, total: int) -> Iterator[ShowProgress]:
    """Yield what to call with progress: the user's function, a bar on a terminal, or nothing."""
    if progress is not None or not total or not _is_terminal(sys.stderr):
        yield progress or (lambda _: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    # No thread that refreshes, and no redirection: the workload runs as it would without a bar.
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(file=sys.stderr),
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=total)

        def show(at: SweepProgress) -> None:
            word = "dry run" if at.source == DRY_RUN else at.source
            bar.update(task, completed=at.done, description=f"n = {at.seq_len}, {word}")
            bar.refresh()

        yield show


def _is_terminal(file: TextIO | None) -> bool:
    try:
        return file is not None and file.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


_RECORD: dict[str, Callable[[_Plan, int, Path], tuple[Status, str]]] = {
    MEASURED: _record_measured,
    DRY_RUN: _record_dry,
}
