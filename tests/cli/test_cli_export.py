"""``attnprof export``: a run in the formats of other tools."""

import json
from pathlib import Path

import polars as pl
import pytest
from cli_calls import call

import attnprof
from attnprof.cli import main


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("memory_viz", "run.memory_viz.pickle"),
        ("perfetto", "run.perfetto.json"),
        ("parquet", "run.parquet"),
        ("csv", "run.csv"),
    ],
)
def test_file_is_named_as_the_run(
    recorded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    to: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(recorded / "run"), "--to", to]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    captured = capsys.readouterr()
    assert not captured.out
    assert f"wrote {name} (" in captured.err


@pytest.mark.parametrize("to", ["memory_viz", "perfetto", "parquet", "csv"])
def test_file_of_a_run_without_blocks_is_called_empty(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with attnprof.trace(tmp_path / "run", samples_per_second=0):
        pass
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--to", to, "--out", str(out)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"attnprof: wrote {out} (")
    assert line.endswith("which is empty: no blocks of memory were recorded in the run")


def test_exported_snapshot_can_be_imported(recorded: Path, tmp_path: Path) -> None:
    snapshot = str(tmp_path / "s.pickle")
    assert main(["export", str(recorded / "run"), "--to", "memory_viz", "--out", snapshot]) == 0
    assert main(["import", snapshot, "--out", str(tmp_path / "again")]) == 0
    peaks = [attnprof.load(path).peak() for path in (recorded / "run", tmp_path / "again")]
    assert peaks[0].total_bytes == peaks[1].total_bytes
    assert peaks[0].by_category() == peaks[1].by_category()


def test_tables_can_be_read(recorded: Path, tmp_path: Path) -> None:
    total = attnprof.load(recorded / "run").allocations["size_bytes"].sum()
    for to, read in (("parquet", pl.read_parquet), ("csv", pl.read_csv)):
        out = tmp_path / to
        assert main(["export", str(recorded / "run"), "--to", to, "--out", str(out)]) == 0
        assert read(out)["size_bytes"].sum() == total


def test_a_pipe_is_written_to(recorded: Path) -> None:
    total = attnprof.load(recorded / "run").allocations["size_bytes"].sum()
    ended = call("export", "run", "--to", "csv", "--out", "/dev/stdout", cwd=recorded)
    assert ended.code == 0, ended.err
    assert pl.read_csv(ended.out.encode())["size_bytes"].sum() == total


def test_trace_is_json(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    assert main(["export", str(recorded / "run"), "--to", "perfetto", "--out", str(out)]) == 0
    assert {event["ph"] for event in json.loads(out.read_text())["traceEvents"]} == {"M", "C", "X"}


def test_unknown_format_names_the_known_ones(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(recorded / "run"), "--to", "xml"]) == 2
    assert (
        "no format 'xml'; give --to memory_viz, perfetto, parquet, csv" in capsys.readouterr().err
    )


def test_runs_own_files_are_not_replaced(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = recorded / "run" / "run.json"
    assert main(["export", str(recorded / "run"), "--to", "csv", "--out", str(own)]) == 2
    assert "that is inside of the run" in capsys.readouterr().err


def test_directory_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), "--to", "csv"]) == 2
    assert "no run at" in capsys.readouterr().err
