"""The text report: the same characters for the same run, and nothing cut off."""

import io
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from attnprof.report.summary import Summary, summarise
from attnprof.report.tables import show_name
from attnprof.report.text import pick_steps, render_text
from attnprof.report.words import format_seconds
from attnprof.run import Run

GOLDEN = Path(__file__).parent / "golden"


def show(summary: Summary, width: int) -> str:
    """Return the report as plain text."""
    file = io.StringIO()
    Console(file=file, width=width, markup=False, highlight=False).print(render_text(summary))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("width", [110, 60])
def test_text_is_what_it_was(summary: Summary, width: int, overwrite_golden: bool) -> None:
    golden = GOLDEN / f"text-{width}.txt"
    text = show(summary, width)
    if overwrite_golden:
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "to accept: --overwrite-golden"


@pytest.mark.parametrize("width", [60, 72, 80, 100, 110, 160])
def test_text_keeps_numbers_whole(summary: Summary, width: int) -> None:
    text = show(summary, width)
    assert "…" not in text.replace("   …", "")  # the row for steps that are left out
    for size in ("256.0 MiB", "128.0 MiB", "60.0 MiB", "539.0 MiB"):
        assert size in text
    assert max(map(len, text.splitlines())) <= width


def test_text_of_a_real_run_has_every_category(real_run: Run) -> None:
    summary = summarise(real_run)
    text = show(summary, 110)
    assert summary.verdict.split(";")[0] in " ".join(text.split())
    assert all(name in text for name in summary.categories)
    assert "unattributed" in text


def test_text_makes_control_characters_visible(hostile_run: Run) -> None:
    text = show(summarise(hostile_run), 110)
    assert "\x1b" not in text
    assert "[bold]\\x1b[31m&amp;\\n" in text.replace("\n", "").replace(" ", "")


def test_show_name_leaves_words_of_any_language_alone() -> None:
    assert show_name("層.0.attn²") == "層.0.attn²"


def test_steps_are_all_shown_when_few(summary: Summary) -> None:
    picked = pick_steps(summary.steps.head(8), peak_step=1)
    assert [step if isinstance(step, int) else step["step"] for step in picked] == list(range(8))


def test_steps_keep_ends_and_peak_when_many(summary: Summary) -> None:
    steps = pl.concat([summary.steps.head(1)] * 3000).with_columns(step=pl.int_range(pl.len()))
    picked = pick_steps(steps, peak_step=4)
    shown = [f"{step} more" if isinstance(step, int) else step["step"] for step in picked]
    assert shown == [0, 1, 2, "1 more", 4, "2992 more", 2997, 2998, 2999]
    text = show(replace(summary, steps=steps), 60)
    left_out = [line.split() for line in text.splitlines() if "more" in line]
    assert left_out == [["…", "2,994", "more"]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(123.4, "123 s"), (12.34, "12.3 s"), (0.5, "500 ms"), (0.0002, "0.2 ms")]
)
def test_seconds_have_a_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_steps_that_were_only_counted_show_what_is_known(summary: Summary) -> None:
    is_last = pl.col("step") == summary.steps["step"].max()
    steps = summary.steps.with_columns(
        is_detailed=~is_last,
        peak_bytes=pl.when(is_last).then(None).otherwise("peak_bytes"),
        peak_phase=pl.when(is_last).then(None).otherwise("peak_phase"),
    )
    text = show(replace(summary, steps=steps), 110)
    (line,) = [line for line in text.splitlines() if "only counted" in line]
    assert line.split()[:4] == ["8", "1024", "2", "–"]
    assert "600.0 MiB" in line


def test_counted_step_that_needed_most_is_among_those_shown(summary: Summary) -> None:
    steps = pl.concat([summary.steps] * 3).with_columns(step=pl.int_range(pl.len()))
    is_counted = pl.col("step") == 13
    steps = steps.with_columns(
        is_detailed=~is_counted,
        peak_bytes=pl.when(is_counted).then(2**40).otherwise("peak_bytes"),
    )
    assert 13 in [row["step"] for row in pick_steps(steps, 0) if isinstance(row, dict)]
