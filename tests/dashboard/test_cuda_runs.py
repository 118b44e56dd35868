"""Runs on CUDA: what pages say of the allocator is its own history, held against torch's counters.

The runs are those of ``tests/traced/recorded``.
"""

import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from flask.testing import FlaskClient
from known_token import TOKEN

import attnprof
from attnprof.analysis.allocator.settings import AllocatorSettings
from attnprof.units import format_bytes
from attnprof_dashboard.app import create_app
from attnprof_dashboard.data.catalog import Catalog
from attnprof_dashboard.data.live import LiveRun
from attnprof_dashboard.data.live_allocator import Event, LiveAllocator
from attnprof_dashboard.data.segment_map import describe_allocator

RECORDED = Path(__file__).parents[1] / "traced" / "recorded"
CASES = sorted(path.stem for path in RECORDED.glob("*.zip"))
GPU = "cuda:0"
MIB = 2**20

Unpack = Callable[[str], Path]


@pytest.fixture(scope="session")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Unpack:
    root = tmp_path_factory.mktemp("cuda") / "runs"

    @cache
    def unpack_case(case: str) -> Path:
        with zipfile.ZipFile(RECORDED / f"{case}.zip") as archive:
            archive.extractall(root / case)
        return root / case

    return unpack_case


@pytest.fixture
def client(unpack: Unpack, cache: Path) -> FlaskClient:
    """Return a client of a dashboard on two of the runs."""
    root = unpack("gpt2").parent
    unpack("out_of_memory")
    found = create_app(Catalog(root), token=TOKEN, cache=cache).server.test_client()
    found.get(f"/?token={TOKEN}", headers={"Host": "127.0.0.1"})
    return found


def save(client: FlaskClient, address: str) -> str:
    response = client.get(f"/export/{address}", headers={"Host": "127.0.0.1"})
    assert response.status_code == 200
    return response.get_data(as_text=True)


def find_root(client: FlaskClient) -> Path:
    root: Path = client.application.extensions["attnprof"].catalog.root
    return root


def count(run: attnprof.Run) -> dict[str, int]:
    """Return torch's own counters of the first GPU."""
    return {each.counter: each.counted_bytes for each in run.reconciliation() if each.device == GPU}


def describe(path: Path) -> tuple[attnprof.Run, pl.DataFrame, dict[str, Any]]:
    run = attnprof.load(path)
    frame = run.attribution.allocations.filter(pl.col("device").cast(pl.String) == GPU)
    found = describe_allocator(run, GPU, frame)
    assert found is not None
    return run, frame, found


@pytest.mark.parametrize("case", CASES)
def test_levels_and_segments_are_those_that_torch_counted(unpack: Unpack, case: str) -> None:
    run, _, found = describe(unpack(case))
    counted = count(run)
    assert found["is_recorded"]
    if "allocated_bytes.all.peak" in counted:  # else it is in a step that was only counted
        assert found["allocated_peak_bytes"] == counted["allocated_bytes.all.peak"]
    assert found["allocated_bytes"][-1] == counted["allocated_bytes.all.current"]
    assert found["reserved_bytes"][-1] == counted["reserved_bytes.all.current"]
    assert max(found["reserved_bytes"]) == found["reserved_peak_bytes"]
    if "reserved_bytes.all.peak" in counted:
        assert found["reserved_peak_bytes"] == counted["reserved_bytes.all.peak"]


@pytest.mark.parametrize("case", CASES)
def test_segments_hold_the_blocks_that_were_live(unpack: Unpack, case: str) -> None:
    _, frame, found = describe(unpack(case))
    at = found["segments_position"]
    live = frame.filter((pl.col("start") <= at) & (pl.col("end") > at))
    sums = live.group_by(pl.col("category").cast(pl.String)).agg(pl.col("size_bytes").sum())
    held: Counter[str] = Counter()
    for segment in found["segments"]:
        assert sum(size for size, _ in segment["blocks"]) == segment["size_bytes"]
        for size, name in segment["blocks"]:
            held[name] += size
    assert held.pop("", 0) == sum(segment["free_bytes"] for segment in found["segments"])
    assert held == dict(sums.iter_rows())


def test_failed_request_is_beside_the_largest_free_block(unpack: Unpack) -> None:
    run, _, found = describe(unpack("out_of_memory"))
    failure = run.out_of_memory()
    assert failure is not None
    assert found["failure"]["requested_bytes"] == failure.requested_bytes
    largest = max(segment["largest_free_bytes"] for segment in found["segments"])
    assert found["failure"]["largest_free_block_bytes"] == largest
    assert largest < 12 * MIB < failure.requested_bytes
    assert sum(size for _, _, size in found["failure"]["holders"]) == failure.held.total_bytes


def test_fragmentation_says_what_it_ran_out_of(client: FlaskClient) -> None:
    page = save(client, "fragmentation.html?run=out_of_memory")
    assert "12.0 MiB were asked for" in page
    assert "Who held the memory" in page
    assert "<b>Recorded</b>" in page
    rows = save(client, "fragmentation/holders.csv?run=out_of_memory").splitlines()
    held = attnprof.load(find_root(client) / "out_of_memory").out_of_memory()
    assert held is not None
    assert sum(int(row.split(",")[2]) for row in rows[1:]) == held.held.total_bytes


def test_fragmentation_marks_the_segments_of_private_pools(
    client: FlaskClient, unpack: Unpack
) -> None:
    run, _, found = describe(unpack("pool_out_of_memory"))
    failure = run.out_of_memory()
    assert failure is not None
    private = [segment for segment in found["segments"] if segment["private_pool"]]
    assert sum(s["free_bytes"] for s in private) == failure.state.private_free_bytes > 0
    page = save(client, "fragmentation.html?run=pool_out_of_memory")
    assert "serves that pool alone" in page
    assert "Blocks of private pools are put where all others are" in page
    assert "20.0 MiB private 1" in page
    rows = save(client, "fragmentation/segments.csv?run=pool_out_of_memory").splitlines()
    assert [int(row.split(",")[-1]) for row in rows[1:]].count(1) == len(private)
    assert "serves that pool alone" not in save(client, "fragmentation.html?run=out_of_memory")


def test_overview_holds_the_peak_against_torchs_counter(client: FlaskClient) -> None:
    page = save(client, "overview.html?run=gpt2")
    assert "equals torch&#x27;s count" in page
    peak = attnprof.load(find_root(client) / "gpt2").peak()
    assert f"torch counted {peak.total_bytes:,} B" in page


@pytest.mark.parametrize("case", CASES)
def test_followed_peak_is_that_of_the_allocator(unpack: Unpack, case: str) -> None:
    live = LiveRun(unpack(case))
    live.update(budget_seconds=60)
    run = attnprof.load(unpack(case))
    found = live.devices[GPU].peak
    assert found is not None
    highest = run.info["allocator"]["devices"][GPU]["end"]["allocated_bytes_peak"]
    if "allocated_bytes.all.peak" in count(run):
        assert run.peak(device=GPU).total_bytes == highest
    assert found.total_bytes == highest  # in a step that was only counted, too
    assert sum(size for _, size in found.by_role) == found.total_bytes
    assert live.devices[GPU].total_bytes == count(run)["allocated_bytes.all.current"]


def test_followed_roles_are_the_categories_of_the_api(unpack: Unpack) -> None:
    live = LiveRun(unpack("gpt2"))
    live.update(budget_seconds=60)
    peak = attnprof.load(unpack("gpt2")).peak(device=GPU)
    found = live.devices[GPU].peak
    assert found is not None
    for name in ("parameters", "gradients", "optimizer_state"):
        assert dict(found.by_role)[name] == peak.by_category()[name]


def follow(*events: tuple[str, int, int]) -> list[int]:
    """Return the allocated bytes after (action, address, bytes)."""
    allocator = LiveAllocator(AllocatorSettings())
    return [
        total
        for action, address, size_bytes in events
        for _, total in allocator.take([Event(action, address, size_bytes, 1)])
    ]


def test_rest_that_is_not_worth_splitting_off_counts() -> None:
    segment = ("segment_alloc", 0, 20 * MIB)
    assert follow(segment, ("alloc", 0, 19 * MIB + 1)) == [20 * MIB]
    assert follow(segment, ("alloc", 0, 12 * MIB - 1)) == [12 * MIB]


def test_block_is_gone_once_though_its_free_is_told_twice() -> None:
    events = ("alloc", 0, 512), ("free_requested", 0, 512), ("free_completed", 0, 512)
    assert follow(*events)[:2] == [512, 0]
    assert follow(*events)[-1] == 0


def test_blocks_from_before_the_history_are_there() -> None:
    allocator = LiveAllocator(AllocatorSettings())
    seeds = [Event("segment_seed", 0, 20 * MIB, 0), Event("seed", 0, 19 * MIB + 1, 0)]
    assert allocator.take(seeds) == [(0, 20 * MIB)]


def test_history_that_goes_on_tells_all_that_is_there() -> None:
    allocator = LiveAllocator(AllocatorSettings())
    allocator.take([Event("segment_alloc", 0, 20 * MIB, 1), Event("alloc", 0, 4 * MIB, 2)])
    again = [
        Event("resumed", 0, 0, 0),
        Event("segment_seed", 0, 20 * MIB, 0),
        Event("seed", 4 * MIB, 6 * MIB, 0),
        Event("alloc", 0, 4 * MIB, 9),
    ]
    assert allocator.take(again) == [(9, 6 * MIB), (9, 10 * MIB)]


def test_reserved_is_told_at_the_peak(client: FlaskClient) -> None:
    run = attnprof.load(find_root(client) / "gpt2")
    state = run.memory_state(run.peak())
    assert state is not None
    gap = format_bytes(state.reserved_bytes - state.allocated_bytes)
    page = save(client, "overview.html?run=gpt2")
    assert f"{gap}</b><span>reserved − allocated (at the peak)" in page


def test_overview_warns_of_a_counted_step_that_needed_more(unpack: Unpack, cache: Path) -> None:
    root = unpack("long_loop").parent
    client = create_app(Catalog(root), token=TOKEN, cache=cache).server.test_client()
    client.get(f"/?token={TOKEN}", headers={"Host": "127.0.0.1"})
    steps = attnprof.load(unpack("long_loop")).steps
    most = format_bytes(steps["peak_bytes"].max())  # type: ignore[arg-type]  # integers
    page = save(client, "overview.html?run=long_loop")
    assert f"reached {most}, more than the peak shown here" in page
    for name in ("overview", "timeline"):
        assert "only\\u003cbr\\u003ecounted" in save(client, f"{name}.html?run=long_loop")
