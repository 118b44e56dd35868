"""The catalogue: whatever lies in the directory is a row, and nothing outside of it is reached."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest

from attnprof.store.schema import JOURNAL_FILE, RUN_FILE, SCHEMA_VERSION, TABLES_DIR
from attnprof.vocabulary import Status
from attnprof_dashboard.data.catalog import DELETED, EMPTY, UNREADABLE, Catalog, Entry, Kind


def make_run(path: Path, *, status: str = "completed", created: str = "", **more: object) -> Path:
    (path / TABLES_DIR).mkdir(parents=True)
    info = {"schema_version": SCHEMA_VERSION, "status": status, "created": created, **more}
    (path / RUN_FILE).write_text(json.dumps(info))
    (path / JOURNAL_FILE).write_text("")
    return path


def find(root: Path, key: str) -> Entry:
    entry = Catalog(root).find(key)
    assert entry is not None, [e.key for e in Catalog(root).entries()]
    return entry


def test_runs_of_any_depth_are_listed_newest_first(tmp_path: Path) -> None:
    make_run(tmp_path / "old", created="2026-01-01T00:00:00+00:00")
    make_run(tmp_path / "group" / "new", created="2026-02-01T00:00:00+00:00")
    assert [entry.key for entry in Catalog(tmp_path).entries()] == ["group/new", "old"]


def test_directory_that_is_a_run_is_its_only_row(tmp_path: Path) -> None:
    make_run(tmp_path / "one")
    assert [entry.key for entry in Catalog(tmp_path / "one").entries()] == ["one"]


def test_sweep_and_its_runs_are_rows(runs: Path) -> None:
    assert find(runs, "sweep").kind is Kind.SWEEP
    assert find(runs, "sweep/measured-000000064").sweep == "sweep"


def test_directory_without_anything_has_no_rows(tmp_path: Path) -> None:
    assert Catalog(tmp_path).entries() == []
    assert Catalog(tmp_path / "missing").entries() == []


def test_empty_directory_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert find(tmp_path, "empty").status == EMPTY


@pytest.mark.parametrize("text", ["", "{", "[]", '"run"', "null", '{"schema_version": 1}'])
def test_damaged_run_is_unreadable(tmp_path: Path, text: str) -> None:
    make_run(tmp_path / "damaged")
    (tmp_path / "damaged" / RUN_FILE).write_text(text)
    assert find(tmp_path, "damaged").status == UNREADABLE


def test_run_without_its_json_is_unreadable(tmp_path: Path) -> None:
    (make_run(tmp_path / "half") / RUN_FILE).unlink()
    assert find(tmp_path, "half").status == UNREADABLE


def test_other_schema_version_says_so(tmp_path: Path) -> None:
    path = make_run(tmp_path / "newer")
    (path / RUN_FILE).write_text(json.dumps({"schema_version": 99, "status": "completed"}))
    assert "99" in find(tmp_path, "newer").reason


def test_failed_run_says_what_ended_it(runs: Path) -> None:
    entry = find(runs, "failed")
    assert entry.status == Status.FAILED.value
    assert entry.reason == "ImportError: no module named '<b>nothing</b>'"


def test_recording_run_of_a_dead_writer_was_interrupted(tmp_path: Path) -> None:
    here = {"host": socket.gethostname(), "process_started": 0.0}
    make_run(tmp_path / "live", status="recording")
    make_run(tmp_path / "dead", status="recording", writer={"pid": 2**22 + 1, **here})
    assert find(tmp_path, "live").status == Status.RECORDING.value
    assert find(tmp_path, "dead").status == Status.INTERRUPTED.value


def test_deleted_run_stays_as_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(tmp_path)
    make_run(tmp_path / "gone")
    assert catalog.find("gone") is not None
    shutil.rmtree(tmp_path / "gone")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    entry = catalog.find("gone")
    assert entry is not None
    assert entry.status == DELETED


def test_link_is_refused_wherever_it_leads(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside" / "secret")
    inside = make_run(tmp_path / "root" / "inside")
    (tmp_path / "root" / "link-out").symlink_to(outside)
    (tmp_path / "root" / "link-in").symlink_to(inside)
    kinds = {entry.key: entry.kind for entry in Catalog(tmp_path / "root").entries()}
    assert kinds == {"inside": Kind.RUN, "link-out": Kind.REFUSED, "link-in": Kind.REFUSED}


@pytest.mark.parametrize("name", [RUN_FILE, JOURNAL_FILE, TABLES_DIR, f"{TABLES_DIR}/ops.arrows"])
def test_run_with_a_file_that_is_a_link_is_not_inside(tmp_path: Path, name: str) -> None:
    path = make_run(tmp_path / "root" / "run")
    catalog = Catalog(tmp_path / "root")
    entry = catalog.find("run")
    assert entry is not None
    assert catalog.is_inside(entry)
    target = path / name
    other = make_run(tmp_path / "other")
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.symlink_to(other / TABLES_DIR if name == TABLES_DIR else other / RUN_FILE)
    assert not catalog.is_inside(entry)


@pytest.mark.parametrize("key", ["../outside", "/etc", "run/../../outside", ".", "", "run\0"])
def test_key_is_looked_up_and_never_a_path(tmp_path: Path, key: str) -> None:
    make_run(tmp_path / "outside")
    make_run(tmp_path / "root" / "run")
    assert Catalog(tmp_path / "root").find(key) is None


def test_ranks_are_read_from_directories(tmp_path: Path) -> None:
    make_run(tmp_path / "job" / "rank-0")
    make_run(tmp_path / "job" / "rank-11")
    assert [e.rank for e in Catalog(tmp_path).entries()] == [11, 0]


def test_five_hundred_runs_are_listed(tmp_path: Path) -> None:
    for number in range(500):
        make_run(tmp_path / f"run-{number:03}")
    assert len(Catalog(tmp_path).entries()) == 500
