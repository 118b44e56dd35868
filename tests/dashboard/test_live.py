"""Following a run: nothing is read twice, the peak is exact, and the writer does not notice."""

import shutil
from pathlib import Path

import pytest
from known_token import TOKEN

import attnprof
from attnprof.store import RunWriter
from attnprof.store.schema import BORN, FREED, RESIZED
from attnprof.vocabulary import Status
from attnprof_dashboard.app import create_app
from attnprof_dashboard.data.catalog import Catalog
from attnprof_dashboard.data.live import LiveRun, LiveStore
from attnprof_dashboard.data.live_device import OTHER, WINDOW_SECONDS, Device
from attnprof_dashboard.pages.live import tick


def make_events(*rows: tuple[int, int, int, int]) -> dict[str, dict[str, list[object]]]:
    """Return a commit of (storage, kind, bytes, nanoseconds)."""
    storage, kind, size, time_ns = map(list, zip(*rows, strict=True))
    count = len(rows)
    device = [-1 if k == FREED else 0 for k in kind]
    return {
        "storage_events": {
            "storage": storage, "kind": kind, "size_bytes": size, "address": [0] * count,
            "device": device, "time_ns": time_ns, "op": [0] * count, "signature": [-1] * count,
        }
    }  # fmt: skip


DEVICES: dict[str, dict[str, list[object]]] = {"devices": {"name": ["cpu"]}}


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    (tmp_path / "run").mkdir()
    return RunWriter(tmp_path / "run", {})


@pytest.mark.parametrize("name", ["train/eager", "train/fused", "decode"])
def test_peak_of_a_followed_run_is_that_of_the_api(runs: Path, name: str) -> None:
    live = LiveRun(runs / name)
    live.update(budget_seconds=60)
    peak = attnprof.load(runs / name).peak()
    found = live.devices[peak.device].peak
    assert found is not None
    assert found.total_bytes == peak.total_bytes
    assert sum(size for _, size in found.by_role) == peak.total_bytes


def test_parameters_are_told_apart(runs: Path) -> None:
    live = LiveRun(runs / "train" / "eager")
    live.update(budget_seconds=60)
    peak = live.devices["cpu"].peak
    assert peak is not None
    expected = attnprof.load(runs / "train" / "eager").peak().by_category()["parameters"]
    assert dict(peak.by_role)["parameters"] == expected


def test_gradients_are_told_apart(writer: RunWriter) -> None:
    ops: dict[str, dict[str, list[object]]] = {
        "ops": {
            "time_ns": [1, 2], "code": [0, 0], "scope": [-1, -1], "thread": [0, 0], "seq": [0, 0],
            "node": [7, -2 - 0], "n_in": [1, 1], "n_out": [1, 1],  # the second accumulates
        },
        "operands": {"storage": [0, 1, 1, 2], "signature": [0] * 4},
    }  # fmt: skip
    events = make_events((0, BORN, 100, 1), (1, BORN, 30, 2), (2, BORN, 40, 3))
    writer.commit({**DEVICES, **ops, **events})
    live = LiveRun(writer.path)
    live.update()
    peak = live.devices["cpu"].peak
    assert peak is not None
    assert dict(peak.by_role) == {"gradients": 40, OTHER: 100 + 30}
    writer.close(Status.COMPLETED)


def test_only_what_was_added_is_read(writer: RunWriter) -> None:
    live = LiveRun(writer.path)
    writer.commit({**DEVICES, **make_events((0, BORN, 100, 1), (1, BORN, 50, 2))})
    live.update()
    assert (live.events, live.devices["cpu"].total_bytes) == (2, 150)
    live.update()
    assert live.events == 2
    writer.commit(make_events((0, FREED, 0, 3), (1, RESIZED, 80, 4)))
    live.update()
    assert (live.events, live.devices["cpu"].total_bytes) == (4, 80)
    peak = live.devices["cpu"].peak
    assert peak is not None
    assert peak.total_bytes == 150
    writer.close(Status.COMPLETED)


def test_half_a_line_of_the_journal_waits(writer: RunWriter) -> None:
    writer.commit({**DEVICES, **make_events((0, BORN, 100, 1))})
    journal = writer.path / "journal.jsonl"
    whole = journal.read_bytes()
    writer.commit(make_events((1, BORN, 11, 2)))
    both = journal.read_bytes()
    journal.write_bytes(both[: len(whole) + 9])
    live = LiveRun(writer.path)
    live.update()
    assert live.devices["cpu"].total_bytes == 100
    journal.write_bytes(both)
    live.update()
    assert live.devices["cpu"].total_bytes == 111
    writer.close(Status.COMPLETED)


def test_catching_up_stops_when_its_time_is_over(writer: RunWriter) -> None:
    writer.commit({**DEVICES, **make_events((0, BORN, 1, 1))})
    writer.commit(make_events((1, BORN, 1, 2)))
    live = LiveRun(writer.path)
    live.update(budget_seconds=-1)
    assert live.is_behind
    live.update()
    assert not live.is_behind
    assert live.devices["cpu"].total_bytes == 2
    writer.close(Status.COMPLETED)


def test_old_extremes_leave_the_window_but_the_peak_stays(writer: RunWriter) -> None:
    second = 1_000_000_000
    late = 600 * second
    writer.commit(
        {**DEVICES, **make_events((0, BORN, 900, 0), (0, FREED, 0, 1), (1, BORN, 5, late))}
    )
    live = LiveRun(writer.path)
    live.update()
    device = live.devices["cpu"]
    assert max(i.total_bytes for i in device.instants(late - 60 * second, late)) == 5
    assert device.peak is not None
    assert device.peak.total_bytes == 900
    writer.close(Status.COMPLETED)


def test_window_ends_with_what_is_live_now(writer: RunWriter) -> None:
    """The extremes of a tenth of a second do not say what was left at its end."""
    writer.commit({**DEVICES, **make_events((0, BORN, 7, 1), (1, BORN, 900, 2), (1, FREED, 0, 3))})
    writer.commit(make_events((0, FREED, 0, 4), (2, BORN, 30, 5)))
    live = LiveRun(writer.path)
    live.update()
    instants = live.devices["cpu"].instants(0, live.last_ns)
    assert [instant.total_bytes for instant in instants] == [907, 0, 30]
    quiet = live.devices["cpu"].instants(10**12, 10**12 + 5)
    assert [(instant.time_ns, instant.total_bytes) for instant in quiet] == [(10**12 + 5, 30)]
    assert Device().instants(0, 5) == []
    writer.close(Status.COMPLETED)


def test_short_run_is_drawn_event_by_event() -> None:
    device = Device()
    sizes = [5, -3, 7, -1, 2, -9]
    for number, size in enumerate(sizes):
        device.change(number * 1_000_000, size)
    instants = device.instants(0, 5_000_000)
    assert [instant.total_bytes for instant in instants] == [5, 2, 9, 8, 10, 1]


@pytest.mark.parametrize("gap_ns", [1_000, 40_000_000, 300_000_000])
def test_long_run_keeps_the_extremes_of_its_window(gap_ns: int) -> None:
    device = Device()
    totals = [(number * 37) % 1009 for number in range(20_000)]
    for number, total in enumerate(totals):
        device.change(number * gap_ns, total - device.total_bytes)
    now = (len(totals) - 1) * gap_ns
    since = max(0, now - int(WINDOW_SECONDS * 1e9))
    shown = [instant.total_bytes for instant in device.instants(since, now)]
    inside = totals[-(-since // gap_ns) :]
    assert len(device.bins) <= 2 + int(WINDOW_SECONDS * 10.1)
    assert device.bin_ns <= 100_000_000
    assert max(shown) >= max(inside)
    assert min(shown) <= min(inside)
    # Where there is room for every event, none is left out.
    assert gap_ns < 100_000_000 or set(inside) <= set(shown)


def make_counted(*rows: tuple[int, int, int, int]) -> dict[str, dict[str, list[object]]]:
    """Return a commit of counted (step, nanoseconds of its end, bytes after it, peak in it)."""
    step, end_ns, allocated, peak = map(list, zip(*rows, strict=True))
    nothing = [0] * len(rows)
    return {
        "counted_steps": {
            "op": nothing, "step": step, "device": nothing, "begin_ns": nothing, "end_ns": end_ns,
            "allocated_bytes": allocated, "peak_bytes": peak, "reserved_bytes": nothing,
        }
    }  # fmt: skip


def test_steps_that_are_only_counted_are_followed_too(writer: RunWriter) -> None:
    writer.commit({**DEVICES, **make_events((0, BORN, 100, 1), (1, BORN, 50, 2))})
    writer.commit(make_counted((0, 10, 170, -1), (1, 20, 160, 900)))
    live = LiveRun(writer.path)
    live.update()
    device = live.devices["cpu"]
    assert live.steps == 2
    assert device.total_bytes == 160
    assert device.named["only counted"] == 10
    assert device.peak is not None
    assert (device.peak.time_ns, device.peak.total_bytes) == (20, 900)
    writer.commit(make_events((1, FREED, 0, 30)))
    live.update()
    assert device.total_bytes == 110
    writer.close(Status.COMPLETED)


def test_page_of_an_ended_run_tells_of_one_that_begins(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnprof_dashboard.data.catalog._FRESH_SECONDS", 0.0)
    root = tmp_path / "runs"
    shutil.copytree(runs / "decode", root / "old")
    app = create_app(Catalog(root), token=TOKEN, cache=tmp_path / "cache")

    def look(key: str, pace: int) -> tuple[str, int, str]:
        with app.server.test_request_context("/"):
            _, said, pace, names = tick(1, pace, {"run": key})
            return str(said), pace, str(names)

    said, pace, names = look("old", 1000)
    assert "No run here is being recorded now" in said
    assert "(recording)" not in names
    (root / "new").mkdir()
    writer = RunWriter(root / "new", {})
    writer.commit({**DEVICES, **make_events((0, BORN, 100, 1))})
    said, pace, names = look("old", pace)
    assert "Being recorded now" in said
    assert "new  (recording)" in names
    assert look("new", 1000)[1] == 1000
    writer.close(Status.COMPLETED)
    assert look("new", 1000)[1] == pace
    assert "(recording)" not in look("new", pace)[2]


def test_damaged_table_is_an_error(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "train" / "eager", tmp_path / "run")
    table = tmp_path / "run" / "tables" / "storage_events.arrows"
    table.write_bytes(b"\0" * table.stat().st_size)
    with pytest.raises(ValueError, match="damaged"):
        LiveRun(tmp_path / "run").update(budget_seconds=60)


def test_run_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LiveStore().follow(tmp_path / "gone")


def test_following_changes_no_file(runs: Path) -> None:
    files = sorted(file for file in (runs / "decode").rglob("*") if file.is_file())
    before = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    LiveStore().follow(runs / "decode")
    assert [(file.stat().st_mtime_ns, file.stat().st_size) for file in files] == before
