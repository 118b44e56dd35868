"""What reports say about growth, gathered from real runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from attnprof.analysis.fits import TOTAL
from attnprof.capture.sweep import sweep
from attnprof.cli.program import load_own_script
from attnprof.growth import Growth
from attnprof.report.growth_gather import summarise_growth
from attnprof.report.growth_html import render_growth_html
from attnprof.report.growth_json import render_growth_json
from attnprof.report.growth_summary import GrowthSummary, find_shared_lengths
from attnprof.run import Run
from attnprof.units import require_countable

BATCH, WIDTH, LAYERS, ITEM_BYTES = 2, 32, 2, 4
LENGTHS = (32, 64, 128)


def make_step(seq_len: int, device: str) -> Any:
    """Train two layers of one head, without an optimizer."""
    import torch

    attention = load_own_script("check_torch").Attention
    model = torch.nn.Sequential(*(attention(WIDTH) for _ in range(LAYERS))).to(device)
    x = torch.randn(BATCH, seq_len, WIDTH, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    return step


@pytest.fixture(scope="module")
def growth(tmp_path_factory: pytest.TempPathFactory) -> Growth:
    directory = tmp_path_factory.mktemp("sweep")
    return sweep(make_step, LENGTHS, dry_run=True, measured=True, directory=directory)


@pytest.fixture(scope="module")
def summary(growth: Growth) -> GrowthSummary:
    return summarise_growth(growth, capacities=["1 GB", "1 B"])


def test_summary_has_every_length_of_both_sources(summary: GrowthSummary) -> None:
    assert [point.seq_len for point in summary.find_points("measured")] == list(LENGTHS)
    assert [point.seq_len for point in summary.find_points("dry_run")] == list(LENGTHS)
    for measured, dry in find_shared_lengths(summary.points):
        assert measured.sizes == dry.sizes


def test_summary_has_a_law_for_every_category(summary: GrowthSummary) -> None:
    longest = summary.find_points("measured")[-1]
    assert next(iter(summary.fits)) == TOTAL
    assert set(summary.fits) == set(longest.sizes)
    sizes = [longest.sizes[name] for name in summary.fits if name != TOTAL]
    assert sizes == sorted(sizes, reverse=True)
    _, _, quadratic = summary.fits["softmax"].coefficients["backward"]
    assert quadratic >= LAYERS * BATCH * ITEM_BYTES  # what every layer saves, and gradients


def test_summary_holders_sum_to_the_peak_of_the_longest_length(
    summary: GrowthSummary, growth: Growth
) -> None:
    assert summary.longest == LENGTHS[-1]
    assert summary.largest_bytes == growth.run(LENGTHS[-1]).peak().total_bytes


def test_summary_folds_layers_that_hold_the_same(summary: GrowthSummary) -> None:
    (softmax,) = (law for law in summary.layer_laws if law.fit.category == "softmax")
    assert (softmax.layer, softmax.count) == ("[0-1]", LAYERS)


def test_summary_theory_is_what_layers_keep(summary: GrowthSummary) -> None:
    expected = {n: LAYERS * BATCH * n * n * ITEM_BYTES for n in LENGTHS}
    assert dict(summary.theory) == expected


def test_summary_finds_walls_and_says_where_there_is_none(summary: GrowthSummary) -> None:
    gigabyte, byte = summary.capacities
    assert gigabyte.wall is not None
    assert gigabyte.wall.peak_bytes <= 10**9 < (gigabyte.wall.next_bytes or 0)
    assert byte.wall is not None
    assert byte.wall.seq_len == 0


def test_summary_predicts_from_the_longest_length_to_beyond_the_wall(
    summary: GrowthSummary,
) -> None:
    lengths = [n for n, _ in summary.predicted]
    wall = summary.capacities[0].wall
    assert wall is not None
    assert lengths[0] == LENGTHS[-1]
    assert lengths[-1] >= wall.next_seq_len
    assert lengths == sorted(set(lengths))
    assert summary.predicted[0][1] == summary.largest_bytes


def test_predictions_end_where_bytes_cannot_be_counted(
    growth: Growth, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = summarise_growth(growth).predicted
    predict = growth.predict

    def predict_so_far(seq_len: int) -> int:
        require_countable(2.0**63 if seq_len > whole[2][0] else 0, "the blocks", "a shorter length")
        return predict(seq_len)

    monkeypatch.setattr(growth, "predict", predict_so_far)
    assert summarise_growth(growth).predicted == whole[:3]


def test_summary_of_a_category_that_is_not_there_has_its_law(growth: Growth) -> None:
    summary = summarise_growth(growth, focus="kv_cache")
    assert summary.fit is not None
    assert summary.fit.law == "constant"


def test_summary_refuses_an_unknown_category(growth: Growth) -> None:
    with pytest.raises(ValueError, match=r"no category 'softmacks'; there are: total, .*softmax"):
        summarise_growth(growth, focus="softmacks")


def test_summary_of_failed_lengths_has_points_only(growth: Growth, tmp_path: Path) -> None:
    failed = Growth(
        [replace(length, status="failed", path=None) for length in growth.lengths], path=tmp_path
    )
    summary = summarise_growth(failed, capacities=["1 GB"])
    assert not summary.fits
    assert summary.capacities[0].why_no_wall == "no length was completed"
    assert "No length was completed" in render_growth_html(summary)


def test_summary_of_a_workload_without_tensors_says_why_there_is_no_wall(tmp_path: Path) -> None:
    idle = sweep(lambda seq_len, device: lambda: None, [8], dry_run=True, directory=tmp_path / "s")
    summary = summarise_growth(idle, capacities=["1 GB"])
    assert summary.capacities[0].why_no_wall == "nothing was recorded"


def test_summary_of_memory_running_out_has_its_wall(growth: Growth) -> None:
    *rest, longest = growth.lengths  # measured, after the dry ones
    assert (longest.source, longest.seq_len) == ("measured", LENGTHS[-1])
    over = replace(longest, status="out_of_memory", reason="MemoryError")
    summary = summarise_growth(Growth([*rest, over], path=growth.path))
    (memory,) = summary.capacities
    assert memory.size_bytes is None
    assert memory.wall is not None
    assert (memory.wall.seq_len, memory.wall.next_seq_len) == LENGTHS[-2:]


def test_summary_of_steps_speaks_of_the_longest_of_them(tmp_path: Path) -> None:
    import torch

    import attnprof

    attention = load_own_script("check_torch").Attention
    model = torch.nn.Sequential(*(attention(WIDTH) for _ in range(LAYERS)))
    with attnprof.trace(tmp_path / "run") as tracer:
        for n in (32, 64, 128, 96):
            model(torch.randn(BATCH, n, WIDTH)).square().mean().backward()
            model.zero_grad()
            tracer.step()
    run: Run = tracer.run
    summary = summarise_growth(Growth.from_run(run))
    assert summary.longest == 128
    step = run.steps.filter(pl.col("seq_len") == 128)["step"][0]
    assert summary.largest_bytes == run.peak(step=step).total_bytes
    assert render_growth_json(summary)
