"""The page: one file without network, whatever the run's names try."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from attnprof.report.drawing import draw_timeline, find_ticks, find_times
from attnprof.report.html import render_html
from attnprof.report.summary import Summary, summarise
from attnprof.run import Run


class Elements(HTMLParser):
    """Collects the elements of a page and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(real_run: Run) -> str:
    return render_html(summarise(real_run))


def read_data(page: str) -> dict[str, object]:
    """Return what the page gives its script."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert match is not None
    data: dict[str, object] = json.loads(match[1])
    return data


def test_html_loads_nothing(page: str) -> None:
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest", page)
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), (tag, attributes)


def test_html_forbids_loading(page: str) -> None:
    policies = [a["content"] for t, a in Elements(page).found if a.get("http-equiv")]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    ]


def test_html_on_paper_keeps_its_colours_and_dark_ink(page: str) -> None:
    style = page[page.index("<style>") : page.index("</style>")]
    assert "print-color-adjust: exact" in style[style.index("@media print") :]
    assert re.findall(r"@media (.*)\(prefers-color-scheme: dark\)", style) == ["screen and "]


def test_html_breaks_words_that_are_wider_than_a_phone(page: str) -> None:
    assert re.search(r"^p, .*overflow-wrap: anywhere", page, re.MULTILINE)


def test_html_is_small(page: str) -> None:
    assert len(page.encode()) < 5_000_000


def test_html_says_what_the_summary_says(page: str, real_run: Run) -> None:
    summary = summarise(real_run)
    assert summary.verdict in page
    for name in summary.categories:
        assert f"{name}</td>" in page
    assert "unattributed" in page


def test_html_timeline_reaches_the_peak(page: str, real_run: Run) -> None:
    data = read_data(page)
    sizes = data["sizes"]
    assert isinstance(sizes, list)
    assert max(map(sum, zip(*sizes, strict=True))) == real_run.peak().total_bytes


def test_html_breaks_the_layer_of_the_peak_at_its_dots(real_run: Run) -> None:
    summary = summarise(real_run)
    page = render_html(replace(summary, peak=replace(summary.peak, layer="h.<2>.mlp")))
    assert '<b class="small">h.<wbr>&lt;2&gt;.<wbr>mlp</b>' in page


def test_html_escapes_names(hostile_run: Run) -> None:
    page = render_html(summarise(hostile_run))
    assert "<script>alert(1)" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in page
    scripts = [attributes for tag, attributes in Elements(page).found if tag == "script"]
    assert len(scripts) == 2  # the data and the page's own


def test_html_of_an_empty_run_is_a_page(summary: Summary, real_run: Run) -> None:
    from dataclasses import replace

    empty = replace(
        summary,
        peak=replace(summary.peak, total_bytes=0, allocations=summary.peak.allocations.clear()),
        categories={},
        quadratic={},
        holders=[],
        layers=[],
        steps=summary.steps.clear(),
        verdict="Nothing was recorded.",
    )
    page = render_html(empty)
    assert "Nothing was recorded." in page
    assert "Attention layers" not in page  # whether there are any is not known
    assert "unattributed: " not in page
    assert "<svg" not in page


@pytest.mark.parametrize("largest", [1, 7, 1023, 1024, 3 * 2**20, 609135928, 80 * 2**30, 2**45])
def test_ticks_enclose_the_largest_value_and_are_few(largest: int) -> None:
    ticks = find_ticks(largest)
    assert ticks[0] == 0
    assert ticks[-2] < largest <= ticks[-1]
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize("span", [1, 15, 999, 1000, 123_456, 6_400_000, 10**10])
def test_times_lie_on_the_axis_and_are_few(span: int) -> None:
    marks = find_times(span)
    assert 2 <= len(marks) <= 6
    assert all(0 <= at <= 1.000001 for at, _ in marks)


def test_drawing_stacks_to_the_total(real_run: Run) -> None:
    timeline = real_run.timeline(500)
    drawing = draw_timeline(timeline)
    assert drawing is not None
    totals = [sum(column) for column in zip(*drawing.sizes, strict=True)]
    assert totals == timeline["total_bytes"].to_list()


def test_html_shows_the_first_advice_escaped(real_run: Run, summary: Summary) -> None:
    page = render_html(replace(summarise(real_run), advice=summary.advice))
    assert "What would lower it" in page
    assert "an 8-bit &lt;AdamW&gt;" in page
    assert "~494.0 MiB" in page
    assert "The fourth" not in page


def test_html_without_advice_has_no_section_for_it(real_run: Run) -> None:
    assert "What would lower it" not in render_html(replace(summarise(real_run), advice=[]))
