"""Views, tables, scales, and what is kept of a run."""

import gc
import os
import shutil
import socket
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnprof
from attnprof.errors import CommandError
from attnprof.report.compare import list_changes
from attnprof_dashboard.comparison import Comparison
from attnprof_dashboard.components.controls import list_runs
from attnprof_dashboard.data.catalog import Catalog
from attnprof_dashboard.data.derive import derive
from attnprof_dashboard.data.growth_digest import GrowthDigest, Scale, interpolate
from attnprof_dashboard.data.outlook import describe_outlook
from attnprof_dashboard.data.segment_map import describe_allocator
from attnprof_dashboard.data.store import DigestStore
from attnprof_dashboard.figures.bars import draw_bars, draw_lines, draw_waterfall
from attnprof_dashboard.figures.layers import draw_heatmap, draw_own_peaks
from attnprof_dashboard.pages.compare import name_both, write_verdict
from attnprof_dashboard.pages.page import Subject
from attnprof_dashboard.serve import bind
from attnprof_dashboard.table import Column, Link, Table, Unit, write_csv
from attnprof_dashboard.view import View


@given(
    run=st.text(max_size=20),
    layer=st.text(max_size=20),
    t0=st.none() | st.integers(0, 2**62),
    at=st.none() | st.integers(-1, 2**40),
)
def test_view_comes_back_from_its_query(
    run: str, layer: str, t0: int | None, at: int | None
) -> None:
    from urllib.parse import parse_qsl

    view = View(run=run, layer=layer, t0=t0, at=at)
    assert View.read(dict(parse_qsl(view.query()[1:]))) == view


@pytest.mark.parametrize("text", ["", "x", "1.5", "--1", "9" * 30, "²", "0x10", None])
def test_view_leaves_out_what_is_no_number(text: str | None) -> None:
    assert View.read({"t0": text}).t0 is None


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_csv_holds_no_formula(text: str) -> None:
    table = Table((Column("layer", Unit.NAME),), [[text], [Link(text, "/")]])
    lines = write_csv(table).split("\n")
    assert all(not line.strip('"').startswith(text[0]) for line in lines[1:] if line)


def test_csv_has_whole_numbers() -> None:
    table = Table((Column("size_bytes", Unit.BYTES),), [[2**60 + 1], [-5]])
    assert write_csv(table) == f"size_bytes\n{2**60 + 1}\n-5\n"


def test_scale_multiplies_what_depends_on_it() -> None:
    scale = Scale(batch=2, heads=4, item=0.5)
    assert scale.apply("softmax", 100) == 100 * 2 * 4 * 0.5
    assert scale.apply("activations", 100) == 100 * 2 * 0.5
    assert scale.apply("parameters", 100) == 100 * 0.5
    assert scale.apply("inputs", 100) == 100 * 2


@pytest.mark.parametrize("batch", [1, 4])
def test_estimate_for_another_batch_is_its_measured_peak(batch: int) -> None:
    def make_growth(batch: int) -> attnprof.Growth:
        return attnprof.sweep(
            lambda seq_len, device: make_layer_step(batch, seq_len), seq_lens=[16, 32, 64]
        )

    digest = GrowthDigest(describe_outlook(make_growth(2))["growth"])
    estimates = dict(digest.predict(Scale(batch=batch / 2)))
    measured = make_growth(batch)
    for n in (16, 64):
        assert estimates[n] == pytest.approx(measured.predict(n), rel=0.05)


def make_layer_step(batch: int, seq_len: int) -> Callable[[], None]:
    """Return a step of a layer whose gradients outweigh its data where sequences are short."""
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 2, 256, dropout=0.0, batch_first=True)
    x = torch.ones(batch, seq_len, 64)

    def step() -> None:
        layer(x).square().mean().backward()
        layer.zero_grad()

    return step


def test_wall_is_read_off_between_points() -> None:
    squares = [(n, n * n) for n in (10, 100, 1000)]
    assert interpolate(squares, 400) == pytest.approx(20, abs=1)
    assert interpolate(squares, 50) is None
    assert interpolate(squares, 10**9) is None


def test_names_are_no_markup_in_figures() -> None:
    name = "</script><a href='http://evil.example'>x</a>"
    figures = [
        draw_heatmap({(name, "softmax"): 5}, scheme="light"),
        draw_own_peaks({name: 5}, {name: 5}, scheme="dark"),
        draw_bars([name], {name: [5]}, scheme="light"),
        draw_lines([0, 1], {name: [1, 2]}, scheme="light", title="step"),
        draw_waterfall((name, 5), [(name, 1)], (name, 6), scheme="light"),
    ]
    for figure in figures:
        assert "<a href" not in figure.to_json().replace("\\u003c", "<")


def test_segments_hold_what_is_reserved(runs: Path) -> None:
    run = attnprof.load(runs / "train" / "eager")
    found = describe_allocator(run, "cpu", run.attribution.allocations)
    assert found is not None
    assert not found["is_recorded"]
    segments = found["segments"]
    assert sum(s["size_bytes"] for s in segments) == found["reserved_peak_bytes"]
    assert max(found["reserved_bytes"]) == found["reserved_peak_bytes"]
    for segment in segments:
        assert sum(size for size, _ in segment["blocks"]) == segment["size_bytes"]
        assert sum(size for size, name in segment["blocks"] if not name) == segment["free_bytes"]


def test_live_blocks_are_those_of_the_api(runs: Path, cache: Path) -> None:
    digest = DigestStore(Catalog(runs), cache).open("train/eager").digest
    assert digest is not None
    device = digest.device()
    peak = attnprof.load(runs / "train" / "eager").peak()
    live = device.live_at(device.peak_event)
    assert live["allocation_id"].to_list() == peak.allocations["allocation_id"].to_list()
    assert int(live["size_bytes"].sum()) == peak.total_bytes
    at = device.index.categories_at(np.array([device.peak_event]))
    assert {name: int(size[0]) for name, size in at.items() if size[0]} == peak.by_category()


def test_instant_after_the_end_is_the_end(runs: Path, cache: Path) -> None:
    digest = DigestStore(Catalog(runs), cache).open("decode").digest
    assert digest is not None
    device = digest.device()
    last = device.live_at(len(device.index) - 1)
    assert device.live_at(10**6).equals(last)
    assert device.allocated_between(10**6, 10**7).is_empty()


def test_peak_of_a_step_is_the_apis(runs: Path, cache: Path) -> None:
    digest = DigestStore(Catalog(runs), cache).open("train/eager").digest
    assert digest is not None
    device = digest.device()
    steps = attnprof.load(runs / "train" / "eager").steps
    expected = dict(steps.select("step", "peak_bytes").iter_rows())
    found = {step: int(device.index.total_bytes[e]) for step, e in device.peak_of_step.items()}
    assert found == expected


def test_blocks_between_two_instants_are_the_later_ones(runs: Path, cache: Path) -> None:
    digest = DigestStore(Catalog(runs), cache).open("train/eager").digest
    assert digest is not None
    device = digest.device()
    first, second = 20, device.peak_event
    before = set(device.live_at(first)["allocation_id"])
    now = set(device.live_at(second)["allocation_id"])
    assert set(device.allocated_between(first, second)["allocation_id"]) == now - before


def test_run_is_derived_once(runs: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert DigestStore(Catalog(runs), tmp_path / "cache").open("decode").digest is not None
    kept = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert len(kept) == 1
    assert os.stat(tmp_path / "cache").st_mode & 0o077 == 0


def test_long_run_is_derived_in_another_process(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnprof_dashboard.data.store._LONG_RUN_BYTES", 0)
    store = DigestStore(Catalog(runs), tmp_path / "cache")
    assert store.open("decode").is_pending
    for thread in list(store._working.values()):
        thread.join(timeout=120)
    assert store.open("decode").digest is not None


def test_long_runs_are_derived_one_after_the_other(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnprof_dashboard.data.store._LONG_RUN_BYTES", 0)
    busy: list[Path] = []
    most: list[int] = []

    def derive_slowly(path: Path, out: Path) -> None:
        busy.append(path)
        time.sleep(0.1)
        most.append(len(busy))
        busy.remove(path)
        derive(path, out)

    monkeypatch.setattr("attnprof_dashboard.data.store._run_derive", derive_slowly)
    store = DigestStore(Catalog(runs), tmp_path / "cache")
    for key in ("job/rank-0", "job/rank-1", "decode"):
        assert store.open(key).is_pending
    for thread in list(store._working.values()):
        thread.join(timeout=120)
    assert most == [1, 1, 1]


@pytest.fixture
def own_run(runs: Path, tmp_path: Path) -> Path:
    """Return a run that a test may change, alone in its directory."""
    shutil.copytree(runs / "decode", tmp_path / "runs" / "own")
    return tmp_path / "runs" / "own"


def list_kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_older_states_of_a_run_are_not_kept(own_run: Path, tmp_path: Path) -> None:
    store = DigestStore(Catalog(own_run.parent), tmp_path / "cache")
    assert store.open("own").digest is not None
    before = list_kept(store.folder)
    os.utime(own_run / "run.json", (1, 1))
    assert store.open("own").digest is not None
    after = list_kept(store.folder)
    assert (len(before), len(after)) == (1, 1)
    assert before != after


def test_derived_runs_are_bounded_by_their_bytes(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DigestStore(Catalog(runs), tmp_path / "cache")
    store.open("decode")
    (first,) = list_kept(store.folder)
    store.open("job/rank-0")
    assert len(list_kept(store.folder)) == 2
    os.utime(store.folder / first, (1, 1))
    monkeypatch.setattr("attnprof_dashboard.data.store._MOST_KEPT_BYTES", 1)
    assert store.open("job/rank-1").digest is not None
    assert len(list_kept(store.folder)) == 1
    # What another dashboard deleted is derived again.
    assert store.open("decode").digest is not None


def test_derived_run_that_goes_while_it_is_opened_is_told(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DigestStore(Catalog(runs), tmp_path / "cache")
    store.open("decode")

    def fail(path: Path) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr("attnprof_dashboard.data.store.os.utime", fail)
    other = DigestStore(Catalog(runs), tmp_path / "cache")
    assert "cannot be read" in other.open("decode").error


def test_server_says_that_its_port_is_taken(runs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CommandError, match="port"):
        bind(runs, port=taken.getsockname()[1], cache=tmp_path)


def test_printed_address_has_the_token_whatever_is_in_it(runs: Path, tmp_path: Path) -> None:
    serving = bind(runs, port=0, token="a&b#c d+é", cache=tmp_path)
    serving.close()
    assert parse_qs(urlsplit(serving.address).query) == {"token": ["a&b#c d+é"]}


def test_server_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no directory"):
        bind(tmp_path / "none")


def write_difference(**change: int) -> str:
    """Return what is said of two runs that differ by these bytes of each category."""
    first = dict.fromkeys(change, 1000)
    second = {name: 1000 + size for name, size in change.items()}
    comparison = Comparison(
        sum(first.values()), sum(second.values()), tuple(list_changes(first, second)), (), (), ()
    )
    return write_verdict("one", "two", comparison)


def test_verdict_names_what_moved_the_peak_its_way() -> None:
    assert write_difference(softmax=30, inputs=-9).endswith(
        "is 21 B (1.1 %) higher than that of one: softmax, +30 B, against inputs, -9 B."
    )
    assert write_difference(softmax=-30, inputs=40).endswith(
        "higher than that of one: inputs, +40 B, against softmax, -30 B."
    )
    assert write_difference(softmax=-30, inputs=-9).endswith(
        "lower than that of one; the largest part of it is softmax, -30 B."
    )
    assert write_difference(softmax=30, inputs=-30).endswith("to the byte.")


def test_comparison_of_two_devices_names_them(runs: Path, cache: Path) -> None:
    digest = DigestStore(Catalog(runs), cache).open("decode").digest
    entry = Catalog(runs).find("decode")
    assert digest is not None
    assert entry is not None
    device, other = digest.device(), copy(digest.device())
    subject = Subject(entry, View(), "light", digest, device)
    assert name_both(subject, "other", other) == ("decode", "other")
    other.name = "cuda:0"
    assert name_both(subject, "other", other) == ("decode on cpu", "other on cuda:0")


def test_runs_of_sweeps_have_their_whole_names(runs: Path) -> None:
    groups = list_runs(Catalog(runs).entries())
    items = [item for group in groups for item in group["items"]]
    assert {"value": "sweep/measured-000000064", "label": "sweep/measured-000000064"} in items


def test_notebook_keeps_a_run_that_nobody_else_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import attnprof_dashboard

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with attnprof.trace() as tracer:
        torch.ones(8)
    path = tracer.run.path
    view = attnprof_dashboard.jupyter(tracer.run)
    del tracer
    gc.collect()
    assert path.exists()
    view.close()
    del view
    gc.collect()
    assert not path.exists()


def test_notebook_shows_a_frame_with_the_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnprof_dashboard

    monkeypatch.setenv("XDG_CACHE_HOME", str(runs.parent / "notebook-cache"))
    view = attnprof_dashboard.jupyter(attnprof.load(runs / "decode"))
    html = view._repr_html_()
    assert "<iframe" in html
    assert "run=decode" in html
    assert "http://localhost:" in html
    view.close()
