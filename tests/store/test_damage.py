"""A damaged or foreign directory gives a readable run or one clear error, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnprof.errors import RunFormatError
from attnprof.store import StoredRun, open_run
from attnprof.store.schema import JOURNAL_FILE, RUN_FILE, SCHEMA_VERSION, TABLES, TABLES_DIR
from attnprof.vocabulary import Status
from tests.store.examples import Columns, as_table, make_commits, write_run

COMMITS: list[Columns] = make_commits(3, rows=4)
FILES = [RUN_FILE, JOURNAL_FILE, *(f"{TABLES_DIR}/{name}.arrows" for name in TABLES)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three commits that nobody changes."""
    return write_run(tmp_path_factory.mktemp("whole") / "run", COMMITS)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for damaged copies."""
    return tmp_path_factory.mktemp("scratch")


def copy_with(whole: Path, scratch: Path, file: str, content: bytes) -> Path:
    """Return a copy of ``whole`` with other bytes in one file."""
    copy = scratch / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    (copy / file).write_bytes(content)
    return copy


def read_all(path: Path) -> tuple[StoredRun, dict[str, Any]]:
    run = open_run(path)
    assert run.status in Status
    return run, {name: run.table(name) for name in TABLES}


def assert_is_one_clear_line(error: RunFormatError, path: Path) -> None:
    assert str(path) in str(error)
    assert "\n" not in str(error)
    assert error.__cause__ is None


def assert_reads_or_says_why(path: Path) -> None:
    """Assert that a run reads up to some commit, the same in every table, or that it is refused."""
    try:
        run, tables = read_all(path)
    except RunFormatError as error:
        assert_is_one_clear_line(error, path)
        return
    commits = len(tables["ops"]) // 4
    for name, table in tables.items():
        assert table.equals(as_table(name, COMMITS[:commits])), name
    assert run.lost == (commits < len(COMMITS))


@given(file=st.sampled_from(FILES), data=st.data())
@settings(max_examples=150)
def test_truncated_file_leaves_a_run_or_an_error(
    file: str, data: st.DataObject, whole: Path, scratch: Path
) -> None:
    content = (whole / file).read_bytes()
    kept = data.draw(st.integers(0, len(content) - 1), label="bytes kept")
    if file == JOURNAL_FILE:
        # What the journal does not say is not part of the run: fewer commits, and no loss known.
        commits = content[:kept].count(b"\n")
        run, tables = read_all(copy_with(whole, scratch, file, content[:kept]))
        assert run.lost == (not commits)  # tables that no line vouches for are not the whole run
        assert tables["ops"].equals(as_table("ops", COMMITS[:commits]))
        return
    assert_reads_or_says_why(copy_with(whole, scratch, file, content[:kept]))


def test_truncated_run_file_is_refused_at_every_byte(whole: Path, scratch: Path) -> None:
    content = (whole / RUN_FILE).read_bytes()
    copy = copy_with(whole, scratch, RUN_FILE, b"")
    for kept in range(len(content) - 2):  # to the closing brace; the line's end does not matter
        (copy / RUN_FILE).write_bytes(content[:kept])
        with pytest.raises(RunFormatError, match="damaged or not attnprof's"):
            open_run(copy)


@given(data=st.data())
@settings(max_examples=100)
def test_changed_byte_of_the_journal_leaves_a_run_or_an_error(
    data: st.DataObject, whole: Path, scratch: Path
) -> None:
    content = bytearray((whole / JOURNAL_FILE).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1), label="position")
    content[at] = data.draw(st.integers(0, 255), label="byte")
    copy = copy_with(whole, scratch, JOURNAL_FILE, bytes(content))
    try:
        read_all(copy)
    except RunFormatError as error:
        assert_is_one_clear_line(error, copy)


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_noticed(file: str, whole: Path, scratch: Path) -> None:
    copy = copy_with(whole, scratch, file, b"")
    (copy / file).unlink()
    with pytest.raises(RunFormatError):
        read_all(copy)


@pytest.mark.parametrize("file", FILES)
def test_file_of_other_bytes_is_noticed(file: str, whole: Path, scratch: Path) -> None:
    length = len((whole / file).read_bytes())
    for content in (b"\0" * length + b"\n", b"\xff" * length + b"\n", b"not a run\n" * length):
        with pytest.raises(RunFormatError):
            read_all(copy_with(whole, scratch, file, content))


def test_loss_of_the_last_commit_leaves_those_before(whole: Path, scratch: Path) -> None:
    file = f"{TABLES_DIR}/ops.arrows"
    content = (whole / file).read_bytes()
    lines = (whole / JOURNAL_FILE).read_bytes().splitlines()
    good = [json.loads(line)["bytes"]["ops"] for line in lines]
    run, tables = read_all(copy_with(whole, scratch, file, content[: good[2] - 1]))
    assert run.lost
    assert tables["ops"].equals(as_table("ops", COMMITS[:2]))
    assert tables["marks"].equals(as_table("marks", COMMITS[:2]))  # a commit is whole or not there


def test_bytes_after_the_last_commit_do_not_matter(whole: Path, scratch: Path) -> None:
    for file in FILES[1:]:
        content = (whole / file).read_bytes() + b"half a commit"
        run, tables = read_all(copy_with(whole, scratch, file, content))
        assert not run.lost
        assert tables["ops"].equals(as_table("ops", COMMITS))


def test_tables_that_do_not_come_with_the_run_are_missed(whole: Path, scratch: Path) -> None:
    copy = copy_with(whole, scratch, RUN_FILE, (whole / RUN_FILE).read_bytes())
    shutil.rmtree(copy / TABLES_DIR)
    with pytest.raises(RunFormatError, match=r"shorter than its journal says .*copy the whole"):
        open_run(copy)


def no_directory(path: Path) -> None: ...


def empty_directory(path: Path) -> None:
    path.mkdir()


def file_in_its_place(path: Path) -> None:
    path.write_text("notes")


def other_directory(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("notes")


def run_file_is_a_directory(path: Path) -> None:
    (path / RUN_FILE).mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (no_directory, "no such directory; expected a directory written by"),
        (empty_directory, f"it has no {RUN_FILE}; expected a directory written by"),
        (other_directory, f"it has no {RUN_FILE}"),
        (file_in_its_place, "it is a file; expected a directory written by"),
        (run_file_is_a_directory, "Is a directory"),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_foreign_path_is_refused(
    make: Callable[[Path], None], words: str, as_text: bool, tmp_path: Path
) -> None:
    path = tmp_path / "path"
    make(path)
    with pytest.raises(RunFormatError, match=words) as caught:
        open_run(str(path) if as_text else path)
    assert str(path) in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"3",
        b"null",
        b'"run"',
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "status": "singing"}',
        b'{"schema_version": 1, "status": null}',
        b'{"schema_version": 1, "status": []}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_foreign_run_file_is_refused(content: bytes, whole: Path, scratch: Path) -> None:
    with pytest.raises(RunFormatError, match="damaged or not attnprof's"):
        open_run(copy_with(whole, scratch, RUN_FILE, content))


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, 1000, "1", None, [1]])
def test_other_schema_version_is_refused(version: Any, whole: Path, scratch: Path) -> None:
    info = {"schema_version": version, "environment": {"attnprof": "77.0"}}
    copy = copy_with(whole, scratch, RUN_FILE, json.dumps(info).encode())
    expected = rf"schema version {version!r}, this attnprof reads {SCHEMA_VERSION}; .*77\.0"
    with pytest.raises(RunFormatError, match=expected.replace("[", r"\[").replace("]", r"\]")):
        open_run(copy)


@pytest.mark.parametrize("environment", [{}, None, [], "1.0", {"attnprof": None}])
def test_other_schema_version_without_a_writer_is_refused(
    environment: Any, whole: Path, scratch: Path
) -> None:
    info = {"schema_version": 99, "environment": environment}
    with pytest.raises(RunFormatError, match="its version is not recorded"):
        open_run(copy_with(whole, scratch, RUN_FILE, json.dumps(info).encode()))


COUNTERS = {
    "allocated_bytes_current": 0,
    "allocated_bytes_peak": 0,
    "reserved_bytes_current": 0,
    "reserved_bytes_peak": 0,
}


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"dry_run": [1]}, r"dry_run is \[1\], expected an object"),
        ({"dry_run": {}}, "dry_run has no 'target'"),
        ({"dry_run": {"target": "cpu", "assumptions": "x"}}, "assumptions is 'x', expected a list"),
        (
            {"dry_run": {"target": "cpu", "tables": [{"at": "m.py:1", "rows": 8}]}},
            r"dry_run.tables\[0\] has no 'used'",
        ),
        ({"allocator": "x"}, "allocator is 'x', expected an object"),
        (
            {"allocator": {"devices": {"cuda:0": {"end": COUNTERS | {"private_bytes": "1"}}}}},
            "allocator.devices.cuda:0.end.private_bytes is '1', expected a whole number from 0 on",
        ),
        ({"allocator": {"devices": {"cuda:0": {"end": {}}}}}, "end has no 'allocated_bytes_curr"),
        ({"snapshot": None}, "snapshot is None, expected an object"),
        ({"environment": {"gpus": 5}}, "environment.gpus is 5, expected a list"),
        ({"environment": {"torch": 2.13}}, "environment.torch is 2.13, expected text or null"),
        ({"workload": {"seq_len": "8", "source": "measured"}}, "workload.seq_len is '8'"),
        ({"workload": {"seq_len": -8, "source": "measured"}}, "workload.seq_len is -8"),
        ({"workload": {"seq_len": True, "source": "measured"}}, "workload.seq_len is True"),
        ({"error": ["x" * 1000]}, "error is .{40}, expected an object"),
    ],
)
def test_run_file_with_values_of_other_types_is_refused(
    info: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_run(tmp_path, COMMITS, **info)
    with pytest.raises(RunFormatError, match=f"damaged or not attnprof's: .*{words}") as caught:
        open_run(tmp_path)
    assert_is_one_clear_line(caught.value, tmp_path)


def test_run_file_may_say_more_than_is_read(tmp_path: Path) -> None:
    more = {"environment": {"rocm": [1]}, "new": 3, "dry_run": {"target": "cpu", "new": None}}
    assert open_run(write_run(tmp_path, COMMITS, **more)).info["new"] == 3


def write_unfinished(path: Path, writer: Any) -> Path:
    return write_run(path, COMMITS, status=Status.RECORDING, writer=writer)


def test_unfinished_run_of_a_dead_process_was_interrupted(tmp_path: Path) -> None:
    import socket

    writer = {"host": socket.gethostname(), "pid": 2**22 + 1, "process_started": 1.0}
    assert open_run(write_unfinished(tmp_path, writer)).status is Status.INTERRUPTED


def test_unfinished_run_whose_process_number_is_used_again_was_interrupted(
    tmp_path: Path,
) -> None:
    import os
    import socket

    writer = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": 1.0}
    assert open_run(write_unfinished(tmp_path, writer)).status is Status.INTERRUPTED


def test_unfinished_run_of_another_machine_may_still_be_recording(tmp_path: Path) -> None:
    writer = {"host": "elsewhere.invalid", "pid": 1, "process_started": 1.0}
    assert open_run(write_unfinished(tmp_path, writer)).status is Status.RECORDING


@pytest.mark.parametrize("writer", [None, [], "me", 3, {}, {"host": None}])
def test_unfinished_run_of_nobody_may_still_be_recording(writer: Any, tmp_path: Path) -> None:
    assert open_run(write_unfinished(tmp_path, writer)).status is Status.RECORDING


@pytest.mark.parametrize("pid", ["one", None, -5, 2**70, 1.5])
def test_unfinished_run_of_no_process_was_interrupted(pid: Any, tmp_path: Path) -> None:
    import socket

    writer = {"host": socket.gethostname(), "pid": pid, "process_started": 1.0}
    assert open_run(write_unfinished(tmp_path, writer)).status is Status.INTERRUPTED


def test_unfinished_run_of_a_process_nobody_waited_for_was_interrupted(tmp_path: Path) -> None:
    import os
    import signal
    import socket
    import subprocess
    import sys
    import time

    import psutil

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = psutil.Process(process.pid).create_time()
        writer = {"host": socket.gethostname(), "pid": process.pid, "process_started": started}
        run = write_unfinished(tmp_path, writer)
        assert open_run(run).status is Status.RECORDING
        os.kill(process.pid, signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert open_run(run).status is Status.INTERRUPTED
