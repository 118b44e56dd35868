"""What figures say: legends, labels that stay inside, colours that mean one thing."""

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest

from attnprof.palette import COLOURS, LESS, MORE, SERIES
from attnprof.units import format_bytes
from attnprof_dashboard.components.tables import show_value
from attnprof_dashboard.data.timeline_index import Window
from attnprof_dashboard.figures.bars import draw_waterfall
from attnprof_dashboard.figures.blocks import STATES, draw_raster, find_states
from attnprof_dashboard.figures.growth import draw_growth, draw_law
from attnprof_dashboard.figures.layers import draw_own_peaks, shorten
from attnprof_dashboard.figures.timeline import Marks, draw_timeline
from attnprof_dashboard.pages.kv_cache import draw_blocks, draw_rasters
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


def test_table_that_layers_share_is_drawn_once() -> None:
    columns = {
        "forward": [0, 1], "tokens": [6, 7], "block_tokens": [4, 4], "allocated_blocks": [3, 3],
        "used_blocks": [2, 2], "shared_blocks": [1, 1], "free_blocks": [5, 5],
        "last_block_slack_bytes": [64, 32],
    }  # fmt: skip
    rows = pl.DataFrame(columns)
    frame = pl.concat([rows.with_columns(layer=pl.lit(f"h.{i}.attn")) for i in range(3)])
    charts = draw_blocks(frame, "light")
    assert [chart.key for chart in charts] == ["blocks"]
    assert charts[0].title == "Blocks of 4 tokens over forwards"
    figure = charts[0].figure
    assert figure is not None
    levels = {trace.name: list(trace.y) for trace in figure.data}
    # 6 tokens fill 1.5 of the 2 blocks that are used; one of 3 has none, 5 are free.
    assert {name: level[0] for name, level in levels.items()} == {
        "shared": 1, "used": 0.5, "slack": 0.5, "taken, empty": 1, "free": 5,
    }  # fmt: skip
    assert [sum(level[i] for level in levels.values()) for i in (0, 1)] == [3 + 5, 3 + 5]


def test_small_pictures_have_room_between_their_marks() -> None:
    law = {"category": "softmax", "coefficients": {"forward": [0.0, 0.0, 4.0]}}
    figure = draw_law(law, [64, 65536], scheme="light")
    ticks = figure.layout.yaxis.tickvals
    assert 2 <= len(ticks) <= 4
    assert all(b > a for a, b in pairwise(ticks))


def make_blocks(rows: list[tuple[int, int, int, int]], pool_blocks: int) -> pl.DataFrame:
    """Return rows of `Run.kv_blocks` from (forward, block, tokens, sequences)."""
    names = ("forward", "block", "tokens", "sequences")
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.Int64), orient="row")
    return frame.with_columns(
        pool=pl.lit(1), layers=[0, 1], block_tokens=pl.lit(4), pool_blocks=pl.lit(pool_blocks)
    )


def test_blocks_are_drawn_in_the_state_they_were_in() -> None:
    rows = [(3, 0, 4, 2), (3, 2, 4, 1), (3, 3, 1, 1), (7, 0, 4, 1), (7, 3, 0, 1)]
    forwards, codes = find_states(make_blocks(rows, 5))
    assert forwards == [3, 7]
    assert [[STATES[code] for code in row] for row in codes.tolist()] == [
        ["shared", "used"],
        ["free", "free"],
        ["used", "free"],
        ["slack", "taken, empty"],
        ["free", "free"],
    ]
    (chart,) = draw_rasters(make_blocks(rows, 5), "light")
    assert chart.figure is not None
    shown = {trace.name for trace in chart.figure.data if trace.name}
    assert shown == {"shared", "used", "slack", "taken, empty", "free"}
    assert chart.table.rows == rows


def test_many_blocks_share_rows_in_the_state_of_most_of_them() -> None:
    rows = [(0, block, 4, 1) for block in range(300) if block % 3]
    colours = dict.fromkeys(STATES, "#000000")
    figure, per_row = draw_raster(make_blocks(rows, 300), scheme="light", colours=colours)
    assert per_row == 3
    assert len(figure.data[0].z) == 100
    assert {STATES[code] for row in figure.data[0].z for code in row} == {"used"}
