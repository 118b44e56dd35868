"""``attnprof report``: text, JSON or a page; one line where that cannot be."""

import json
import os
import shutil
from pathlib import Path

import pytest

import attnprof
from attnprof.cli import main


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command line run in this process."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_report_prints_plain_text_into_a_pipe(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(capsys, "report", recorded / "run")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "The peak was" in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_report_is_the_same_whatever_the_terminal(
    recorded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_main(capsys, "report", recorded / "run")
    monkeypatch.setenv("COLUMNS", "40")
    assert run_main(capsys, "report", recorded / "run") == first


def test_report_json_sums(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_main(capsys, "report", recorded / "run", "--json")
    peak = json.loads(out)["peak"]
    assert code == 0
    assert sum(peak["by_category"].values()) == peak["total_bytes"] > 0


def test_report_json_of_a_step_is_of_that_step(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run_main(capsys, "report", recorded / "run", "--json", "--step", 1)
    report = json.loads(out)
    assert report["peak"]["step"] == 1
    assert report["verdict"].startswith("The peak of step 1 was")


def test_report_html_writes_one_file(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    code, out, err = run_main(capsys, "report", recorded / "run", "--html", page)
    assert (code, out, err) == (0, "", f"attnprof: wrote {page}\n")
    assert page.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [page]  # nothing half written is left beside it


def test_report_html_is_as_readable_as_other_files(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").write_text("")
    run_main(capsys, "report", recorded / "run", "--html", tmp_path / "page.html")
    modes = {os.stat(file).st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_report_html_follows_a_link(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "target.html")
    run_main(capsys, "report", recorded / "run", "--html", tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "target.html").is_file()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "it is a directory; give the name of a file, too"),
        ("no/such/page.html", "No such file or directory; give a file in a directory that exists"),
    ],
)
def test_report_html_that_cannot_be_written_says_why(
    target: str, message: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(capsys, "report", recorded / "run", "--html", tmp_path / target)
    assert (code, out) == (2, "")
    assert err.startswith(f"attnprof: cannot write {tmp_path / target}: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_report_html_does_not_replace_the_run_itself(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = recorded / "run" / "run.json"
    before = target.read_text()
    code, _, err = run_main(capsys, "report", recorded / "run", "--html", target)
    assert code == 2
    assert "that is inside of the run; give another file" in err
    assert target.read_text() == before


def test_report_refuses_two_formats(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_main(capsys, "report", recorded / "run", "--json", "--html", "x.html")
    assert (code, err) == (2, "attnprof: --json and --html exclude each other; give one of them\n")


def test_report_of_a_missing_directory_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(capsys, "report", tmp_path / "nope")
    assert (code, out) == (2, "")
    assert err == (
        f"attnprof: no run at {tmp_path / 'nope'}: no such directory; expected a directory "
        "written by attnprof.trace() or 'attnprof run'\n"
    )


def test_report_of_a_file_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = run_main(capsys, "report", file)
    assert code == 2
    assert f"no run at {file}: it is a file;" in err


def test_report_of_a_truncated_run_says_so(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(recorded / "run", copy)
    for table in (copy / "tables").iterdir():
        os.truncate(table, 10)
    code, _, err = run_main(capsys, "report", copy)
    assert code == 2
    assert "its tables are shorter than its journal says" in err
    assert len(err.splitlines()) == 1


def test_report_of_an_unknown_step_names_those_there_are(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_main(capsys, "report", recorded / "run", "--step", 9)
    assert (code, err) == (2, "attnprof: the run has no step 9; it has: 0, 1, 2\n")


def test_report_of_an_unknown_device_names_those_there_are(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_main(capsys, "report", recorded / "run", "--device", "cuda:7")
    assert (code, err) == (2, "attnprof: the run has no device 'cuda:7'; it has: cpu\n")


def test_report_of_a_run_of_nothing_has_the_step_that_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with attnprof.trace(tmp_path / "run"):
        pass
    code, out, _ = run_main(capsys, "report", tmp_path / "run", "--step", "0", "--json")
    found = json.loads(out)
    assert code == 0
    assert [step["step"] for step in found["steps"]] == [found["peak"]["step"]] == [0]
