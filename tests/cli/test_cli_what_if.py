"""``attnprof what-if``: all changes, one, or several; one line where that cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import attnprof
from attnprof.cli import main


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command line run in this process."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_what_if_lists_every_change(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_main(capsys, "what-if", recorded / "run")
    assert (code, err) == (0, "")
    assert out.startswith("The peak was ")
    applied, refused = out.split("Nothing to change")
    assert "fused_attention" in applied
    assert "cache_fp8" in refused
    assert "no KV cache was kept from one forward to the next" in refused
    assert "\x1b" not in out


def test_what_if_tells_all_of_one_change(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_main(capsys, "what-if", recorded / "run", "--scenario", "fused_attention")
    assert code == 0
    assert out.startswith("With fused_attention the peak would be ")
    assert "F.scaled_dot_product_attention(q, k, v)" in out
    assert "Category by category" in out


def test_what_if_json_adds_up(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_main(
        capsys, "what-if", recorded / "run", "--scenario", "fused_attention", "--json"
    )
    read: dict[str, Any] = json.loads(out)
    (what_if,) = read["what_ifs"]
    assert code == 0
    assert what_if["scenarios"] == ["fused_attention"]
    assert read["before"]["total_bytes"] - what_if["after"]["total_bytes"] == what_if["saves_bytes"]
    assert sum(what_if["after"]["by_category"].values()) == what_if["after"]["total_bytes"]


def test_what_if_json_of_all_has_reasons(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run_main(capsys, "what-if", recorded / "run", "--seq-len", 128, "--json")
    read = json.loads(out)
    names = [name for what_if in read["what_ifs"] for name in what_if["scenarios"]]
    assert "seq_len" in names
    assert "checkpointing" in {*names, *read["not_applicable"]}
    assert not set(names) & read["not_applicable"].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "magic"], "attnprof: unknown scenario 'magic'; expected one or more of:"),
        (
            ["--scenario", "causal_flag"],
            "attnprof: causal_flag does not apply to this run: no fused attention is given a mask",
        ),
        (["--batch", "0"], "attnprof: batch must be a number above 0, got 0.0"),
        (["--device", "cuda:7"], "attnprof: the run has no device 'cuda:7'; it has: cpu"),
        (["--heads", "0"], "attnprof: Invalid value for '--heads'"),
    ],
)
def test_what_if_refuses_in_one_line(
    recorded: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run_main(capsys, "what-if", recorded / "run", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_what_if_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_main(capsys, "what-if", tmp_path / "nothing")
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--json"], ["--scenario", "checkpointing"]])
def test_what_if_of_an_empty_run_says_that_it_is_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with attnprof.trace(tmp_path / "empty", samples_per_second=0):
        pass
    code, out, err = run_main(capsys, "what-if", tmp_path / "empty", *options)
    assert (code, out) == (2, "")
    assert err == (
        f"attnprof: nothing was recorded in {tmp_path / 'empty'}, which ended completed: it holds "
        "no allocations; give a run of a program that made tensors while attnprof watched\n"
    )


def test_what_if_of_a_folder_of_runs_names_one(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        shutil.copytree(recorded / "run", tmp_path / name)
    code, out, err = run_main(capsys, "what-if", tmp_path)
    assert (code, out) == (2, "")
    assert err == (
        f"attnprof: no run at {tmp_path}: it holds 2 runs; give one of them, such as "
        f"{tmp_path / 'b'}\n"
    )
    shutil.rmtree(tmp_path / "b")
    assert f"it holds a run; give {tmp_path / 'a'}\n" in run_main(capsys, "what-if", tmp_path)[2]


def test_what_if_reads_lengths_as_other_commands_do(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_main(capsys, "what-if", recorded / "run", "--seq-len", "0")
    assert code == 2
    assert "a sequence length must be a whole number from 1 on" in err
    asked = [
        run_main(capsys, "what-if", recorded / "run", "--scenario", "seq_len", "--seq-len", length)
        for length in ("1K", "1024")
    ]
    assert asked[0] == asked[1]
    assert asked[0][0] == 0


def test_report_says_what_would_lower_the_peak(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run_main(capsys, "report", recorded / "run")
    assert "What would lower it" in out
    assert "Fused attention" in out
