"""The command itself: quick to help, one line per error, quiet when its reader leaves."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import ROOT, call, make_environment

import attnprof
from attnprof.cli import main

VERBS = (
    "run", "report", "import", "export", "kv", "what-if", "sweep", "predict", "theory", "demo",
    "dashboard", "doctor",
)  # fmt: skip


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)])
def test_help_loads_nothing_heavy(verb: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from attnprof.cli import main; "
        f"main({[*verb, '--help']}); "
        "heavy = {'numpy', 'polars', 'pyarrow', 'torch', 'transformers'} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=make_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Usage: attnprof" in ended.stdout


def test_no_arguments_show_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("attnprof ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'. (see 'attnprof --help')"),
        (["report"], "Missing argument 'RUN'. (see 'attnprof report --help')"),
        (["report", "a", "b"], "Got unexpected extra argument"),
        (["report", "a", "--step", "x"], "Invalid value for '--step': got 'x', expected a whole"),
        (["theory", "gpt2", "--batch", "1.5"], "Invalid value for '--batch': got '1.5', expected"),
        (["what-if", "a", "--batch", "x"], "Invalid value for '--batch': got 'x', expected a num"),
        (["run"], "nothing to run; give a script, as in 'attnprof run train.py', or a module"),
        (["run", "--bogus", "s.py"], "No such option: --bogus"),
        (["run", "--out"], "Option '--out' requires an argument"),
        (["run", "-m"], "Option '-m' requires an argument"),
        (["run", "--samples-per-second", "-1", "s.py"], "Invalid value for '--samples-per-second'"),
        (["demo", "--steps", "0"], "Invalid value for '--steps': got '0', expected at least 1"),
        (["run", "--detail", "x", "s.py"], "Invalid value for '--detail': 'x' is not one of"),
    ],
)
def test_unusable_arguments_get_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"attnprof: {message}")
    assert len(err.splitlines()) == 1


def test_a_reader_that_leaves_is_not_an_error(recorded: Path) -> None:
    command = f"{sys.executable} -m attnprof report run --json | head -c 1"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=recorded,
        env=make_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "{"
    assert ended.stderr == ""


def test_output_that_knows_no_unicode_gets_ascii(recorded: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "attnprof", "report", "run"],
        cwd=recorded,
        env=make_environment() | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii()


def test_doctor_records_something_here(tmp_path: Path) -> None:
    import json

    ended = call("doctor", "--json", cwd=tmp_path)
    found = json.loads(ended.out)
    checks = {check["subject"]: check for check in found["checks"]}
    assert (ended.code, found["works"]) == (0, True), ended.out
    assert checks["tracing"]["ok"]
    assert "2 attention layers found (materialised)" in checks["tracing"]["detail"]
    assert checks["torch"]["ok"]
    assert str(tmp_path) in checks["this folder"]["detail"]


def test_doctor_asks_for_the_torch_that_the_package_asks_for() -> None:
    import tomllib

    from attnprof.cli.doctor import OLDEST_TORCH

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>=" + ".".join(map(str, OLDEST_TORCH)) in wanted


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", ">&- 2>&- <&-"])
def test_streams_that_the_shell_closed_change_no_exit_code(tmp_path: Path, closed: str) -> None:
    (tmp_path / "program.py").write_text("import torch\ntorch.ones(3)\nprint('x')\nexit(5)\n")
    for command, code in (("doctor", 0), ("run --out made program.py", 5), ("report made", 0)):
        ended = subprocess.run(
            f"{sys.executable} -m attnprof {command} {closed}",
            shell=True,
            cwd=tmp_path,
            env=make_environment(),
            timeout=300,
            check=False,
        )
        assert ended.returncode == code, command
    assert attnprof.load(tmp_path / "made").peak().total_bytes == 12


def test_help_is_shown_where_some_signs_cannot(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "attnprof", "--help"],
        cwd=tmp_path,
        env=make_environment() | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0
    assert b"Usage" in ended.stdout
