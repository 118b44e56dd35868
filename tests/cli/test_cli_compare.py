"""``attnprof compare``: the difference of two peaks, and the exit code that says it is allowed."""

import json
from pathlib import Path

import pytest
import torch
from cli_calls import TRAINING, call

import attnprof
from attnprof.cli import main


def record_longer(folder: Path) -> Path:
    """Record the same training with sequences of twice the length."""
    (folder / "longer.py").write_text(TRAINING.replace("randn(2, 64, 32)", "randn(2, 128, 32)"))
    ended = call("run", "--out", "longer", "longer.py", cwd=folder)
    assert ended.code == 0, ended.err
    return folder / "longer"


def test_compare_fails_if_the_second_peak_is_higher(recorded: Path, tmp_path: Path) -> None:
    longer = record_longer(tmp_path)
    ended = call("compare", "--json", str(recorded / "run"), str(longer), cwd=tmp_path)
    assert ended.code == 1
    values = json.loads(ended.out)
    first, second = (attnprof.load(path).peak().total_bytes for path in (recorded / "run", longer))
    assert values["difference_bytes"] == second - first
    for parts in (values["by_category"], values["by_layer"]):
        assert sum(part["difference_bytes"] for part in parts) == second - first
    run = str(recorded / "run")
    assert call("compare", "--allow", "900", run, str(longer), cwd=tmp_path).code == 0
    assert call("compare", str(longer), run, cwd=tmp_path).code == 0


def test_compare_of_a_run_with_itself_is_no_difference(recorded: Path) -> None:
    ended = call("compare", "run", "run", cwd=recorded)
    assert ended.code == 0
    assert "total" in ended.out


def test_compare_does_not_call_a_run_without_a_peak_the_smaller_one(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ImportError), attnprof.trace(tmp_path / "died"):
        raise ImportError
    assert main(["compare", str(recorded / "run"), str(tmp_path / "died")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"attnprof: nothing was recorded in {tmp_path / 'died'}, which ended failed: it holds no "
        "allocations; give a run of a program that made tensors while attnprof watched\n"
    )


def test_compare_says_that_a_run_did_not_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError), attnprof.trace(tmp_path / "died"):
        torch.ones(256).sum() / (1 // 0)
    assert main(["compare", str(tmp_path / "died"), str(tmp_path / "died")]) == 0
    said = f"{tmp_path / 'died'} ended failed; this is about what ran until then"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "compare half half",
        "what-if half",
        "kv half",
        "export half --to csv",
    ],
)
def test_answers_say_that_files_of_a_run_are_missing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with attnprof.trace("half") as tracer:
        torch.ones(256).sum()
        tracer.step()
        torch.ones(256).sum()
    table = Path("half") / "tables" / "ops.arrows"
    table.write_bytes(table.read_bytes()[:-100])
    main(command.split())
    assert "the newest part of half is missing from its files" in capsys.readouterr().err
    main(["report", "half"])
    assert "completed, files incomplete" in capsys.readouterr().out


def test_compare_needs_runs(tmp_path: Path) -> None:
    ended = call("compare", "none", "none", cwd=tmp_path)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
