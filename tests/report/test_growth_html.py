"""The growth page: one file without network, whatever a sweep's names try."""

import json
import re
from dataclasses import replace

import pytest
from growth_summaries import make_summary, total_bytes
from test_report_html import Elements, read_data

from attnprof.report.growth_html import render_growth_html
from attnprof.report.growth_summary import GrowthSummary, Point
from attnprof.report.growth_verdict import write_growth_verdict
from attnprof.report.verdict import format_share
from attnprof.units import format_bytes


@pytest.fixture(scope="module")
def page() -> str:
    return render_growth_html(make_summary())


def find_classes(page: str, *words: str) -> list[dict[str, str | None]]:
    """Return the attributes of elements that have all these classes."""
    return [
        attributes
        for _, attributes in Elements(page).found
        if set(words) <= set((attributes.get("class") or "").split())
    ]


def test_growth_page_loads_nothing(page: str) -> None:
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest", page)
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), (tag, attributes)
    (policy,) = (a["content"] for _, a in Elements(page).found if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_growth_page_says_the_law_in_one_sentence(page: str) -> None:
    assert f'<p class="verdict">{write_growth_verdict(make_summary())}</p>' in page


def test_growth_page_says_of_which_instant_sizes_of_categories_are() -> None:
    summary = make_summary()
    page = render_growth_html(summary)
    assert f'<th class="num">most at n = {summary.longest:,}</th>' in page
    (holder,) = [h for h in summary.holders if h.category == "softmax"]
    share = format_share(holder.size_bytes, summary.largest_bytes)
    assert f"{format_bytes(holder.size_bytes)}, {share}" in page


def test_growth_page_has_a_mark_per_point_and_line(page: str) -> None:
    lengths, lines = 4, 4  # total, softmax, activations, parameters
    assert len(find_classes(page, "mark", "measured")) == lengths * lines + lengths + 1
    assert len(find_classes(page, "mark", "dry_run")) == lengths * lines + lengths + 1
    assert len(find_classes(page, "mark", "failed")) == 1 + 1  # and one each in the key


def test_growth_page_shows_the_wall_where_the_capacity_is_reached(page: str) -> None:
    (wall,) = find_classes(page, "wall")
    (capacity,) = find_classes(page, "capacity")  # the other is too far away for the picture
    data = read_data(page)
    low, high = data["low"], data["high"]
    assert isinstance(low, float)
    assert isinstance(high, float)
    match = re.fullmatch(r"left:([0-9.]+)%", wall["style"] or "")
    assert match is not None
    assert low * (high / low) ** (float(match[1]) / 100) == pytest.approx(8730, rel=0.001)
    assert "top:" in (capacity["style"] or "")
    assert "wall, A100 80GB: n = 8,730" in page


def test_growth_page_gives_its_script_laws_that_meet_the_points(page: str) -> None:
    data = json.loads(json.dumps(read_data(page)))
    assert data["series"][0] == "total"
    ((last, *terms),) = data["laws"][0][0:1][0]
    assert last == 2048
    for point in data["points"]:
        n = point["n"]
        if point["done"]:
            assert terms[0] + terms[1] * n + terms[2] * n * n == pytest.approx(total_bytes(n))
            assert point["sizes"][0] == total_bytes(n)


def test_growth_page_escapes_names() -> None:
    hostile = "</script><script>alert(1)</script>"
    summary = replace(make_summary(), name=hostile, about=(hostile,), assumptions=(hostile,))
    page = render_growth_html(summary)
    assert "<script>alert(1)" not in page
    scripts = [attributes for tag, attributes in Elements(page).found if tag == "script"]
    assert len(scripts) == 2  # the data and the page's own


def test_growth_page_of_nothing_is_a_page() -> None:
    failed = Point(64, "measured", "failed", "IndexError")
    page = render_growth_html(GrowthSummary("make_step", None, (failed,)))
    assert "No length was completed" in page
    assert "<svg" not in page


def test_growth_page_of_one_length_has_a_mark_and_no_law() -> None:
    summary = make_summary()
    (first, *_) = summary.find_points("measured")
    page = render_growth_html(GrowthSummary("make_step", None, (first,), longest=first.seq_len))
    assert find_classes(page, "mark", "measured")
    assert not find_classes(page, "law")


def test_growth_page_is_small(page: str) -> None:
    assert len(page.encode()) < 100_000
