"""``attnprof sweep``: lengths in, the law out, whatever becomes of single lengths."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import Ended, call, make_environment
from growth_scripts import WORKLOAD

import attnprof
from attnprof.cli import main

BATCH, LAYERS, ITEM_BYTES = 2, 2, 4


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A folder with the script work.py and its sweep in ``out``, measured and run dry."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "work.py").write_text(WORKLOAD)
    ended = call(
        "sweep", "work.py:make_step", "--seq-lens", "64:256:x2", "--measured", "--dry-run",
        "--no-isolate", "--capacity", "1 GB", "--html", "page.html", "--out", "out",
        cwd=folder,
    )  # fmt: skip
    return folder, ended


def test_sweep_says_the_law_and_the_wall(swept: tuple[Path, Ended]) -> None:
    _, ended = swept
    assert ended.code == 0, ended.err
    verdict = " ".join(ended.out.split())
    assert "Peak memory grows with n²: " in verdict
    assert "the wall at 1 GB is n = " in verdict
    assert "equal to measured peaks to the byte, at 3 lengths" in verdict


def test_sweep_says_how_each_length_went(swept: tuple[Path, Ended]) -> None:
    *_, page, where = swept[1].err.splitlines()
    assert "attnprof: 1 of 6: n = 64, measured: completed" in swept[1].err
    assert "attnprof: 6 of 6: n = 256, dry run: completed" in swept[1].err
    assert page == "attnprof: wrote page.html"
    assert where.endswith("see them again with: attnprof report out")


def test_sweep_writes_a_page(swept: tuple[Path, Ended]) -> None:
    assert (swept[0] / "page.html").read_text().startswith("<!doctype html>")


def test_sweep_leaves_runs_that_open(swept: tuple[Path, Ended]) -> None:
    growth = attnprof.Growth.load(swept[0] / "out")
    assert [length.seq_len for length in growth.lengths] == [64, 128, 256] * 2
    assert growth.run(128).peak().total_bytes > LAYERS * BATCH * 128 * 128 * ITEM_BYTES


def test_sweep_runs_only_what_is_missing(swept: tuple[Path, Ended]) -> None:
    ended = call(
        "sweep", "work.py:make_step", "--seq-lens", "128,512", "--dry-run", "--out", "out",
        "--json", cwd=swept[0],
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "attnprof: 1 of 1: n = 512, dry run: completed" in ended.err
    points = json.loads(ended.out)["points"]  # what the script prints goes to stderr
    assert [p["seq_len"] for p in points if p["source"] == "dry_run"] == [64, 128, 256, 512]


def test_dry_sweep_answers_for_a_device_that_is_not_here(swept: tuple[Path, Ended]) -> None:
    ended = call(
        "sweep", "work.py:make_step", "--seq-lens", "64,128,256", "--dry-run", "--device", "h200",
        "--json", "--out", "h200", cwd=swept[0],
    )  # fmt: skip
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    assert [capacity["name"] for capacity in said["capacities"]] == ["H200"]
    runs = (swept[0] / "h200").glob("dry_run-*")
    assert {attnprof.load(run).info["dry_run"]["device"] for run in runs} == {"H200"}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("H200", "cannot measure on 'H200'; expected a device of this machine"),
        ("H2000", "no device named 'H2000'"),
    ],
)
def test_sweep_measures_on_devices_of_this_machine(
    device: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "work.py:make_step", "--seq-lens", "64,128", "--device", device]) == 2
    assert message in capsys.readouterr().err


def test_report_shows_a_sweep(
    swept: tuple[Path, Ended], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(swept[0] / "out"), "--category", "softmax"]) == 0
    assert "the memory of softmax grows with n²: 24 n² bytes" in capsys.readouterr().out


def test_report_writes_the_page_of_a_sweep(
    swept: tuple[Path, Ended], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(swept[0] / "out"), "--html", str(page)]) == 0
    assert capsys.readouterr() == ("", f"attnprof: wrote {page}\n")
    assert 'class="chart growth"' in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "1"], "--step and --device are about one run, and this is the growth of many"),
        (["--category", "softmacks"], "there is no category 'softmacks'; there are: total, "),
        (["--capacity", "H2000"], "no device named 'H2000'"),
    ],
)
def test_report_of_a_sweep_refuses_what_it_cannot_show(
    options: list[str],
    message: str,
    swept: tuple[Path, Ended],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["report", str(swept[0] / "out"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_report_of_a_run_has_no_capacity(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(recorded / "run"), "--capacity", "1 GB"]) == 2
    assert "--category and --capacity are about growth" in capsys.readouterr().err


def test_report_shows_the_growth_of_steps(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(recorded / "run"), "--growth"]) == 0
    assert "Memory is known at one length only" in capsys.readouterr().out  # all steps are alike


@pytest.mark.parametrize("option", [("--step", "1"), ("--device", "cpu")])
def test_report_of_the_growth_of_steps_has_no_single_peak(
    option: tuple[str, str], recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(recorded / "run"), "--growth", *option]) == 2
    assert capsys.readouterr().err == (
        "attnprof: --step and --device are about one peak, and --growth is about all steps; drop "
        "--growth\n"
    )


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A sweep with one length that completes, one without memory and one that fails."""
    folder = tmp_path_factory.mktemp("limited")
    (folder / "work.py").write_text(WORKLOAD)
    ended = call("sweep", "work.py:make_limited_step", "--seq-lens", "32:128:x2", cwd=folder)
    return folder, ended


def test_sweep_goes_on_after_a_length_that_ended(limited: tuple[Path, Ended]) -> None:
    _, ended = limited
    assert "n = 64, measured: out of memory" in ended.err
    assert "n = 128, measured: failed" in ended.err
    assert "failed: IndexError: 128 tokens do not fit the model" in ended.out
    assert ended.code == 1  # one failed, and not for want of memory


def test_sweep_says_where_memory_ran_out(limited: tuple[Path, Ended]) -> None:
    assert "n = 32 fits and n = 64 ran out of memory." in " ".join(limited[1].out.split())


def test_sweep_names_its_directory_after_the_script(limited: tuple[Path, Ended]) -> None:
    (directory,) = (limited[0] / "runs").iterdir()
    assert directory.name.startswith("work-sweep-")
    assert f"the runs are in runs/{directory.name}" in limited[1].err


def test_sweep_shows_the_traceback_of_the_workload_alone(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORKLOAD)
    ended = call(
        "sweep", "work.py:make_failing_step", "--seq-lens", "32", "--no-isolate", cwd=tmp_path
    )
    assert ended.code == 1
    assert "LookupError: boom" in ended.err
    assert 'work.py", line' in ended.err
    assert "attnprof/capture" not in ended.err.partition("LookupError")[0]
    assert list((tmp_path / "runs").iterdir()) == []  # nothing was finished


def test_sweep_can_be_interrupted_and_continued(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORKLOAD)
    command = ["sweep", "work.py:make_slow_step", "--seq-lens", "32,64", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "attnprof", *command, "--no-isolate"],
        cwd=tmp_path,
        env=make_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What started the tests may have told its children to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["imported\n", "slow\n"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        "attnprof: interrupted; runs finished until then: 1, kept in out; "
        "go on with the same command and --out out"
    )
    (tmp_path / "quick").touch()
    ended = call(*command, "--no-isolate", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "attnprof: 1 of 1: n = 64, measured: completed" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["work.py:make_step"], "Missing option '--seq-lens'"),
        (["work.py:make_step", "--seq-lens", "64:32:x2"], "--seq-lens '64:32:x2' ends at 32, bef"),
        (["work.py:make_step", "--seq-lens", "0"], "a sequence length must be a whole number fro"),
        (["work.py:make_step", "--seq-lens", "NaN"], "cannot read 'NaN' as a sequence length"),
        (["work.py", "--seq-lens", "32"], "cannot load 'work.py': expected SCRIPT:FUNCTION"),
        (["nope.py:make_step", "--seq-lens", "32"], "nope.py: no such file; expected SCRIPT:FUNC"),
        (["nope:f", "--seq-lens", "32", "--capacity", "12 parsecs"], "cannot read '12 parsecs'"),
        (["nope:f", "--seq-lens", "32", "--category", "x"], "there is no category 'x'"),
    ],
)
def test_sweep_says_in_one_line_what_it_cannot_use(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["sweep", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_dry_sweep_reports_the_lengths_that_ran(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(
        "import torch\n"
        "def make_step(seq_len, device):\n"
        "    table = torch.nn.Embedding(32, 8, device=device)\n"
        "    positions = torch.arange(seq_len, device=device)\n"
        "    return lambda: table(positions).exp()\n"
    )
    ended = call(
        "sweep", "work.py:make_step", "--dry-run", "--seq-lens", "16,32,64", "--out", "grown",
        cwd=tmp_path,
    )  # fmt: skip
    assert ended.code == 1, ended.err
    assert "Law by category" in ended.out
    assert "lengths  2 run dry" in ended.out
    assert "failed: LengthError: row 63 of a table of 32 rows is looked up" in ended.out
    assert ended.err.endswith("the runs are in grown; see them again with: attnprof report grown\n")


def test_sweep_refuses_a_step_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORKLOAD)
    ended = call(
        "sweep", "work.py:make_dictated_step", "--seq-lens", "32", "--no-isolate", cwd=tmp_path
    )
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "make_step must return a function that runs one step, got dict" in line


@pytest.mark.parametrize(
    ("page", "why"), [("missing/page.html", "there is no such directory"), (".", "a directory")]
)
def test_sweep_refuses_a_page_it_cannot_write_before_it_runs(
    page: str, why: str, tmp_path: Path
) -> None:
    ended = call(
        "sweep", "missing.py:make_step", "--seq-lens", "8,16", "--html", page, cwd=tmp_path
    )
    assert ended.code == 2
    assert ended.err.startswith(f"attnprof: cannot write {page}: ")
    assert why in ended.err
    assert ended.err.count("\n") == 1
