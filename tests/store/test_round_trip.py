"""What is written is what is read, while it is being written and after."""

import errno
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnprof.errors import CaptureError
from attnprof.run import Run
from attnprof.store import RunWriter, open_run
from attnprof.store.schema import JOURNAL_FILE, RUN_FILE, SCHEMA_VERSION, TABLES, TABLES_DIR
from attnprof.store.writer import claim_directory
from attnprof.vocabulary import Status
from tests.store.examples import as_table, make_commits, make_rows, write_run


@pytest.mark.parametrize("name", TABLES)
def test_table_is_read_as_written(name: str, tmp_path: Path) -> None:
    commits = make_commits(3)
    run = open_run(write_run(tmp_path, commits))
    assert run.table(name).equals(as_table(name, commits))
    assert run.table(name).schema == TABLES[name]
    assert not run.lost


@given(
    counts=st.lists(st.dictionaries(st.sampled_from(sorted(TABLES)), st.integers(0, 4)), max_size=5)
)
@settings(max_examples=30)
def test_any_commits_are_read_as_written(
    counts: list[dict[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    commits = [
        {name: make_rows(name, count, start=7 * number) for name, count in tables.items()}
        for number, tables in enumerate(counts)
    ]
    run = open_run(write_run(tmp_path_factory.mktemp("run"), commits))
    for name in TABLES:
        assert run.table(name).equals(as_table(name, commits))


def test_column_is_an_array_of_its_numbers(tmp_path: Path) -> None:
    commits = make_commits(2)
    columns = open_run(write_run(tmp_path, commits)).columns("codes")
    assert set(columns) == {"mutates", "reads_self"}  # the name is text
    assert columns["mutates"].dtype == np.bool_
    numbers = open_run(tmp_path).columns("ops")["time_ns"]
    assert numbers.dtype == np.int64
    assert numbers.tolist() == list(range(10))


@pytest.mark.parametrize("name", TABLES)
def test_columns_given_as_arrays_are_written_as_lists_are(name: str, tmp_path: Path) -> None:
    rows = make_rows(name, 5)
    # Numbers of another width than the column's, booleans, text: what numpy makes of the lists.
    arrays = {
        field.name: rows[field.name] if pa.types.is_list(field.type) else np.array(rows[field.name])
        for field in TABLES[name]
    }
    run = open_run(write_run(tmp_path, [{name: arrays}]))
    assert run.table(name).equals(as_table(name, [{name: rows}]))


def test_largest_numbers_survive(tmp_path: Path) -> None:
    rows = {"kind": [1], "time_ns": [2**63 - 1], "op": [-(2**63)]}
    run = open_run(write_run(tmp_path, [{"marks": rows}]))
    assert run.table("marks").to_pydict() == rows


def test_table_that_was_never_written_is_empty(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, [{"marks": make_rows("marks", 2)}]))
    assert run.table("ops").num_rows == 0
    assert run.table("ops").schema == TABLES["ops"]
    assert run.columns("ops")["code"].tolist() == []


@pytest.mark.parametrize("status", list(Status))
def test_status_is_read_as_written(status: Status, tmp_path: Path) -> None:
    assert open_run(write_run(tmp_path, [], status=status)).status is status


def test_information_is_read_as_written(tmp_path: Path) -> None:
    environment = {"attnprof": "9.9", "platform": "Linux – é"}
    run = open_run(write_run(tmp_path, [], environment=environment))
    assert run.info["environment"] == environment
    assert run.info["schema_version"] == SCHEMA_VERSION
    assert run.info["created"] <= run.info["ended"]


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new files take nothing, as on a full disk."""

    def write_bytes(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_full_disk_takes_how_the_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path, {"environment": {"attnprof": "1"}})
    fill_disk(monkeypatch)
    writer.close(Status.FAILED, recording_stopped="OSError: no space")
    stored = open_run(tmp_path)
    assert stored.status is Status.FAILED
    assert stored.info["recording_stopped"] == "OSError: no space"
    assert not list(tmp_path.glob("*.new"))


def test_full_disk_keeps_the_file_that_a_longer_one_would_not_fit_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path, {"environment": {"attnprof": "1"}})
    before = (tmp_path / RUN_FILE).read_bytes()
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left on device"):
        writer.close(Status.FAILED, recording_stopped="long " * 100_000)
    assert (tmp_path / RUN_FILE).read_bytes() == before


def test_run_is_plain_arrow_and_json(tmp_path: Path) -> None:
    """Anyone may open it without attnprof."""
    commits = make_commits(2)
    write_run(tmp_path, commits)
    assert json.loads((tmp_path / RUN_FILE).read_text("utf-8"))["status"] == "completed"
    with pa.ipc.open_stream(str(tmp_path / TABLES_DIR / "ops.arrows")) as stream:
        assert stream.read_all().equals(as_table("ops", commits))
    lines = (tmp_path / JOURNAL_FILE).read_text("utf-8").splitlines()
    assert [json.loads(line)["commit"] for line in lines] == [1, 2]


def test_directory_holds_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path, make_commits(1))
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    tables = {f"{TABLES_DIR}/{name}.arrows" for name in TABLES}
    assert files == {RUN_FILE, JOURNAL_FILE, TABLES_DIR} | tables


def test_reader_sees_whole_commits_while_writing(tmp_path: Path) -> None:
    commits = make_commits(4)
    writer = RunWriter(tmp_path, {})
    readers = [open_run(tmp_path)]
    for columns in commits:
        writer.commit(columns)
        readers.append(open_run(tmp_path))
    for number, reader in enumerate(readers):  # each keeps what it saw when it was opened
        assert reader.table("ops").equals(as_table("ops", commits[:number]))
        assert not reader.lost
    writer.close(Status.COMPLETED)
    assert readers[2].table("scopes").equals(as_table("scopes", commits[:2]))
    assert open_run(tmp_path).table("ops").equals(as_table("ops", commits))


def test_two_readers_share_a_run_that_is_being_written(tmp_path: Path) -> None:
    commits = make_commits(2)
    writer = RunWriter(tmp_path, {})
    writer.commit(commits[0])
    first, second = open_run(tmp_path), open_run(tmp_path)
    held = first.table("ops")
    writer.commit(commits[1])
    assert held.equals(as_table("ops", commits[:1]))
    assert second.table("ops").equals(held)
    writer.close(Status.COMPLETED)


def test_reading_maps_the_file_into_memory(tmp_path: Path) -> None:
    count = 200_000
    rows = {"storage": np.arange(count), "signature": np.arange(count)}
    run = open_run(write_run(tmp_path, [{"operands": rows}]))
    before = pa.total_allocated_bytes()
    table = run.table("operands")
    columns = run.columns("operands")
    assert table.num_rows == count
    assert pa.total_allocated_bytes() - before < count  # of 2 * 4 * count bytes of numbers
    assert not columns["storage"].flags.owndata  # no copy either


def test_run_may_be_moved_while_it_is_read(tmp_path: Path) -> None:
    commits = make_commits(1)
    run = open_run(write_run(tmp_path / "run", commits))
    table = run.table("ops")
    for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert table.equals(as_table("ops", commits))


def test_empty_run_answers_every_question(tmp_path: Path) -> None:
    run = Run.load(write_run(tmp_path, []))
    assert run.peak().total_bytes == 0
    assert run.peak().by_category() == {}
    assert len(run.allocations) == 0
    assert len(run.layers()) == 0
    assert len(run.timeline()) == 0
    assert run.steps["peak_bytes"].sum() == 0


def test_commit_of_nothing_is_no_harm(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, [{}, {"ops": make_rows("ops", 0)}, *make_commits(1)]))
    assert run.table("ops").num_rows == 5


def test_abandoned_writer_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {})
    writer.commit(make_commits(1)[0])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    writer.abandon()
    writer.commit(make_commits(1)[0])
    writer.close(Status.COMPLETED)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_second_writer_in_a_directory_is_refused(tmp_path: Path) -> None:
    RunWriter(tmp_path, {}).close(Status.COMPLETED)
    with pytest.raises(CaptureError, match="cannot record into"):
        RunWriter(tmp_path, {})


@pytest.mark.parametrize("name", [RUN_FILE, ".hidden", "folder"])
def test_directory_with_something_in_it_is_not_claimed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CaptureError, match=f"not empty .it holds '{name}'"):
        claim_directory(tmp_path)


def test_claimed_directory_is_made_with_parents(tmp_path: Path) -> None:
    claim_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
