"""The growth report for programs: plain values that agree with each other."""

import json
from dataclasses import replace

import pytest
from growth_summaries import LAWS, PARAMETERS, make_summary, total_bytes

from attnprof.report.growth_json import render_growth_json
from attnprof.report.growth_summary import GrowthSummary, Point
from attnprof.report.growth_verdict import write_growth_verdict


def test_growth_json_has_every_point() -> None:
    report = json.loads(render_growth_json(make_summary()))
    measured = {
        point["seq_len"]: point for point in report["points"] if point["source"] == "measured"
    }
    for n in (256, 512, 1024, 2048):
        assert measured[n]["peak_bytes"] == total_bytes(n)
        assert measured[n]["by_category"] == {name: law(n) for name, law in LAWS.items()}
        assert measured[n]["residual"] == pytest.approx(0, abs=1e-9)
    assert measured[8192]["status"] == "out_of_memory"
    assert measured[8192]["residual"] is None


def test_growth_json_has_laws_and_walls() -> None:
    report = json.loads(render_growth_json(make_summary()))
    total, *_ = report["fits"]
    constant, linear, quadratic = total["coefficients"]["backward"]
    assert total["category"] == "total"
    assert constant == pytest.approx(PARAMETERS)
    assert linear * 1000 + quadratic * 1000**2 == pytest.approx(total_bytes(1000) - PARAMETERS)
    near, far = report["capacities"]
    assert near["wall"]["seq_len"] == 8730
    assert (far["wall"], far["why_no_wall"]) == (None, "there is no wall")


def test_growth_json_holders_sum_to_the_longest_peak() -> None:
    summary = make_summary()
    report = json.loads(render_growth_json(summary))
    held = sum(holder["size_bytes"] for holder in report["holders"])
    assert held == summary.largest_bytes == total_bytes(report["longest"])


def test_growth_json_says_the_sentence() -> None:
    summary = replace(make_summary(), focus="softmax")
    report = json.loads(render_growth_json(summary))
    assert report["verdict"] == write_growth_verdict(summary)
    assert report["focus"] == "softmax"


def test_growth_json_of_nothing_is_json() -> None:
    failed = Point(64, "measured", "failed", "IndexError")
    report = json.loads(render_growth_json(GrowthSummary("make_step", None, (failed,))))
    assert report["fits"] == []
    assert report["points"][0]["peak_bytes"] is None
