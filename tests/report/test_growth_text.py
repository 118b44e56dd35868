"""The growth report as text: the same characters for the same growth."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from growth_summaries import make_summary
from rich.console import Console

from attnprof.report.growth_notes import collect_growth_notes
from attnprof.report.growth_summary import GrowthSummary, Point
from attnprof.report.growth_text import render_growth_text

GOLDEN = Path(__file__).parent / "golden"


def show(summary: GrowthSummary, width: int = 110) -> str:
    """Return the report as plain text."""
    file = io.StringIO()
    Console(file=file, width=width, markup=False, highlight=False).print(
        render_growth_text(summary)
    )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("width", [110, 60])
def test_growth_text_is_what_it_was(width: int, overwrite_golden: bool) -> None:
    golden = GOLDEN / f"growth-{width}.txt"
    text = show(make_summary(), width)
    if overwrite_golden:
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "to accept: --overwrite-golden"


@pytest.mark.parametrize("width", [60, 72, 80, 100, 160])
def test_growth_text_fits_and_keeps_numbers_whole(width: int) -> None:
    text = show(make_summary(), width)
    assert max(map(len, text.splitlines())) <= width
    for whole in ("4.64 GiB", "720.0 MiB", "out of memory"):
        assert whole in text


def test_growth_text_of_nothing_says_so() -> None:
    text = show(GrowthSummary("make_step", None, ()))
    assert "No length was run" in text


def test_growth_text_makes_control_characters_visible() -> None:
    failed = Point(64, "measured", "failed", "\x1b[31mred\x1b[0m")
    text = show(GrowthSummary("\x1b[31m", None, (failed,)))
    assert "\x1b" not in text


def test_growth_text_shows_dry_runs_beside_measured_ones() -> None:
    (row,) = (line for line in show(make_summary()).splitlines() if line.startswith("    512 "))
    assert row.split()[:7] == ["512", "720.0", "MiB", "720.0", "MiB", "720.0", "MiB"]


def test_notes_say_where_dry_runs_are_off() -> None:
    summary = make_summary()
    points = [
        replace(p, sizes={**p.sizes, "total": p.sizes["total"] * 11 // 10})
        if p.source == "dry_run" and p.seq_len == 512
        else p
        for p in summary.points
    ]
    notes = collect_growth_notes(replace(summary, points=tuple(points)))
    (text,) = (note.text for note in notes if note.subject == "dry runs")
    assert text == "differ from measured peaks by at most 10 %, at n = 512"


def test_notes_warn_of_failed_lengths_and_not_of_full_memory() -> None:
    summary = make_summary()
    failed = Point(4096, "measured", "failed", "IndexError: out of range")
    notes = collect_growth_notes(replace(summary, points=(*summary.points, failed)))
    warned = {note.subject: note.is_warning for note in notes}
    assert warned["n = 4,096"]
    assert not warned["n = 8,192"]


def test_notes_warn_where_two_lengths_are_all() -> None:
    (law,) = (n for n in collect_growth_notes(make_summary((256, 512))) if n.subject == "law")
    assert law.is_warning
