"""The JSON report: the numbers of the text, for programs."""

import json
from typing import Any

import pytest

from attnprof.report.json import render_json
from attnprof.report.summary import summarise
from attnprof.run import Run


@pytest.fixture(scope="module")
def report(real_run: Run) -> dict[str, Any]:
    """The report of a real run, read back."""
    read: dict[str, Any] = json.loads(render_json(summarise(real_run)))
    return read


def test_json_categories_sum_to_the_peak(report: dict[str, Any]) -> None:
    peak = report["peak"]
    assert sum(peak["by_category"].values()) == peak["total_bytes"] > 0
    assert sum(holder["size_bytes"] for holder in report["holders"]) == peak["total_bytes"]


def test_json_bytes_are_integers(report: dict[str, Any]) -> None:
    peak = report["peak"]
    sizes = [*peak["by_category"].values(), peak["quadratic_bytes"], peak["unattributed_bytes"]]
    sizes += [layer["softmax_bytes"] for layer in report["layers"]]
    sizes += [step["peak_bytes"] for step in report["steps"]]
    assert all(type(size) is int for size in sizes)


def test_json_quadratic_is_scores_softmax_and_masks(report: dict[str, Any]) -> None:
    held = report["peak"]["by_category"]
    names = ("attention_scores", "softmax", "attention_mask")
    assert report["peak"]["quadratic_bytes"] == sum(held.get(name, 0) for name in names)


def test_json_softmax_is_what_the_shape_says(report: dict[str, Any]) -> None:
    layer = report["layers"][0]
    assert layer["softmax_bytes"] == 4 * 2 * 1 * 64 * 64  # float32, B, H, Tq, Tk


def test_json_steps_hold_the_peak(report: dict[str, Any]) -> None:
    peaks = {step["step"]: step["peak_bytes"] for step in report["steps"]}
    assert peaks[report["peak"]["step"]] == report["peak"]["total_bytes"] == max(peaks.values())


def test_json_says_where_and_how(report: dict[str, Any]) -> None:
    assert report["format_version"] == 1
    assert report["run"]["status"] == "completed"
    assert report["run"]["environment"]["torch"]


def test_json_advice_falls_from_the_peak(report: dict[str, Any]) -> None:
    total = report["peak"]["total_bytes"]
    assert report["advice"], "attention that is written out can be fused"
    for advice in report["advice"]:
        assert advice["new_peak_bytes"] + advice["saves_bytes"] == total
        assert type(advice["saves_bytes"]) is int
