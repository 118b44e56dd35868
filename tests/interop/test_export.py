"""Runs in other tools' formats, opened by those tools where they are at hand."""

import io
import json
import pickletools
from pathlib import Path

import polars as pl
import pytest
import torch
from torch.cuda import _memory_viz

import attnprof
from attnprof.interop.exporting import FORMATS, render_csv, render_parquet
from attnprof.interop.importing import import_snapshot
from attnprof.interop.memory_viz import make_snapshot, render_memory_viz
from attnprof.interop.perfetto import render_perfetto
from attnprof.interop.unpickle import load_plain
from attnprof.run import Run
from tests.interop.recordings import make_recorded, write_pickle

# What ``unpickle`` in torch/utils/viz/MemoryViz.js (torch 2.13) knows.
PAGE_OPCODES = {
    "APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT",
    "BINUNICODE", "DICT", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1",
    "LONG_BINGET", "LONG_BINPUT", "MARK", "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO",
    "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that attnprof recorded, on the CPU."""
    model = torch.nn.Sequential(Attention(), Attention())
    optimizer = torch.optim.Adam(model.parameters())
    directory = tmp_path_factory.mktemp("traced") / "run"
    with attnprof.trace(directory, samples_per_second=0) as tracer:
        for _ in range(2):
            model(torch.randn(2, 64, 32)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracer.run


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run made of a recorded snapshot."""
    folder = tmp_path_factory.mktemp("imported")
    path = write_pickle(folder / "s.pickle", make_recorded("default")[0])
    import_snapshot(path, folder / "run")
    return attnprof.load(folder / "run")


@pytest.fixture(params=["traced", "imported"])
def run(request: pytest.FixtureRequest) -> Run:
    result: Run = request.getfixturevalue(request.param)
    return result


def bring_back(run: Run, folder: Path) -> Run:
    (folder / "again.pickle").write_bytes(render_memory_viz(run))
    import_snapshot(folder / "again.pickle", folder / "again")
    return attnprof.load(folder / "again")


def test_round_trip_keeps_peak_and_categories(run: Run, tmp_path: Path) -> None:
    again = bring_back(run, tmp_path)
    assert again.peak().total_bytes == run.peak().total_bytes
    assert again.peak().by_category() == run.peak().by_category()
    assert again.peak().phase == run.peak().phase


def test_round_trip_keeps_layers_and_ops(run: Run, tmp_path: Path) -> None:
    again = bring_back(run, tmp_path)
    assert again.peak().by_layer().equals(run.peak().by_layer())
    ops = [r.allocations["op"].cast(pl.String).sort().to_list() for r in (run, again)]
    assert ops[0] == ops[1]


def test_round_trip_says_that_names_are_inferred(traced: Run, tmp_path: Path) -> None:
    assert not bring_back(traced, tmp_path).allocations["exact"].any()


def test_snapshot_is_plain_data_that_the_page_can_read(run: Run, tmp_path: Path) -> None:
    content = render_memory_viz(run)
    opcodes = list(pickletools.genops(content))
    assert {opcode.name for opcode, _, _ in opcodes} <= PAGE_OPCODES
    assert opcodes[0][1] == 4  # the newest protocol that it reads
    path = tmp_path / "s.pickle"
    path.write_bytes(content)
    assert set(load_plain(path)) >= {"segments", "device_traces"}


def test_page_finds_the_category_that_it_cannot_do_without(run: Run) -> None:
    for trace in make_snapshot(run)["device_traces"]:
        assert "unknown" in {entry.get("category") for entry in trace}


def test_torchs_own_viewer_opens_it(run: Run) -> None:
    snapshot = make_snapshot(run)
    stats = _memory_viz.segsum(snapshot)  # checks that blocks and gaps fill each segment
    assert "total_allocated" in stats
    assert "snapshot.pickle" in _memory_viz.trace_plot(snapshot)
    assert "snapshot.pickle" in _memory_viz.segment_plot(snapshot)
    lines = _memory_viz.trace(snapshot).splitlines()
    allocations = [line for line in lines if " = " in line and "cudaMalloc" not in line]
    assert len(allocations) == run.allocations.filter(pl.col("size_bytes") > 0).height


def test_flamegraph_of_torchs_viewer_has_our_names(traced: Run) -> None:
    lines = _memory_viz.memory(make_snapshot(traced), format_flamegraph=str)
    assert "category:0:parameters" in lines
    assert "layer:0:0.qkv" in lines


def test_live_blocks_of_the_viewer_are_those_of_the_run(traced: Run) -> None:
    live = traced.allocations.filter(pl.col("end_ns").is_null())["size_bytes"].sum()
    segments = make_snapshot(traced)["segments"]
    assert sum(segment["requested_size"] for segment in segments) == live


def test_perfetto_counters_sum_to_the_timeline(run: Run) -> None:
    events = json.loads(render_perfetto(run))["traceEvents"]
    counters: dict[str, dict[float, list[int]]] = {}
    for event in events:
        if event["ph"] == "C":
            at = counters.setdefault(event["name"], {}).setdefault(event["ts"], [])
            at.append(event["args"]["bytes"])
    total = counters.pop("total")
    assert max(max(values) for values in total.values()) == run.peak().total_bytes
    for ts, values in total.items():
        assert [sum(parts) for parts in zip(*(c[ts] for c in counters.values()), strict=True)] == (
            values
        )


def test_perfetto_has_spans_of_steps_phases_and_layers(traced: Run) -> None:
    events = json.loads(render_perfetto(traced))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    names = {event["name"] for event in spans}
    assert {"step 0", "step 1", "forward", "backward", "optimizer", "0.qkv"} <= names
    assert all(event["dur"] >= 0 for event in spans)


def test_perfetto_has_annotations_of_an_imported_run(imported: Run) -> None:
    events = json.loads(render_perfetto(imported))["traceEvents"]
    spans = [e for e in events if e["ph"] == "X" and e["name"] == "Optimizer.step#AdamW.step"]
    assert len(spans) == 3


def test_parquet_is_the_table_of_allocations(run: Run) -> None:
    table = pl.read_parquet(io.BytesIO(render_parquet(run)))
    assert table.columns == run.allocations.columns
    assert table["size_bytes"].equals(run.allocations["size_bytes"])
    assert table["shape"].equals(run.allocations["shape"])


def test_csv_is_the_table_of_allocations(traced: Run) -> None:
    table = pl.read_csv(io.StringIO(render_csv(traced)), infer_schema_length=None)
    assert table.columns == traced.allocations.columns
    assert table["size_bytes"].sum() == traced.allocations["size_bytes"].sum()
    assert "2x64x64" in table["shape"].to_list()


def test_formats_have_names_and_endings() -> None:
    assert list(FORMATS) == ["memory_viz", "perfetto", "parquet", "csv"]
    assert len({chosen.suffix for chosen in FORMATS.values()}) == len(FORMATS)
