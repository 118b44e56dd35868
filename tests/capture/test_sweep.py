"""Sweeps: every length isolated, every ending a point, nothing done twice."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from attnprof.capture.dry_run import dry_run
from attnprof.capture.sweep import SweepProgress, sweep
from attnprof.capture.workload import identify, record_workload
from attnprof.errors import CaptureError, DryRunError, RunFormatError
from attnprof.growth import Growth
from tests.capture import sweep_steps
from tests.capture.scripts import ROOT
from tests.capture.sweep_steps import make_doomed, make_greedy, make_step

LENGTHS = [16, 32, 64]


class CountedCalls:
    """A make_step that notes the lengths it is called with."""

    def __init__(self, make: Callable[[int, str], Any] = make_step) -> None:
        self.make = make
        self.lengths: list[int] = []

    def __call__(self, seq_len: int, device: str) -> Any:
        self.lengths.append(seq_len)
        return self.make(seq_len, device)


def count_total(growth: Growth, source: str) -> dict[int, int]:
    total = growth.points.filter(category="total", layer="", source=source)
    return dict(
        total.group_by("seq_len").agg(pl.col("peak_bytes").max()).sort("seq_len").iter_rows()
    )


def list_statuses(growth: Growth) -> dict[int, str]:
    return {length.seq_len: length.status for length in growth.lengths}


def test_sweep_measures_each_length_as_if_it_were_alone(tmp_path: Path) -> None:
    growth = sweep(make_step, LENGTHS, directory=tmp_path / "growth")
    alone = {n: record_workload(make_step, n).peak().total_bytes for n in LENGTHS}
    assert count_total(growth, "measured") == alone
    assert "preexisting" not in growth.points["category"]
    assert list_statuses(growth) == dict.fromkeys(LENGTHS, "completed")
    assert growth.run(64).peak().total_bytes == alone[64]


def test_sweep_fits_softmax_of_the_saved_and_the_gradient() -> None:
    fit = sweep(make_step, LENGTHS).fit("softmax")
    assert fit.law == "quadratic"
    assert fit.coefficients["forward"] == pytest.approx((0, 0, 4))
    assert fit.coefficients["backward"] == pytest.approx((0, 0, 2 * 4))


def test_sweep_runs_dry_to_the_same_bytes() -> None:
    growth = sweep(make_step, LENGTHS, dry_run=True, measured=True)
    assert count_total(growth, "dry_run") == count_total(growth, "measured")
    assert growth.source == "measured"


def test_sweep_runs_only_dry_when_asked() -> None:
    growth = sweep(make_step, [10**5, 10**6], dry_run=True)
    assert {length.source for length in growth.lengths} == {"dry_run"}
    assert growth.fit("softmax").predict(10**7) == 2 * 4 * 10**14


def test_sweep_predicts_what_a_longer_run_then_needs() -> None:
    growth = sweep(make_step, LENGTHS)
    peak = record_workload(make_step, 256).peak()
    predicted = growth.predict_peak(256)
    assert growth.predict(256) == predicted.peak_bytes == peak.total_bytes
    assert (predicted.method, predicted.by_category) == ("replay", peak.by_category())
    assert (predicted.phase, predicted.layer, predicted.op) == (peak.phase, peak.layer, peak.op)


def test_sweep_is_opened_again(tmp_path: Path) -> None:
    growth = sweep(make_step, LENGTHS, directory=tmp_path / "growth")
    moved = shutil.move(tmp_path / "growth", tmp_path / "elsewhere")
    again = Growth.load(moved)
    assert [(x.seq_len, x.status) for x in again.lengths] == list(list_statuses(growth).items())
    assert again.predict(1000) == sweep(make_step, LENGTHS).predict(1000)
    assert again.find_wall("1 GB").by == "fit"


def test_sweep_ends_at_the_wall() -> None:
    growth = sweep(make_greedy, [8, 16, 32, 64])
    statuses = {8: "completed", 16: "completed", 32: "out_of_memory", 64: "skipped"}
    assert list_statuses(growth) == statuses
    assert growth.lengths[3].reason == "n = 32 had run out of memory"
    assert "allocate memory" in growth.lengths[2].reason
    wall = growth.find_wall()
    assert (wall.seq_len, wall.next_seq_len, wall.by) == (16, 32, "measured")
    assert wall.peak_bytes == count_total(growth, "measured")[16]
    assert growth.fit("softmax").points["seq_len"].unique().sort().to_list() == [8, 16]


def test_sweep_keeps_how_far_a_length_without_memory_came() -> None:
    growth = sweep(make_greedy, [16, 32])
    points = growth.points.filter(seq_len=32, category="softmax", layer="", phase="forward")
    assert points.select("status", "peak_bytes").row(0) == ("out_of_memory", 4 * 32 * 32)


def test_sweep_passes_on_what_a_workload_raises_and_keeps_the_rest(tmp_path: Path) -> None:
    directory = tmp_path / "growth"
    with pytest.raises(ValueError, match="40 is not a whole number of windows") as caught:
        sweep(sweep_steps.make_windowed, [16, 32, 40], directory=directory)
    (note,) = caught.value.__notes__
    assert note.endswith(f"at n = 40 (measured); finished lengths are kept in {directory}")
    assert list_statuses(Growth.load(directory)) == {16: "completed", 32: "completed"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_sweep_leaves_no_half_run(error: type[BaseException], tmp_path: Path) -> None:
    def make(n: int, device: str) -> Callable[[], None]:
        def step() -> None:
            torch.ones(n)
            if n == 32:
                raise error

        return step

    with pytest.raises(error):
        sweep(make, LENGTHS, directory=tmp_path / "growth")
    left = sorted(path.name for path in (tmp_path / "growth").iterdir())
    assert left == ["growth.json", "measured-000000016"]


def test_sweep_resumes_where_it_ended(tmp_path: Path) -> None:
    directory = tmp_path / "growth"
    with pytest.raises(ValueError, match="40"):
        sweep(sweep_steps.make_windowed, [16, 32, 40], directory=directory)
    begun: list[int] = []
    growth = sweep(
        sweep_steps.make_windowed,
        [16, 32, 48],
        directory=directory,
        progress=lambda at: begun.append(at.seq_len),
    )
    assert set(begun) == {48}
    assert list(list_statuses(growth)) == [16, 32, 48]


def test_sweep_does_not_run_into_a_known_wall_again(tmp_path: Path) -> None:
    sweep(make_greedy, [16, 32], directory=tmp_path / "growth")
    growth = sweep(make_greedy, [16, 32, 64], directory=tmp_path / "growth")
    assert list_statuses(growth) == {16: "completed", 32: "out_of_memory", 64: "skipped"}


def test_sweep_adds_dry_runs_to_measured_ones(tmp_path: Path) -> None:
    sweep(make_step, LENGTHS, directory=tmp_path / "growth")
    growth = sweep(make_step, LENGTHS, dry_run=True, directory=tmp_path / "growth")
    assert count_total(growth, "dry_run") == count_total(growth, "measured")


def test_sweep_does_not_mix_workloads(tmp_path: Path) -> None:
    sweep(make_step, [16], directory=tmp_path)
    with pytest.raises(
        CaptureError, match=r"sweep of /.*/sweep_steps.py:make_step, not of .*make_inference; give"
    ):
        sweep(sweep_steps.make_inference, [16], directory=tmp_path)
    with pytest.raises(
        CaptureError, match="holds measured runs with steps not given, not with steps 3, and "
    ):
        sweep(make_step, [32], steps=3, directory=tmp_path)


@dataclass(frozen=True)
class MakeWide:
    """A make_step that says what it holds."""

    width: int

    def __call__(self, seq_len: int, device: str) -> Callable[[], object]:
        return make_wide(seq_len, device, width=self.width)

    def make(self, seq_len: int, device: str) -> Callable[[], object]:
        return self(seq_len, device)


def make_wide(seq_len: int, device: str, **more: int) -> Callable[[], object]:
    return lambda: torch.ones(seq_len, more["width"], device=device).exp()


def make_around(width: int) -> Any:
    def make(seq_len: int, device: str) -> Callable[[], object]:
        return make_wide(seq_len, device, width=width)

    return make


@pytest.mark.parametrize(
    "make",
    [
        lambda width: partial(make_wide, width=width),
        lambda width: partial(make_wide, width=width, more={"depths": [1, 2]}),
        MakeWide,
        lambda width: MakeWide(width).make,
        make_around,
    ],
    ids=["partial", "partial of containers", "dataclass", "method", "inner function"],
)
def test_sweep_resumes_what_was_given_the_same_arguments_only(
    make: Callable[[int], Any], tmp_path: Path
) -> None:
    first = sweep(make(8), [16], directory=tmp_path)
    (run,) = first.lengths
    assert sweep(make(8), [16, 32], directory=tmp_path).run(16).path == run.path
    with pytest.raises(CaptureError, match=r"holds a sweep of .*8.*, not of .*512"):
        sweep(make(512), [16], directory=tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda seq_len, device: lambda: None,
        CountedCalls(),
        CountedCalls().__call__,
        partial(make_wide, width=torch.tensor(8)),
        make_around(object()),  # type: ignore[arg-type]  # whatever it is, it does not say
    ],
    ids=["lambda", "object", "method", "partial", "inner function"],
)
def test_sweep_does_not_resume_what_nothing_tells_from_others(make: Any, tmp_path: Path) -> None:
    (tmp_path / "growth").mkdir()
    sweep(make_step, [16], directory=tmp_path / "growth")
    with pytest.raises(CaptureError, match=r"nothing tells whether .* is the same .*; give anoth"):
        sweep(make, [16], directory=tmp_path / "growth")


def define_step(file: Path) -> Any:
    scope: dict[str, Any] = {}
    exec(compile("def make_step(n, device): return lambda: None", file, "exec"), scope)
    return scope["make_step"]


def test_sweep_tells_files_of_one_name_apart(tmp_path: Path) -> None:
    files = [tmp_path / folder / "train.py" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.touch()
    sweep(define_step(files[0]), [16], directory=tmp_path / "growth")
    with pytest.raises(CaptureError, match=r"of /.*/a/train.py:make_step, not of /.*/b/train.py"):
        sweep(define_step(files[1]), [16], directory=tmp_path / "growth")


def test_function_of_a_notebook_is_told_by_its_cell_in_every_session(tmp_path: Path) -> None:
    cells = [define_step(tmp_path / f"ipykernel_{session}" / "1234.py") for session in (1, 2)]
    assert [identify(cell) for cell in cells] == ["1234.py:make_step"] * 2


def test_sweep_does_not_write_into_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CaptureError, match="it is not empty"):
        sweep(make_step, [16], directory=tmp_path)


def test_sweep_is_removed_with_its_growth() -> None:
    growth = sweep(make_step, [16])
    path, run = growth.path, growth.run(16)
    assert path is not None
    del growth
    gc.collect()
    assert run.peak().total_bytes  # a run keeps its directory
    del run
    gc.collect()
    assert not path.exists()


def test_sweep_tells_its_progress() -> None:
    seen: list[SweepProgress] = []
    sweep(make_step, [16, 32], progress=seen.append)
    assert seen == [
        SweepProgress(0, 2, 16, "measured", None),
        SweepProgress(1, 2, 16, "measured", "completed"),
        SweepProgress(1, 2, 32, "measured", None),
        SweepProgress(2, 2, 32, "measured", "completed"),
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stderr", "shows"), [(Terminal(), True), (io.StringIO(), False)])
def test_sweep_shows_a_bar_on_terminals_only(
    stderr: io.StringIO, shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    sweep(make_step, [16, 32])
    assert ("n = 32, measured" in stderr.getvalue()) is shows
    assert bool(stderr.getvalue()) is shows


@pytest.mark.parametrize(
    ("seq_lens", "error", "message"),
    [
        ([], ValueError, "seq_lens is empty; give at least two lengths"),
        ([16, 0], ValueError, "must be 1 or more, got 0"),
        ([16, -4], ValueError, "must be 1 or more, got -4"),
        ([32, 16, 32], ValueError, "has 32 twice; give each length once"),
        ([16, float("nan")], TypeError, r"list of whole numbers of tokens, got \[16, nan\]"),
        ([16.0], TypeError, "list of whole numbers"),
        ([True], TypeError, "list of whole numbers"),
        ("256", TypeError, "list of whole numbers"),
        (256, TypeError, "list of whole numbers"),
        (None, TypeError, "list of whole numbers"),
    ],
    ids=str,
)
def test_sweep_refuses_bad_lengths(seq_lens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep(make_step, seq_lens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "make_step must be a function"),
        (lambda: None, "cannot be called as make_step"),
        (lambda n, device: n, "must return a function"),
    ],
)
def test_sweep_refuses_bad_workloads(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sweep(make, LENGTHS)


def test_sweep_of_a_step_without_memory_has_no_law() -> None:
    growth = sweep(lambda n, device: lambda: None, [16, 32])
    with pytest.raises(ValueError, match=r"hold no memory at all, .* runs the model"):
        growth.predict(64)


def test_sweep_refuses_to_do_nothing() -> None:
    with pytest.raises(ValueError, match="nothing to sweep"):
        sweep(make_step, LENGTHS, measured=False)


def test_sweep_takes_lengths_in_any_order_and_of_any_integer() -> None:
    lengths = torch.tensor([64, 16, 32]).numpy()
    assert list(list_statuses(sweep(make_step, lengths))) == LENGTHS


def test_lengths_may_be_numbers_of_numpy_wherever_one_is_given() -> None:
    n = np.int64(64)
    run = record_workload(make_step, n, steps=np.int32(2))
    assert run.info["workload"] | {"make_step": ""} == {
        "seq_len": 64,
        "source": "measured",
        "make_step": "",
        "steps": 2,
    }
    assert dry_run(make_step, n).peak().total_bytes > 0
    growth = sweep(make_step, LENGTHS, dry_run=True)
    assert growth.predict(n) == growth.predict(64)
    wall, same = (growth.find_wall(np.int64(10**6), multiple_of=m) for m in (np.int8(8), 8))
    assert wall == same


def test_device_of_a_sweep_may_be_torchs(tmp_path: Path) -> None:
    growth = sweep(make_step, [16], device=torch.device("cpu"), directory=tmp_path)
    assert list_statuses(growth) == {16: "completed"}
    sweep(make_step, [16, 32], device="cpu", directory=tmp_path)  # the same settings


def test_sweep_of_what_cannot_run_dry_says_why() -> None:
    with pytest.raises(DryRunError, match=r"sweep_steps\.py"):
        sweep(sweep_steps.make_unpredictable, LENGTHS, dry_run=True)


def test_sweep_runs_dry_what_a_longer_length_cannot(tmp_path: Path) -> None:
    growth = sweep(sweep_steps.make_positioned, [16, 32, 64], dry_run=True, directory=tmp_path)
    assert list_statuses(growth) == {16: "completed", 32: "completed", 64: "failed"}
    assert "row 63 of a table of 32 rows is looked up" in growth.lengths[-1].reason
    assert growth.predict(24) > 0  # by the law of the two that ran


def test_sweep_measures_what_cannot_run_dry() -> None:
    growth = sweep(sweep_steps.make_unpredictable, LENGTHS, dry_run=True, measured=True)
    dry = [length for length in growth.lengths if length.source == "dry_run"]
    assert {length.status for length in dry} == {"failed"}
    assert "sweep_steps.py" in dry[0].reason
    wall = growth.find_wall("1 GB")
    assert (wall.by, "sweep_steps.py" in wall.reason) == ("fit", True)


def test_wall_is_found_by_dry_runs() -> None:
    wall = sweep(make_step, LENGTHS).find_wall("1 GB")
    assert (wall.by, wall.counts, wall.dry_runs) == ("dry run", "live", 2)
    at_wall = dry_run(make_step, wall.seq_len).peak().total_bytes
    beyond = dry_run(make_step, wall.seq_len + 1).peak().total_bytes
    assert at_wall == wall.peak_bytes <= 10**9 < beyond == wall.next_bytes


def test_wall_keeps_to_lengths_that_the_workload_takes() -> None:
    growth = sweep(sweep_steps.make_windowed, [16, 48, 96])
    wall = growth.find_wall("1 GB")
    assert (wall.by, wall.seq_len % 16, wall.next_seq_len - wall.seq_len) == ("dry run", 0, 16)
    assert "is not a whole number of windows" in wall.reason
    assert growth.max_seq_len("1 GB", multiple_of=16) == wall.seq_len


@pytest.mark.parametrize("measured", [False, True])
def test_wall_ends_with_the_table_of_positions_whatever_else_was_run(measured: bool) -> None:
    lengths = [16, 32, 48]
    growth = sweep(sweep_steps.make_looked_up, lengths, dry_run=True, measured=measured)
    runs = [growth.run(x.seq_len, source=x.source) for x in growth.lengths]
    assert growth.max_seq_len("1 GB") == 64
    assert Growth.from_runs(runs).max_seq_len("1 GB") == 64


def test_wall_of_reserved_memory_is_the_same_by_fit(tmp_path: Path) -> None:
    growth = sweep(make_step, [300, 500, 900], dry_run=True, target="cuda", directory=tmp_path)
    wall = growth.find_wall("T4")
    by_fit = Growth.load(tmp_path).find_wall("T4")
    assert (wall.by, wall.counts, by_fit.by) == ("dry run", "reserved", "fit")
    assert (by_fit.seq_len, by_fit.peak_bytes) == (wall.seq_len, wall.peak_bytes)


def test_wall_of_a_loop_over_tokens_is_left_to_the_fit() -> None:
    growth = sweep(sweep_steps.make_recurrent, [8, 12, 16, 32])
    assert growth.predict_peak(64).method == "law"
    wall = growth.find_wall("10 GB")
    assert wall.by == "fit"
    assert "it runs more ops the longer the sequence" in wall.reason
    expected = record_workload(sweep_steps.make_recurrent, 128).peak().total_bytes
    assert growth.predict(128) == pytest.approx(expected, rel=0.01)


def test_isolated_lengths_end_alone() -> None:
    growth = sweep(make_doomed, [16, 24, 32, 40, 48, 56], isolate=True)
    ended = {x.seq_len: (x.status, x.reason) for x in growth.lengths}
    assert ended[16] == ended[56] == ("completed", "")
    assert ended[24][0] == "out_of_memory"
    assert "killed by SIGKILL, as the kernel does when memory runs out" in ended[24][1]
    assert ended[32] == ("failed", "its process was ended by a signal: Segmentation fault")
    assert ended[40][0] == "out_of_memory"
    assert ended[48] == ("failed", "IndexError: list index out of range")
    assert growth.find_wall().next_seq_len == 24
    assert growth.fit("softmax").coefficients["forward"] == pytest.approx((0, 0, 4))


def test_isolated_workload_can_be_interrupted() -> None:
    growth = sweep(sweep_steps.make_interruptible, [16, 32], isolate=True)
    assert [length.status for length in growth.lengths] == ["completed"] * 2
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_target_without_a_dry_run_is_refused() -> None:
    with pytest.raises(ValueError, match="only a dry run answers for another device"):
        sweep(make_step, LENGTHS, target="H200")


@pytest.mark.parametrize("make", [lambda n, device: None, CountedCalls(lambda n, device: None)])
def test_isolation_needs_a_function_that_can_be_imported(make: Any) -> None:
    with pytest.raises(
        TypeError, match=r"in a process of its own: .* top level of a file, or use isolate=False"
    ):
        sweep(make, LENGTHS, isolate=True)


ENDLESS = """
import os, time

def make_step(n, device):
    print(os.getpid(), flush=True)
    return lambda: time.sleep(100)

if __name__ == "__main__":
    from attnprof.capture.sweep import sweep
    sweep(make_step, [16], isolate=True)
"""


def is_running(process: int) -> bool:
    """Return whether there is such a process, and it has not ended."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_isolated_lengths_do_not_outlive_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    with subprocess.Popen(
        [sys.executable, "endless.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as sweeping:
        assert sweeping.stdout is not None
        child = int(sweeping.stdout.readline())
        assert is_running(child)
        sweeping.kill()
        # Ends when the child does, which has the pipe too.
        assert sweeping.stdout.read() == ""
    assert not is_running(child)


SCRIPT = """
import attnprof.capture.sweep, sys, torch

def make_step(n, device):
    x = torch.ones(n)
    return lambda: x.exp()

def main():
    growth = attnprof.capture.sweep.sweep(make_step, [16], isolate=True)
    print([(x.status, x.reason) for x in growth.lengths])
"""


@pytest.mark.parametrize("guard", ["if __name__ == '__main__': ", ""], ids=["guarded", "bare"])
def test_isolated_scripts_sweep_themselves(guard: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT) + f"{guard}main()\n", "utf-8")
    finished = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    if guard:
        assert finished.stdout == "[('completed', '')]\n"
    else:
        assert "exit code 1 before the workload could be recorded" in finished.stdout
        assert "must do so under" in finished.stdout


def test_growth_skips_runs_that_are_damaged(tmp_path: Path) -> None:
    sweep(make_step, LENGTHS, directory=tmp_path)
    (tmp_path / "measured-000000032" / "run.json").write_text("{", "utf-8")
    shutil.rmtree(tmp_path / "measured-000000064")
    growth = Growth.load(tmp_path)
    assert list_statuses(growth) == {16: "completed", 32: "failed", 64: "failed"}
    assert "run.json is damaged" in growth.lengths[1].reason
    with pytest.raises(ValueError, match=r"one length \(16\)"):
        growth.fit()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it has no growth.json; expected a directory written by attnprof.sweep"),
        ("{", "damaged or not attnprof's"),
        ("[]", "damaged or not attnprof's"),
        ('{"growth_version": 1}', "damaged or not attnprof's"),
        ('{"growth_version": 99}', "version 99, this attnprof reads 1"),
    ],
)
def test_growth_refuses_what_is_no_sweep(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "growth.json").write_text(content, "utf-8")
    with pytest.raises(RunFormatError, match=message):
        Growth.load(tmp_path)


def test_growth_list_leads_nowhere_else(tmp_path: Path) -> None:
    sweep(make_step, [16], directory=tmp_path / "growth")
    (tmp_path / "growth" / "measured-000000016").rename(tmp_path / "outside")
    file = tmp_path / "growth" / "growth.json"
    content = json.loads(file.read_text("utf-8"))
    content["lengths"][0]["run"] = "../outside"
    file.write_text(json.dumps(content), "utf-8")
    assert Growth.load(tmp_path / "growth").lengths[0].status == "failed"


def test_wall_is_not_told_where_no_law_explains_the_points() -> None:
    sizes = {16: 700, 32: 1551, 64: 1920, 100: 493, 128: 1721, 200: 126}

    def make_step(seq_len: int, device: str) -> Callable[[], object]:
        def step() -> None:
            for _ in range(seq_len):  # other ops at every length
                torch.ones(sizes[seq_len])

        return step

    growth = sweep(make_step, list(sizes), dry_run=True, steps=1)
    message = r"no law explains how total grows \(off by up to .*\), so where memory runs out"
    with pytest.raises(ValueError, match=message):
        growth.max_seq_len("80 GB")
