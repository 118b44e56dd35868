"""``attnprof import``: snapshots of other people, and files that are none."""

import gzip
import json
import os
import pickle
import shlex
from pathlib import Path

import pytest
from cli_calls import call

import attnprof
from attnprof.cli import main
from attnprof.units import format_bytes
from tests.interop.recordings import make_recorded, write_pickle


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    return write_pickle(folder / "crash.pickle", make_recorded("out_of_memory")[0])


def test_import_makes_a_run_and_says_its_peak(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(snapshot), "--out", str(tmp_path / "run")]) == 0
    expected = make_recorded("out_of_memory")[1]["allocated_bytes.all.peak"]
    assert attnprof.load(tmp_path / "run").peak().total_bytes == expected
    captured = capsys.readouterr()
    assert not captured.out
    assert f"peak {format_bytes(expected)} on cuda:0" in captured.err
    assert f"out_of_memory; imported into {tmp_path / 'run'}" in captured.err


def test_import_without_out_goes_to_runs(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(snapshot)]) == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("crash-")
    assert attnprof.load(made).status == "out_of_memory"


def test_gzipped_snapshot_is_the_same_run(snapshot: Path, tmp_path: Path) -> None:
    packed = tmp_path / "crash.pickle.gz"
    packed.write_bytes(gzip.compress(snapshot.read_bytes()))
    for path, name in ((snapshot, "plain"), (packed, "packed")):
        assert main(["import", str(path), "--out", str(tmp_path / name)]) == 0
    plain, again = (attnprof.load(tmp_path / name) for name in ("plain", "packed"))
    assert plain.allocations.equals(again.allocations)


def test_report_tells_of_the_failed_request(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    main(["import", str(snapshot), "--out", run])
    capsys.readouterr()
    assert main(["report", run]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Out of memory", "12.0 MiB were asked for at record.py", "Reserved memory"):
        assert words in text
    assert "Attention layers" not in text  # without ops nothing is known of them
    assert main(["report", run, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["out_of_memory"]
    assert sum(h["size_bytes"] for h in values["holders"]) == values["allocated_bytes"]
    assert values["allocated_bytes"] + values["free_bytes"] == values["reserved_bytes"]
    assert main(["report", run, "--html", str(tmp_path / "page.html")]) == 0
    assert "Out of memory" in (tmp_path / "page.html").read_text()


def test_the_command_that_shows_more_can_be_typed(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["import", str(snapshot), "--out", str(tmp_path / "my run")])
    command = capsys.readouterr().err.rstrip().rpartition("attnprof report ")[2]
    assert shlex.split(command) == [str(tmp_path / "my run")]


@pytest.mark.parametrize("verb", ["what-if", "kv"])
def test_what_needs_ops_is_refused_in_one_line(
    verb: str, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    main(["import", str(snapshot), "--out", run])
    capsys.readouterr()
    assert main([verb, run]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attnprof: a run made of a memory snapshot has no ops, ")
    assert err.count("\n") == 1


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch harmed",))


HOSTILE = {
    "code.pickle": pickle.dumps({"segments": [Evil()], "device_traces": []}),
    "truncated.pickle": pickle.dumps(make_recorded("ring")[0], 4)[:-1000],
    "bomb.pickle.gz": gzip.compress(bytes(32 * 2**20)),
    "empty.pickle": b"",
    "page.html": b"<html></html>",
    "wrong.pickle": pickle.dumps({"segments": {"a": 1}, "device_traces": []}),
    "list.pickle": pickle.dumps([1, 2, 3]),
    "nothing.pickle": pickle.dumps({"segments": [], "device_traces": []}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_ends_in_one_line_and_exit_code_2(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    ended = call("import", name, cwd=tmp_path)
    assert ended.code == 2
    assert not ended.out
    assert ended.err.startswith("attnprof: ")
    assert name in ended.err
    assert ended.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {name, "runs"}
    assert not list(tmp_path.glob("runs/*"))


def test_directory_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "it is a directory" in capsys.readouterr().err


def test_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing.pickle")
    assert main(["import", missing, "--out", str(tmp_path / "run")]) == 2
    assert "missing.pickle: No such file or directory; check the path" in capsys.readouterr().err


def test_occupied_directory_is_refused(snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(snapshot), "--out", str(snapshot.parent)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
