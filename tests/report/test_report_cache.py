"""The cache's section of the report: its map, its tables, and what it says of a run without one."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

import attnprof
from attnprof.analysis.cache_forms import take_largest
from attnprof.analysis.kv_cache import SCHEMA
from attnprof.report.cache_map import draw_blocks, draw_strips
from attnprof.report.cache_summary import (
    CacheSummary,
    PhasePeaks,
    TokenTimes,
    pick_forwards,
    summarise_cache,
    write_cache_sentence,
    write_transient_sentence,
)
from attnprof.report.cache_text import list_cache_tables
from attnprof.report.drawing import HEIGHT, WIDTH, outline
from attnprof.report.html import render_html
from attnprof.report.json import describe_summary
from attnprof.report.summary import Summary, summarise
from attnprof.report.text import render_text
from attnprof.run import Run

FORWARDS, PROMPT, TOKEN = 4, 10, 96
"""Tokens grow by one a forward; bytes of K and V of one token of a layer's two sequences."""

TABLE = {
    "kind": "paged", "block_tokens": 4, "allocated_blocks": 5, "used_blocks": 4,
    "shared_blocks": 0, "free_blocks": 3, "last_block_slack_bytes": 3 * TOKEN,
}  # fmt: skip
"""Columns of an engine with pages."""


def make_row(layer: str, forward: int, **other: object) -> dict[str, object]:
    tokens = PROMPT + forward
    return dict.fromkeys(SCHEMA) | {
        "step": forward,
        "forward": forward,
        "phase": "decode" if forward else "prefill",
        "layer": layer,
        "category": "kv_cache",
        "kind": "grown",
        "dtype": "float32",
        "batch": 2,
        "kv_heads": 1,
        "head_dim": 6,
        "value_dim": 6,
        "tokens": tokens,
        "held_bytes": tokens * TOKEN,
        "reachable_bytes": tokens * TOKEN,
        "used_bytes": tokens * TOKEN,
        "bytes_per_token": TOKEN / 2,
        "transient_bytes": 0,
        "growing_bytes": (tokens - 1) * TOKEN // 2 if forward else 0,
        "expanded_bytes": 0,
        **other,
    }


def make_frame(layers: list[str], **other: object) -> pl.DataFrame:
    rows = [make_row(layer, forward, **other) for forward in range(FORWARDS) for layer in layers]
    return pl.DataFrame(rows, schema=SCHEMA)


def make_summary(frame: pl.DataFrame) -> CacheSummary:
    growth = frame.group_by("forward", maintain_order=True).agg(
        pl.col("step", "phase", "tokens", "growing_bytes", "expanded_bytes").first(),
        pl.col("held_bytes", "used_bytes").sum(),
    )
    return CacheSummary(
        frame=frame,
        layers=take_largest(frame),
        growth=growth.with_columns(wall_seconds=pl.lit(0.25)),
        fixed=[
            PhasePeaks("as recorded", 3 * 2**20, 2 * 2**20, 3 * 2**20),
            PhasePeaks("of fixed length, read as a slice", 4 * 2**20, None, 4 * 2**20),
        ],
        times=TokenTimes(first_seconds=1.5, later_seconds=0.02),
        weights_bytes=5 * 2**20,
    )


def build_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0,
        decoder_start_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def show(summary: Summary) -> str:
    file = io.StringIO()
    Console(file=file, width=110, markup=False, highlight=False).print(render_text(summary))
    return file.getvalue()


def test_strips_show_used_bytes_below_the_older_copy() -> None:
    frame = make_frame(["h.0.attn", "h.1.attn"])
    (group,) = draw_strips(frame)
    assert (group.name, [strip.label for strip in group.strips]) == ("h.[0-1].attn", ["0", "1"])
    tokens = PROMPT + FORWARDS - 1
    assert group.top_bytes == tokens * TOKEN + (tokens - 1) * TOKEN // 2
    older, used = group.strips[0].areas
    assert (older.kind, used.kind) == ("older", "used")
    x = np.arange(FORWARDS) * WIDTH // FORWARDS
    sizes = np.arange(PROMPT, PROMPT + FORWARDS) * TOKEN
    y = np.rint((1 - sizes / group.top_bytes) * HEIGHT).astype(np.int64)
    assert used.path == outline(x, y)


def test_strips_show_room_that_is_not_filled() -> None:
    frame = make_frame(["attn"], kind="preallocated", held_bytes=20 * TOKEN, growing_bytes=0)
    (group,) = draw_strips(frame)
    assert group.top_bytes == 20 * TOKEN
    assert [area.kind for area in group.strips[0].areas] == ["empty", "used"]


def test_strips_of_different_kinds_have_scales_of_their_own() -> None:
    states = make_frame(["h.0"], kind="state", category="recurrent_state", held_bytes=8)
    frame = pl.concat([make_frame(["h.1"]), states])
    assert [(g.name, g.kind, g.top_bytes > 8) for g in draw_strips(frame)] == [
        ("h.1", "grown", True), ("h.0", "state", True),
    ]  # fmt: skip


def test_many_layers_that_are_alike_share_a_strip() -> None:
    frame = make_frame([f"h.{n}.attn" for n in range(40)])
    other = frame.with_columns(
        held_bytes=pl.when(pl.col("layer") == "h.20.attn").then(7).otherwise("held_bytes")
    )
    assert [s.label for s in draw_strips(frame)[0].strips] == ["0-39"]
    assert [s.label for s in draw_strips(other)[0].strips] == ["0-19", "20", "21-39"]


def test_layers_that_hold_nothing_yet_have_an_empty_strip_until_then() -> None:
    late = make_frame(["h.1"]).filter(pl.col("forward") == FORWARDS - 1)
    frame = pl.concat([make_frame(["h.0"]), late])
    areas = {s.label: s.areas for g in draw_strips(frame) for s in g.strips}
    assert areas["1"][-1].path.startswith(f"M0 {HEIGHT}H0V{HEIGHT}H{3 * WIDTH // FORWARDS}V")


def test_blocks_are_shared_used_slack_and_free() -> None:
    frame = make_frame(["h.0", "h.1"], **TABLE | {"shared_blocks": 1})
    (chart,) = draw_blocks(frame)
    assert (chart.name, chart.block_tokens, chart.blocks) == ("h.[0-1]", 4, 5 + 3)
    assert [area.kind for area in chart.areas] == ["free", "reserved", "slack", "used", "shared"]
    # 5 of 8 blocks belong to sequences: the outline is at 3/8 from the top.
    assert f"V{HEIGHT * 3 // 8}H{WIDTH}V{HEIGHT}" in chart.areas[1].path
    assert draw_blocks(make_frame(["h.0"])) == []


def test_blocks_that_are_neither_taken_nor_free_are_no_smaller_pool() -> None:
    frame = make_frame(["h.0"], **TABLE)
    last = pl.col("forward") == FORWARDS - 1
    kept = frame.with_columns(free_blocks=pl.when(last).then(1).otherwise(pl.col("free_blocks")))
    (chart,) = draw_blocks(kept)
    assert chart.blocks == 5 + 3
    assert [area.kind for area in chart.areas][:2] == ["kept", "free"]
    # Of 8 blocks 5 are taken and 1 is free at last: the outline falls to 2/8 from the top.
    assert f"V{HEIGHT * 2 // 8}H{WIDTH}V{HEIGHT}" in chart.areas[1].path


def test_layers_with_tables_of_their_own_have_rows_of_their_own() -> None:
    """Layers with a window have other blocks than those without, in one pool."""
    windowed = make_frame(["h.0", "h.2"], **TABLE | {"allocated_blocks": 2, "used_blocks": 2})
    frame = pl.concat([windowed, make_frame(["h.1", "h.3"], **TABLE)])
    tables = dict(list_cache_tables(make_summary(frame)))
    file = io.StringIO()
    Console(file=file, width=110).print(tables["Blocks"])
    rows = [line.split()[:4] for line in file.getvalue().splitlines()[2:]]
    assert rows == [["h.[0,2]", "4", "2", "2"], ["h.[1,3]", "4", "5", "4"]]


def test_layers_without_a_block_table_have_strips_beside_the_blocks() -> None:
    states = make_frame(["h.1"], kind="state", category="recurrent_state")
    frame = pl.concat([make_frame(["h.0"], **TABLE), states])
    assert [chart.name for chart in draw_blocks(frame)] == ["h.0"]
    assert [group.name for group in draw_strips(frame)] == ["h.1"]


def test_a_few_forwards_are_shown_of_many() -> None:
    growth = pl.DataFrame({"forward": range(1000)})
    assert pick_forwards(growth, most=3)["forward"].to_list() == [0, 500, 999]
    assert pick_forwards(growth[:10])["forward"].to_list() == list(range(10))


def test_sentences_say_what_was_held_and_what_was_taken_beside_it() -> None:
    summary = make_summary(make_frame(["h.0", "h.1"]))
    assert write_cache_sentence(summary) == (
        "2 layers held 2.4 KiB at most: 2 sequences of 13 tokens, 96 B a token, as the "
        "architecture says 96 B."
    )
    assert write_transient_sentence(summary) == (
        "Beside its cache a layer held at most 576 B of an older copy while a longer one was made. "
        "The first token took 1.5 s, each later one 20 ms."
    )
    still = make_summary(make_frame(["h.0"], growing_bytes=0))
    assert "at most nothing." in write_transient_sentence(replace(still, times=None))


def test_states_on_their_way_are_no_older_copy_of_a_cache() -> None:
    frame = pl.concat(
        [make_frame(["h.0"]), make_frame(["h.1"], kind="state", tokens=None, growing_bytes=1000)]
    )
    assert write_transient_sentence(make_summary(frame)).startswith(
        "Beside its cache a layer held at most 576 B of an older copy while a longer one was made "
        "and 1000 B of states on the way to a new one."
    )


def test_an_encoder_counts_for_the_first_token_and_not_for_the_bytes_of_later_ones(
    tmp_path: Path,
) -> None:
    import torch

    model = build_t5()
    with attnprof.trace(tmp_path / "run", samples_per_second=0) as tracer:
        kept = model.generate(  # an encoder's forward, then the decoder's
            torch.ones(1, 9, dtype=torch.int64), max_new_tokens=4, min_new_tokens=4,
            do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
    assert kept.past_key_values is not None
    steps, cache = tracer.run.steps, summarise_cache(tracer.run)
    assert cache is not None
    assert cache.times is not None
    assert cache.times.first_seconds == steps["wall_seconds"][:2].sum()
    assert cache.growth["tokens"].to_list() == [1, 2, 3, 4]
    own, cross = (layer for layer in cache.layers)
    assert (own.tokens, cross.tokens) == (4, 9)
    assert f"4 tokens, {round(own.bytes_per_token)} B a token" in write_cache_sentence(cache)


def test_growth_says_how_many_forwards_it_leaves_out() -> None:
    rows = [make_row("h.0", forward) for forward in range(11)]
    summary = make_summary(pl.DataFrame(rows, schema=SCHEMA, orient="row"))
    titles = [title for title, _body in list_cache_tables(summary)]
    assert titles[0] == "Growth, 8 of 11 forwards"


def test_text_shows_growth_layers_and_fixed_lengths(summary: Summary) -> None:
    text = show(replace(summary, cache=make_summary(make_frame(["h.0.attn", "h.1.attn"]))))
    for words in ("KV cache", "prefill", "h.[0-1].attn", "grown", "1 × 6", "read as a slice"):
        assert words in text
    assert "3.0 MiB" in text
    assert "KV cache" not in show(summary)


def test_page_draws_strips_and_escapes_layers(summary: Summary) -> None:
    frame = make_frame(["<b>.0", "<b>.1"])
    page = render_html(replace(summary, peak=replace(summary.peak, total_bytes=0), categories={},
                               quadratic={}, cache=make_summary(frame)))  # fmt: skip
    assert page.count('<div class="strip"') == 2
    assert '<path class="used"' in page
    assert "&lt;b&gt;" in page
    assert "<b>.0" not in page


def test_page_draws_blocks_where_they_are_known(summary: Summary) -> None:
    cache = make_summary(make_frame(["h.0"], **TABLE))
    page = render_html(replace(summary, peak=replace(summary.peak, total_bytes=0), categories={},
                               quadratic={}, cache=cache))  # fmt: skip
    assert "8 blocks of 4 tokens" in page
    assert "not filled, in blocks with tokens" in page
    assert "of several sequences" not in page  # the legend names what occurs


def test_training_has_no_cache_to_report(real_run: Run) -> None:
    assert summarise_cache(real_run) is None
    found = summarise(real_run)
    assert found.cache is None
    assert describe_summary(found)["kv_cache"] is None
    assert "<h2>KV cache" not in render_html(found)


@pytest.mark.parametrize("kind", ["grown", "state"])
def test_json_has_the_cache(summary: Summary, kind: str) -> None:
    from attnprof.report.kv_json import render_kv_json

    cache = make_summary(make_frame(["h.0"], kind=kind))
    values = json.loads(render_kv_json(cache, room_bytes=2**20))
    tokens = PROMPT + FORWARDS - 1
    assert values["held_bytes"] == tokens * TOKEN
    assert values["weights_bytes"] == 5 * 2**20
    assert values["growing_bytes"] == (tokens - 1) * TOKEN // 2
    assert values["fixed_length"][1]["decode_bytes"] is None
    assert values["times"] == {"first_seconds": 1.5, "later_seconds": 0.02}
    assert [fit["tokens"] for fit in values["fits"]] == [4096, 8192, 32768, 131072]
    assert json.loads(render_kv_json(None, room_bytes=1))["fits"] == []
