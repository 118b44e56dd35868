"""``attnprof predict``: an exit code to build on, and the reasons for it."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_calls import Ended, call
from growth_scripts import WORKLOAD

import attnprof
from attnprof.cli import main
from attnprof.cli.predict import choose_other_length, find_own_gpu
from attnprof.errors import CommandError
from attnprof.theory.devices import find_device

BATCH, LAYERS, ITEM_BYTES = 2, 2, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script work.py."""
    folder = tmp_path_factory.mktemp("predicted")
    (folder / "work.py").write_text(WORKLOAD)
    return folder


@pytest.fixture(scope="module")
def too_long(folder: Path) -> tuple[Ended, dict[str, Any]]:
    """What ``--json`` says of a length that does not fit an H200."""
    ended = call(
        "predict", "work.py:make_step", "--seq-len", "64K", "--device", "h200", "--json",
        cwd=folder,
    )  # fmt: skip
    return ended, json.loads(ended.out)  # what the script prints goes to stderr


def test_predict_of_what_does_not_fit_ends_with_1(
    too_long: tuple[Ended, dict[str, Any]],
) -> None:
    ended, report = too_long
    assert ended.code == 1
    assert not report["fits"]
    assert report["device"] == "H200"
    assert report["capacity_bytes"] == find_device("H200").available_bytes
    assert report["margin_bytes"] == report["capacity_bytes"] - report["reserved_bytes"] < 0


def test_predict_says_who_holds_the_peak(too_long: tuple[Ended, dict[str, Any]]) -> None:
    peak, holders = too_long[1]["peak"], too_long[1]["holders"]
    n = 64 * 1024
    assert peak["by_category"]["softmax"] >= LAYERS * BATCH * n * n * ITEM_BYTES
    assert sum(peak["by_category"].values()) == peak["total_bytes"]
    assert sum(holder["size_bytes"] for holder in holders) == peak["total_bytes"]


def test_predict_of_what_fits_ends_with_0(
    too_long: tuple[Ended, dict[str, Any]], folder: Path
) -> None:
    longest = too_long[1]["horizon"]["wall"]["seq_len"]
    ended = call(
        "predict", "work.py:make_step", "--seq-len", str(longest), "--device", "H200",
        "--out", "kept", cwd=folder,
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    text = " ".join(ended.out.split())
    assert f"n = {longest:,} fits on H200: it needs " in text
    assert f"the longest sequence that fits is n = {longest:,}" in text
    assert "Fused attention" in text
    run = attnprof.load(folder / "kept")
    assert run.info["workload"]["seq_len"] == longest


def test_predict_finds_a_wall_that_is_one(
    too_long: tuple[Ended, dict[str, Any]], folder: Path
) -> None:
    wall = too_long[1]["horizon"]["wall"]
    assert wall["next_seq_len"] == wall["seq_len"] + 1
    ended = call(
        "predict", "work.py:make_step", "--seq-len", str(wall["next_seq_len"]), "--device", "H200",
        cwd=folder,
    )  # fmt: skip
    assert ended.code == 1


def test_predict_gives_the_law_of_the_peak(too_long: tuple[Ended, dict[str, Any]]) -> None:
    constant, linear, quadratic = too_long[1]["horizon"]["coefficients"]
    n, total = 64 * 1024, too_long[1]["peak"]["total_bytes"]
    assert constant + linear * n + quadratic * n * n == pytest.approx(total, rel=1e-4)


def test_predict_gives_advice_that_lowers_the_peak(
    too_long: tuple[Ended, dict[str, Any]],
) -> None:
    total, advice = too_long[1]["peak"]["total_bytes"], too_long[1]["advice"]
    assert 1 <= len(advice) <= 3
    assert all(a["new_peak_bytes"] == total - a["saves_bytes"] < total for a in advice)
    assert advice[0]["kind"] == "fused_attention"


def test_predict_of_a_program_that_fails_ends_with_2(folder: Path) -> None:
    ended = call(
        "predict", "work.py:make_failing_step", "--seq-len", "64", "--device", "H200", cwd=folder
    )
    assert ended.code == 2
    assert ended.err.endswith("LookupError: boom\n")
    assert "attnprof/cli" not in ended.err
    assert ended.out == "imported\n"  # once, though two processes loaded the script


@pytest.mark.parametrize("code", ["", "0", "3"])
def test_predict_of_a_script_that_ends_itself_says_so(code: str, tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text(
        f"def make_step(seq_len, device):\n    raise SystemExit({code})\n"
    )
    ended = call("predict", "ending.py:make_step", "--seq-len", "8", "--device", "H200",
                 cwd=tmp_path)  # fmt: skip
    assert ended.code == 2
    assert ended.err.startswith(f"attnprof: the script ended itself, with SystemExit({code}); ")
    assert len(ended.err.splitlines()) == 1


def test_predict_of_a_step_that_does_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text("def make_step(seq_len, device):\n    return lambda: None\n")
    ended = call("predict", "idle.py:make_step", "--seq-len", "8", "--device", "H200",
                 cwd=tmp_path)  # fmt: skip
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("attnprof: the workload makes no tensors; see that the function ")


def test_predict_without_a_second_length_says_why_there_is_no_wall(tmp_path: Path) -> None:
    (tmp_path / "even.py").write_text(
        WORKLOAD + "def make_long_step(seq_len, device):\n"
        "    assert seq_len == 64, 'only 64'\n"
        "    return make_step(seq_len, device)\n"
    )
    ended = call("predict", "even.py:make_long_step", "--seq-len", "64", "--device", "H200",
                 cwd=tmp_path)  # fmt: skip
    assert ended.code == 0, ended.err
    expected = "No wall is known: no dry run at n = 32: AssertionError: only 64."
    assert expected in " ".join(ended.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["work.py:make_step", "--device", "H200"], "Missing option '--seq-len'"),
        (["work.py:make_step", "--seq-len", "NaN"], "cannot read 'NaN' as a sequence length"),
        (["work.py:make_step", "--seq-len", "0"], "a sequence length must be a whole number"),
        (["work.py:make_step", "--seq-len", "1K", "--device", "X"], "no device named 'X'"),
        (["work.py", "--seq-len", "1K", "--device", "H200"], "did you mean 'work.py:make_step'?"),
    ],
)
def test_predict_says_in_one_line_what_it_cannot_use(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nope.py:make_step", "cannot load nope.py:make_step: nope.py: no such file;"),
        ("work.py:make_dictated_step", "make_step must return a function that runs one step, got"),
        (
            "work.py:make_asking_step",
            "the shape of a result depends on the values of its",
        ),
    ],
)
def test_predict_says_in_one_line_what_is_no_workload(
    target: str, message: str, folder: Path
) -> None:
    ended = call("predict", target, "--seq-len", "1K", "--device", "H200", cwd=folder)
    assert ended.code == 2
    assert ended.err.startswith(f"attnprof: {message}")
    assert len(ended.err.splitlines()) == 1


def test_predict_without_a_gpu_asks_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    with pytest.raises(CommandError, match=r"this machine has no GPU .*with --device, such as H"):
        find_own_gpu()


@pytest.mark.parametrize(("seq_len", "other"), [(2**20, 2**19), (1, 2), (77, 154), (2, 1)])
def test_the_other_length_is_one_that_a_program_takes(seq_len: int, other: int) -> None:
    assert choose_other_length(seq_len) == other


POSITIONS = """
import torch

def make_step(seq_len, device):
    positions = torch.nn.Embedding(64, 8)
    return lambda: positions(torch.arange(seq_len)).sum().backward()
"""


def test_predict_refuses_lengths_that_a_model_has_no_positions_for(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(POSITIONS)
    arguments = ("predict", "short.py:make_step", "--device", "h200", "--json", "--seq-len")
    ended = call(*arguments, "128", cwd=tmp_path)
    assert ended.code == 2
    assert ended.err.startswith("attnprof: row 127 of a table of 64 rows is looked up at ")
    assert ended.err.count("\n") == 1
    horizon = json.loads(call(*arguments, "32", cwd=tmp_path).out)["horizon"]
    assert (horizon["limit"]["seq_len"], horizon["limit"]["rows"]) == (64, 64)
    assert "which end at n = 64 with a table of 64 rows at " in horizon["sentence"]
