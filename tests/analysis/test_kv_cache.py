"""A prompt of 512 tokens and 128 new ones: what a cache costs, and what another form would."""

import io
import re
from dataclasses import dataclass
from typing import Any

import polars as pl
import pytest
import torch
from rich.console import Console
from torch import nn

import attnprof
from attnprof.analysis.cache_forms import cache_bytes_at, list_forms, max_batch, take_largest
from attnprof.analysis.kv_cache import SCHEMA
from attnprof.report.cache_summary import summarise_cache
from attnprof.report.summary import summarise
from attnprof.report.text import render_text
from attnprof.run import Run
from attnprof.theory.cache import cache_bytes, cache_bytes_per_token
from attnprof.theory.config import parse_config
from attnprof.units import format_bytes
from tests.attribution.cache_programs import SIZES, build, make_llama
from tests.attribution.test_caches_by_hand import Model, concatenate, write_slice
from tests.versions import needs_fused_groups

PROMPT, NEW = 512, 128
BATCH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FLOAT = 2, 3, 8, 2, 16, 4
TOKEN = 2 * KV_HEADS * HEAD_DIM * FLOAT


COUNTER = 8
"""transformers' static cache counts its tokens in an int64 of its own in every layer."""


def test_every_column_is_named_where_it_is_asked_for() -> None:
    words = re.findall(r"\w+", Run.kv_cache.__doc__ or "")
    assert set(SCHEMA) <= set(words)


def make_model(attention: str) -> nn.Module:
    return make_llama(
        attention=attention, hidden_size=HEADS * HEAD_DIM, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=1024,
    )  # fmt: skip


def answer(model: nn.Module, **options: object) -> torch.Tensor:
    ids = torch.randint(3, 61, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    return tokens


@dataclass(frozen=True)
class Generation:
    """One prompt answered three times: untraced, with a grown cache, and with a static one."""

    plain: torch.Tensor
    traced: torch.Tensor
    grown: Run
    static: Run
    config: dict[str, object]


@pytest.fixture(scope="module", params=["eager", pytest.param("sdpa", marks=needs_fused_groups)])
def generation(request: pytest.FixtureRequest) -> Generation:
    model = make_model(request.param)
    plain = answer(model)
    with attnprof.trace(samples_per_second=0) as grown:
        traced = answer(model)
    with attnprof.trace(samples_per_second=0) as static:
        answer(model, cache_implementation="static")
    return Generation(plain, traced, grown.run, static.run, model.config.to_dict())


def test_tracing_changes_no_token(generation: Generation) -> None:
    assert torch.equal(generation.plain, generation.traced)


def test_concatenation_holds_a_second_copy_of_the_older_values(generation: Generation) -> None:
    frame = generation.grown.kv_cache().filter(pl.col("phase") == "decode")
    assert frame["growing_bytes"].to_list() == [
        (tokens - 1) * BATCH * TOKEN // 2 for tokens in frame["tokens"].to_list()
    ]
    # Written-out attention reads K and V with 8 heads instead of 2; the fused kernel does not.
    is_eager = generation.grown.layers()["kind"][0] == "materialised"
    assert frame["expanded_bytes"].to_list() == [
        tokens * BATCH * TOKEN * HEADS // KV_HEADS if is_eager else 0
        for tokens in frame["tokens"].to_list()
    ]


def test_what_a_static_cache_makes_of_each_phase_is_predicted(generation: Generation) -> None:
    """Prefill, where the peak is, takes more, since the room is as long as the last answer.

    Decoding takes no second copy. Predicted to the byte but for what the run cannot show: the
    counters, and where attention is fused, the masks that transformers makes for the room when it
    decodes.
    """
    grown, static = generation.grown, generation.static
    room = PROMPT + NEW - 1
    is_eager = grown.layers()["kind"][0] == "materialised"
    found = grown.what_if("cache_static_masked" if is_eager else "cache_static")
    assert set(static.kv_cache()["held_bytes"]) == {BATCH * room * TOKEN}
    assert set(static.kv_cache()["growing_bytes"]) == {0}
    counters = LAYERS * COUNTER
    assert found.after.total_bytes == static.peak().total_bytes - counters
    assert found.after_by_phase["prefill"] == static.peak(phase="prefill").total_bytes - counters
    before, after = (run.peak(phase="decode").total_bytes for run in (grown, static))
    predicted = found.after_by_phase["decode"]
    if is_eager:  # its peak is not in a concatenation: scores and repeated heads come later
        assert predicted == before == after - counters
    else:
        second_copy = BATCH * (room - 1) * TOKEN // 2
        masks = BATCH * room * 6  # of bool, float, and the indices they are made from
        assert 0 < after - counters - predicted < masks
        assert before - second_copy <= predicted < before


def test_report_shows_the_second_copy_and_what_a_static_cache_makes_of_it(
    generation: Generation,
) -> None:
    file = io.StringIO()
    summary = summarise(generation.grown)
    Console(file=file, width=110).print(render_text(summary))
    text = file.getvalue()
    second_copy = BATCH * (PROMPT + NEW - 2) * TOKEN // 2
    assert f"{format_bytes(second_copy)} of an older copy" in " ".join(text.split())
    assert "Peaks with a cache of fixed length, predicted" in text
    assert summary.cache is not None
    recorded, *fixed = summary.cache.fixed
    assert recorded.decode_bytes == generation.grown.peak(phase="decode").total_bytes
    *_, last = fixed  # transformers' own form
    assert last.total_bytes == generation.static.peak().total_bytes - LAYERS * COUNTER
    assert format_bytes(last.total_bytes) in text


def test_first_token_and_later_ones_are_timed_by_phase(generation: Generation) -> None:
    steps = generation.grown.steps
    first, later = steps.row(0, named=True), steps[1:]
    assert len(later) == NEW - 1
    assert 0 < first["prefill_seconds"] <= first["wall_seconds"]
    assert first["decode_seconds"] == 0
    assert (later["prefill_seconds"] == 0).all()
    assert (
        (later["decode_seconds"] > 0) & (later["decode_seconds"] <= later["wall_seconds"])
    ).all()
    cache = summarise_cache(generation.grown)
    assert cache is not None
    assert cache.times is not None
    assert cache.times.first_seconds == first["wall_seconds"]
    assert cache.times.later_seconds == later["wall_seconds"].median()


def test_measured_bytes_per_token_are_the_predicted_ones(generation: Generation) -> None:
    layers = take_largest(generation.grown.kv_cache())
    assert [layer.bytes_per_token for layer in layers] == [TOKEN] * LAYERS
    assert [layer.predicted_bytes_per_token for layer in layers] == [TOKEN] * LAYERS


def test_bytes_per_token_are_those_that_the_configuration_promises(generation: Generation) -> None:
    layers = take_largest(generation.grown.kv_cache())
    arch = parse_config(generation.config, name="of the test")
    promised = cache_bytes_per_token(arch, dtype="float32")
    assert sum(layer.bytes_per_token for layer in layers) == promised == LAYERS * TOKEN
    held = sum(layer.held_bytes for layer in layers)
    tokens = PROMPT + NEW - 1
    assert held == cache_bytes(arch, seq_len=tokens, batch=BATCH, dtype="float32")


def test_forms_follow_their_formulas(generation: Generation) -> None:
    layers = take_largest(generation.grown.kv_cache())
    held = {form.name: form.held_bytes for form in list_forms(layers, window=100)}
    tokens = PROMPT + NEW - 1
    now = LAYERS * BATCH * tokens * TOKEN
    assert held["as it is, without slack"] == now
    assert held["one key/value head (MQA)"] == now // KV_HEADS
    assert held["FP8"] == now // FLOAT
    assert held["4 bits"] == now * (4 + 32 / 64) / 32
    assert held["a window of 100 tokens"] == now * 100 // tokens
    assert held["pages of 16 tokens"] == now * 640 // tokens
    assert held["in host memory"] == now * 2 // LAYERS


def test_most_sequences_fit_and_one_more_does_not(generation: Generation) -> None:
    layers = take_largest(generation.grown.kv_cache())
    room = 10 * 2**20
    most = max_batch(layers, tokens=1000, room_bytes=room)
    assert most > 0
    assert cache_bytes_at(layers, tokens=1000, batch=most) <= room
    assert cache_bytes_at(layers, tokens=1000, batch=most + 1) > room


def measure_cache(model: nn.Module, batch: int, tokens: int, **options: object) -> pl.DataFrame:
    ids = torch.randint(3, 61, (batch, tokens), generator=torch.Generator().manual_seed(1))
    with attnprof.trace(samples_per_second=0) as tracer:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4,
            do_sample=False, pad_token_id=0, **options,
        )  # fmt: skip
    return tracer.run.kv_cache()


WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("name", "sizes", "options", "is_worst_in_prefill"),
    [
        ("LlamaForCausalLM", {}, {}, False),
        ("LlamaForCausalLM", {}, {"cache_implementation": "static"}, False),
        ("Gemma3ForCausalLM", WINDOW, {"cache_implementation": "static"}, False),
        ("Gemma3ForCausalLM", WINDOW, {}, True),  # its windows are views of the whole prompt
    ],
)
def test_cache_of_another_length_and_batch_is_predicted(
    name: str, sizes: dict[str, Any], options: dict[str, Any], is_worst_in_prefill: bool
) -> None:
    model = build(name, **SIZES, **sizes)
    layers = take_largest(measure_cache(model, 2, 30, **options))
    measured = measure_cache(model, 3, 80, **options)
    rows = measured.filter(pl.col("forward") == (0 if is_worst_in_prefill else 3))
    worst = rows["held_bytes"].sum() + rows["transient_bytes"].max()
    tokens = 80 if is_worst_in_prefill else 80 + 3
    assert cache_bytes_at(layers, tokens=tokens, batch=3) == worst


def test_saving_of_a_cache_of_fixed_length_is_predicted_to_the_byte() -> None:
    """In a program that reads only what it wrote."""
    final = 7 + 4
    room = [tuple(torch.zeros(2, 4, final, 12) for _ in "kv") for _ in range(2)]
    runs = []
    torch.manual_seed(0)
    for store, past in ((concatenate, [None, None]), (write_slice, room)):
        model = Model(store).eval()
        prompt = torch.randn(2, 7, 48)
        with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
            output, past = model(prompt, past, 0)
            for start in range(7, final):
                output, past = model(output[:, -1:], past, start)
        runs.append(tracer.run)
    grown, fixed = (run.kv_cache() for run in runs)
    assert set(fixed["growing_bytes"]) == {0}
    assert fixed["held_bytes"].max() == grown["held_bytes"].max()
    predicted = runs[0].what_if("cache_static").after.total_bytes
    assert predicted == runs[1].peak().total_bytes < runs[0].peak().total_bytes
