"""``attnprof run``: the script runs as python runs it, and is recorded."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import Ended, call, make_environment

import attnprof
from attnprof.cli.run import make_directory

LOOP = "import time, torch\nkept = torch.ones(256)\nprint('go', flush=True)\ntime.sleep(60)\n"
FAILING = (
    "import torch\nkept = torch.ones(256)\ndef fail():\n    raise LookupError('boom')\nfail()\n"
)


def test_run_records_an_unchanged_script(recorded: Path) -> None:
    run = attnprof.load(recorded / "run")
    assert run.status == "completed"
    peak = run.peak()
    assert sum(peak.by_category().values()) == peak.total_bytes > 0


def test_run_finds_the_attention_of_a_model_made_while_recording(recorded: Path) -> None:
    layers = attnprof.load(recorded / "run").layers()
    assert layers["layer"].to_list() == ["0", "1"]
    assert layers["softmax_bytes"].to_list() == [4 * 2 * 64 * 64] * 2  # float32, B, Tq, Tk


def test_run_leaves_what_follows_the_script_to_it(strange: tuple[Path, Ended]) -> None:
    _, ended = strange
    seen = json.loads(ended.out)
    assert seen["argv"] == ["sub/show.py", "--out", "x", "--help", "--", "-m"]


def test_run_makes_the_script_main(strange: tuple[Path, Ended]) -> None:
    folder, ended = strange
    seen = json.loads(ended.out)
    file = str(folder / "sub" / "show.py")
    assert (seen["name"], seen["file"], seen["main"]) == ("__main__", file, file)
    assert seen["package"] is None
    assert Path(seen["path"]) == (folder / "sub").resolve()


def test_run_passes_the_exit_code_on(strange: tuple[Path, Ended]) -> None:
    assert strange[1].code == 3


@pytest.mark.parametrize("ending", ["sys.stdout.close()", "sys.stdout = None"])
def test_run_passes_the_exit_code_of_a_script_without_stdout_on(
    ending: str, tmp_path: Path
) -> None:
    (tmp_path / "s.py").write_text(f"import sys\n{ending}\nsys.exit(5)\n")
    ended = call("run", "--out", "out", "s.py", cwd=tmp_path)
    assert ended.code == 5, ended.err
    assert ended.err.splitlines()[1].startswith("attnprof: failed; recorded in out;")


def test_run_names_its_directory_after_the_script(strange: tuple[Path, Ended]) -> None:
    (directory,) = (strange[0] / "runs").iterdir()
    assert re.fullmatch(r"show-\d{8}-\d{6}", directory.name)


def test_run_says_what_the_peak_was_and_how_to_see_more(strange: tuple[Path, Ended]) -> None:
    folder, ended = strange
    (directory,) = (folder / "runs").iterdir()
    first, second = ended.err.splitlines()
    assert first.startswith("attnprof: peak 1.0 KiB on cpu (step 0, outside)")
    # The script went to another folder; the command is for the user's.
    assert second == (
        f"attnprof: failed; recorded in runs/{directory.name}; "
        f"see more with: attnprof report runs/{directory.name}"
    )


def test_run_prints_the_traceback_that_python_prints(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    plain = subprocess.run(
        [sys.executable, "failing.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    ended = call("run", "--out", "out", "failing.py", cwd=tmp_path)
    assert ended.code == plain.returncode == 1
    assert "LookupError: boom" in plain.stderr
    assert ended.err.startswith(plain.stderr)
    assert "attnprof: failed; recorded in out" in ended.err
    assert attnprof.load(tmp_path / "out").info["error"] == {
        "type": "LookupError",
        "message": "boom",
    }


def test_run_runs_a_module_with_its_own_options(tmp_path: Path) -> None:
    package = tmp_path / "tool"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import sys\nfrom . import __name__ as above\nprint(__name__, above, sys.argv[1:])\n"
    )
    ended = call("run", "--out", "out", "-m", "tool", "--out", "b", "--help", cwd=tmp_path)
    assert (ended.code, ended.out) == (0, "__main__ tool ['--out', 'b', '--help']\n")
    assert "no torch operator ran, so there is no peak" in ended.err


def test_run_ends_cleanly_when_interrupted(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    process = subprocess.Popen(
        [sys.executable, "-m", "attnprof", "run", "--out", "out", "loop.py"],
        cwd=tmp_path,
        env=make_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What started the tests may have told its children to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "KeyboardInterrupt" in err
    assert "attnprof: interrupted; recorded in out" in err
    assert attnprof.load(tmp_path / "out").status == "interrupted"


REMOVING = """\
import shutil, sys, warnings, torch
warnings.simplefilter(sys.argv[1])
torch.ones(4).sum()
shutil.rmtree("out")
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(("warnings", "code"), [("default", 0), ("error", 0), ("error", 3)])
def test_run_whose_directory_the_script_removes_ends_as_the_script(
    warnings: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "removing.py").write_text(REMOVING)
    ended = call("run", "--out", "out", "removing.py", warnings, str(code), cwd=tmp_path)
    assert ended.code == code
    assert ended.err.splitlines()[-1] == (
        "attnprof: there is no run in out: the program, or another, removed what was recorded"
    )
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("sys.excepthook", "interrupted; recorded in out; see more with: attnprof report out"),
        ("attnprof.cli.run.summarise_run", "interrupted; the run is in out"),
    ],
)
def test_run_that_is_interrupted_again_says_where_it_is(
    place: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "s.py").write_text(
        "import sys, attnprof.cli.run\n"
        "def interrupt(*_): raise KeyboardInterrupt\n"
        f"{place} = interrupt\n"
        "raise KeyboardInterrupt\n"
    )
    ended = call("run", "--out", "out", "s.py", cwd=tmp_path)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == f"attnprof: {said}"


def test_run_of_a_missing_script_says_so(tmp_path: Path) -> None:
    ended = call("run", "nope.py", cwd=tmp_path)
    assert ended == Ended(
        2,
        "",
        "attnprof: cannot run nope.py: no such file; give a Python script, or a module with -m\n",
    )
    assert not (tmp_path / "runs").exists()


def test_run_of_a_missing_module_says_so(tmp_path: Path) -> None:
    ended = call("run", "-m", "no_such_module", cwd=tmp_path)
    assert ended.code == 2
    assert ended.err.startswith("attnprof: cannot run -m no_such_module: no such module;")


def test_run_of_a_script_that_traces_itself_says_to_use_python(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import attnprof\nwith attnprof.trace('inner'): pass\n")
    ended = call("run", "--out", "out", "s.py", cwd=tmp_path)
    assert ended.code == 1
    assert (
        f"CaptureError: 'attnprof run' records this program already, into {tmp_path / 'out'}; "
        "traces do not nest: run the program with python, or without a trace of its own\n"
    ) in ended.err
    assert not (tmp_path / "inner").exists()


def test_run_does_not_touch_a_directory_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("print('ran')\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    ended = call("run", "--out", "out", "s.py", cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert "it is not empty (it holds 'mine') and nothing is overwritten" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_directories_made_at_once_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {make_directory("train") for _ in range(5)}
    assert len(made) == 5
    assert all(directory.is_dir() for directory in made)
