"""What figures say: legends, labels that stay inside, colours that mean one thing."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest

from attnprof.palette import COLOURS, LESS, MORE, SERIES
from attnprof.run import NO_OPS
from attnprof.units import format_bytes
from attnprof_dashboard.components.tables import show_value
from attnprof_dashboard.data.timeline_index import Window
from attnprof_dashboard.figures.bars import draw_lines, draw_waterfall
from attnprof_dashboard.figures.blocks import STATES, draw_raster, find_states, sum_blocks
from attnprof_dashboard.figures.growth import draw_growth, draw_law
from attnprof_dashboard.figures.layers import draw_own_peaks, shorten
from attnprof_dashboard.figures.timeline import Marks, draw_timeline
from attnprof_dashboard.pages import kv_cache
from attnprof_dashboard.pages.kv_cache import draw_blocks
from attnprof_dashboard.pages.page import Subject
from attnprof_dashboard.table import Unit

SECOND = 10**9


def test_colours_of_series_are_no_categorys() -> None:
    assert not {*SERIES, MORE, LESS} & set(COLOURS.values())


def test_own_peaks_are_not_in_the_colour_of_a_category() -> None:
    figure = draw_own_peaks({"a": 5}, {"a": 3}, scheme="light")
    assert not {trace.marker.color for trace in figure.data} & set(COLOURS.values())


def test_names_are_shown_as_they_are() -> None:
    assert shorten('layers["a"]') == 'layers["a"]'
    assert shorten("a<b>&c") == "a&lt;b&gt;&amp;c"


def test_differences_stand_in_a_column_of_their_own() -> None:
    figure = draw_waterfall(("one", 100), [("x", -90), ("y", -5)], ("two", 5), scheme="light")
    assert figure.data[0].textposition == "none"
    assert [a.text for a in figure.layout.annotations] == ["100 B", "-90 B", "-5 B", "5 B"]
    assert {(a.xref, a.x, a.xanchor) for a in figure.layout.annotations} == {("paper", 1, "left")}


@pytest.mark.parametrize(("at", "anchor"), [(0.0, "left"), (5.0, "center"), (9.9, "right")])
def test_text_of_the_peak_stays_inside(at: float, anchor: str) -> None:
    times = np.array([0, 5 * SECOND, 10 * SECOND])
    total = np.array([1, 2, 3])
    window = Window(np.arange(3), times, total, {"softmax": total})
    figure = draw_timeline(window, Marks(0, peak=(round(at * SECOND), 3)), scheme="light")
    assert [a.xanchor for a in figure.layout.annotations if a.text == "peak 3 B"] == [anchor]
    assert figure.layout.yaxis.range[1] >= 1.09 * 3


def test_timeline_takes_clicks_far_from_any_event() -> None:
    total = np.array([1, 2])
    window = Window(np.arange(2), np.array([0, SECOND]), total, {"softmax": total})
    assert draw_timeline(window, Marks(0), scheme="light").layout.hoverdistance == -1


def test_times_on_a_timeline_are_seconds_from_its_first() -> None:
    nothing = np.zeros(1, np.int64)
    at_once = draw_timeline(Window(nothing, nothing, nothing, {}), Marks(0), scheme="light")
    assert at_once.layout.xaxis.range == (0, 1)
    assert at_once.layout.xaxis.exponentformat == "none"


@pytest.mark.parametrize("width_px", [380, 800])
def test_names_of_phases_have_room(width_px: int) -> None:
    ends = [0.07, 0.27, 0.40, 0.46, 0.58, 0.69, 0.735, 0.83, 0.94, 1.0]
    phases = ["outside", *["forward", "backward", "optimizer"] * 3]
    spans = [
        (name, round(SECOND * first), round(SECOND * last))
        for name, first, last in zip(phases, [0, *ends], ends, strict=False)
    ]
    times, total = np.array([0, SECOND]), np.array([1, 1])
    window = Window(np.arange(2), times, total, {"softmax": total})
    figure = draw_timeline(window, Marks(0, spans=spans), scheme="light")
    sizes = {380: (11,), 800: (11, 10.9)}[width_px]
    names = sorted((a.x, a.text) for a in figure.layout.annotations if a.font.size in sizes)
    assert {text for _, text in names} >= {"forward", "backward"}
    assert width_px == 380 or "optimizer" in {text for _, text in names}
    for (x, one), (next_x, two) in pairwise(names):
        assert (next_x - x) * width_px > 6.1 * (len(one) + len(two)) / 2


def test_pointer_on_a_timeline_shows_each_size_in_its_own_unit() -> None:
    small, large = np.array([4, 0]), np.array([3 * 2**30, 2**20])
    by_category = {"inputs": small, "softmax": large}
    window = Window(np.arange(2), np.array([0, SECOND]), small + large, by_category)
    figure = draw_timeline(window, Marks(0), scheme="light")
    texts = {trace.name: list(trace.text) for trace in figure.data}
    assert texts["inputs"] == ["4 B", "0 B"]
    assert texts["softmax"] == ["3.00 GiB", "1.0 MiB"]
    assert texts["total"] == [format_bytes(4 + 3 * 2**30), "1.0 MiB"]
    assert {trace.hovertemplate for trace in figure.data} == {"%{text}", "<b>%{text}</b>"}


@pytest.mark.parametrize(
    ("share", "shown"), [(0.5, "50.0 %"), (1e-4, "<0.1 %"), (0.0, "0 %"), (2e-16, "0 %")]
)
def test_small_shares_are_not_shown_as_none(share: float, shown: str) -> None:
    assert show_value(Unit.SHARE, share) == shown


def make_point(n: int, source: str) -> dict[str, Any]:
    return {
        "seq_len": n, "source": source, "status": "completed", "peak_bytes": 8 * n,
        "by_category": {"softmax": 5 * n, "activations": 3 * n},
    }  # fmt: skip


@pytest.mark.parametrize("sources", [["measured"], ["dry_run"], ["measured", "dry_run"]])
def test_growth_names_every_category_once(sources: list[str]) -> None:
    values = {
        "points": [make_point(n, source) for source in sources for n in (128, 256)],
        "outlook": [], "longest": 256, "theory_saved_softmax": [], "fits": [],
    }  # fmt: skip
    figure = draw_growth(values, None, None, scheme="light")
    named = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(n for n in named if "total" not in n) == ["activations", "softmax"]
    assert sum("total" in name for name in named) == len(sources)


def test_tables_that_are_the_same_are_drawn_once() -> None:
    rows = [(0, 0, 4, 2), (0, 1, 2, 1), (0, 2, 0, 1), (1, 0, 4, 2), (1, 1, 3, 1), (1, 2, 0, 1)]
    own = make_blocks(rows, 8, free=[5] * 3 + [3] * 3)
    other = own.with_columns(pool=pl.lit(2), layers=pl.lit([2]))
    charts = draw_blocks(pl.concat([own, other]), "light")
    assert [chart.key for chart in charts] == ["blocks", "raster"]
    assert charts[0].title == "Blocks of 4 tokens over forwards"
    assert "(layers: 0, 1, 2)" in charts[0].why
    assert charts[0].figure is not None
    levels = {trace.name: list(trace.y)[1:-1] for trace in charts[0].figure.data}
    assert levels == {
        "shared": [1, 1],
        "used": [2 / 4, 3 / 4],
        "slack": [2 / 4, 1 / 4],
        "taken, empty": [1, 1],
        "kept": [0, 8 - 3 - 3],
        "free": [5, 3],
    }


@pytest.mark.parametrize(
    ("is_imported", "is_noted", "said", "drawn"),
    [
        (False, False, "attnprof run generate.py", []),
        (True, False, NO_OPS[1:], []),
        (False, True, "what the engine noted", ["blocks", "raster"]),
    ],
)
def test_run_without_a_cache_is_told_why(
    is_imported: bool, is_noted: bool, said: str, drawn: list[str]
) -> None:
    blocks = make_blocks([(0, 0, 4, 1)] if is_noted else [], 2)
    digest = SimpleNamespace(
        kv_cache=pl.DataFrame(), kv_blocks=blocks, facts={"is_imported": is_imported}
    )
    subject = cast(Subject, SimpleNamespace(digest=digest, scheme="light"))
    assert said in str(kv_cache.layout(subject).to_plotly_json())
    assert [chart.key for chart in kv_cache.charts(subject)] == drawn


def test_small_pictures_have_room_between_their_marks() -> None:
    law = {"category": "softmax", "coefficients": {"forward": [0.0, 0.0, 4.0]}}
    figure = draw_law(law, [64, 65536], scheme="light")
    ticks = figure.layout.yaxis.tickvals
    assert 2 <= len(ticks) <= 4
    assert all(b > a for a, b in pairwise(ticks))


def make_blocks(
    rows: list[tuple[int, int, int, int]], pool_blocks: int, free: list[int] | None = None
) -> pl.DataFrame:
    """Return rows of `Run.kv_blocks` from (forward, block, tokens, sequences).

    Without ``free`` what is not in the rows is free.
    """
    names = ("forward", "block", "tokens", "sequences")
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.Int64), orient="row")
    rest = pool_blocks - pl.len().over("forward").cast(pl.Int64)
    return frame.with_columns(
        pool=pl.lit(1),
        layers=pl.lit([0, 1]),
        block_tokens=pl.lit(4),
        pool_blocks=pl.lit(pool_blocks),
        free_blocks=rest if free is None else pl.Series(free),
    )


def test_blocks_are_drawn_in_the_state_they_were_in() -> None:
    rows = [(3, 0, 4, 2), (3, 2, 4, 1), (3, 3, 1, 1), (7, 0, 4, 1), (7, 3, 0, 1)]
    numbers, forwards, codes = find_states(make_blocks(rows, 5))
    assert (numbers, forwards) == ([0, 1, 2, 3, 4], [3, 7])
    assert [[STATES[code] for code in row] for row in codes.tolist()] == [
        ["shared", "used"],
        ["free", "free"],
        ["used", "free"],
        ["slack", "taken, empty"],
        ["free", "free"],
    ]
    _, chart = draw_blocks(make_blocks(rows, 5), "light")
    assert chart.figure is not None
    shown = {trace.name for trace in chart.figure.data if trace.name}
    assert shown == {"shared", "used", "slack", "taken, empty", "free"}
    assert chart.table.rows == rows


def test_kept_blocks_are_those_that_were_left_full_the_latest_first() -> None:
    rows = [(0, 4, 4, 1), (0, 5, 4, 1), (0, 6, 2, 1), (0, 7, 4, 1), (1, 5, 4, 1), (1, 7, 4, 1),
            (2, 7, 4, 1)]  # fmt: skip
    numbers, _, codes = find_states(make_blocks(rows, 4, free=[1] * 4 + [1] * 2 + [2]))
    # Of eight numbers, four are the pool's: nobody was given the first ones.
    assert numbers == [4, 5, 6, 7]
    assert [[STATES[code] for code in row] for row in codes.tolist()] == [
        ["used", "kept", "free"],
        ["used", "used", "kept"],
        ["slack", "free", "free"],
        ["used", "used", "used"],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_each_state_has_as_many_blocks_one_by_one_as_summed_up(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows, free = [], []
    for forward in range(6):
        blocks = draw.choice(9, size=draw.integers(1, 8), replace=False).tolist()
        rows += [(forward, b, int(draw.integers(0, 5)), int(draw.integers(1, 3))) for b in blocks]
        free += [int(draw.integers(0, 10 - len(blocks)))] * len(blocks)
    frame = make_blocks(rows, 9, free)
    sums = sum_blocks(frame)
    _, _, codes = find_states(frame)
    for name in ("free", "kept", "taken, empty", "shared"):
        found = (codes == STATES.index(name)).sum(axis=0)
        assert found.tolist() == sums[name].to_list()
    assert sums.select(pl.sum_horizontal(STATES)).to_series().to_list() == pytest.approx([9] * 6)


def test_stack_over_numbers_draws_a_column_around_each() -> None:
    one = draw_lines([3], {"used": [5]}, scheme="light", title="forward", is_stacked=True)
    assert list(one.data[0].y) == [5, 5, 5]
    two = draw_lines([0, 1], {"used": [5, 9]}, scheme="light", title="forward", is_stacked=True)
    x, y = list(two.data[0].x), list(two.data[0].y)
    assert y == [5, 5, 9, 9]
    assert x[1:-1] == [0, 1]
    # The edges are half a number away, and rounded they are the number they belong to.
    assert x[0] == pytest.approx(-0.5, abs=0.01)
    assert x[-1] == pytest.approx(1.5, abs=0.01)
    assert [round(edge) for edge in (x[0], x[-1])] == [0, 1]
    assert two.data[0].line.shape == "hvh"


def test_many_blocks_share_rows_in_the_state_of_most_of_them() -> None:
    rows = [(0, block, 4, 1) for block in range(300) if block % 3]
    colours = dict.fromkeys(STATES, "#000000")
    figure, per_row = draw_raster(make_blocks(rows, 300), scheme="light", colours=colours)
    assert per_row == 3
    assert len(figure.data[0].z) == 100
    assert {STATES[code] for row in figure.data[0].z for code in row} == {"used"}
