"""Continuous batching: pages of one pool behind all layers, written and read by another thread."""

import threading
from typing import Any

import polars as pl
import pytest
import torch

import attnprof
from attnprof.capture.block_tables import note_blocks
from attnprof.integrations.transformers import paged_cache
from attnprof.run import Run
from tests.attribution.cache_programs import (
    FLOAT,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    make_llama,
)

PAGE, BLOCKS, NEW = 4, 32, 6
TOKEN = 2 * KV_HEADS * HEAD_DIM * FLOAT
"""Bytes of K and V of one token in one layer."""


def draw_prompts(*lengths: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (n,), generator=drawn).tolist() for n in lengths]


def serve(prompts: list[list[int]], attention: str = "sdpa") -> tuple[Run, Any, int]:
    """Trace continuous batching; return the run, its answers, and the bytes of its pool."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    pools: list[int] = []
    make = PagedAttentionCache.__init__
    threads: set[int] = set()

    def watch(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        pools.append(self.cache_tensor.untyped_storage().nbytes())

    model = make_llama(attention=attention)
    model.register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    with pytest.MonkeyPatch.context() as patch, attnprof.trace(samples_per_second=0) as tracer:
        patch.setattr(PagedAttentionCache, "__init__", watch)
        with paged_cache():
            answers = model.generate_batch(
                prompts,
                generation_config=GenerationConfig(
                    max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=2,
                    pad_token_id=0,
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE, num_blocks=BLOCKS, max_batch_tokens=64, use_cuda_graph=False
                ),
            )  # fmt: skip
    assert threads.isdisjoint({threading.get_ident()})  # what was traced is a worker
    return tracer.run, answers, pools[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pool_is_the_cache_of_all_layers_at_every_step(attention: str) -> None:
    lengths = (7, 11, 5)
    run, answers, pool = serve(draw_prompts(*lengths), attention)
    assert [len(answer.generated_tokens) for answer in answers.values()] == [NEW] * 3
    frame = run.kv_cache()
    sums = frame.group_by("forward").agg(pl.col("held_bytes").sum())["held_bytes"]
    assert set(sums) == {pool}
    assert set(frame["kind"]) == {"paged"}
    assert set(frame["kv_heads"]) == {KV_HEADS}
    phases = frame.group_by("forward", maintain_order=True).first()["phase"].to_list()
    assert phases == ["prefill"] + ["decode"] * (NEW - 1)
    for _layer, rows in frame.group_by("layer"):
        first = sum(lengths)
        assert rows["tokens"].to_list() == [first + 3 * i for i in range(NEW)]
        assert rows["used_bytes"].to_list() == [(first + 3 * i) * TOKEN for i in range(NEW)]


def test_blocks_and_the_room_in_the_last_ones_are_counted() -> None:
    run, _answers, _pool = serve(draw_prompts(7, 11, 5))
    row = run.kv_cache().row(0, named=True)
    blocks = 2 + 3 + 2  # of 4 tokens, for 7, 11 and 5
    assert (row["block_tokens"], row["allocated_blocks"], row["used_blocks"]) == (
        PAGE, blocks, blocks,
    )  # fmt: skip
    assert row["free_blocks"] == BLOCKS - blocks
    assert row["shared_blocks"] == 0
    assert row["last_block_slack_bytes"] == (blocks * PAGE - (7 + 11 + 5)) * TOKEN


def test_prompts_with_a_common_beginning_share_its_blocks() -> None:
    common = draw_prompts(2 * PAGE)[0]
    run, _answers, _pool = serve([[*common, 5], [*common, 6, 7]])
    frame = run.kv_cache()
    assert frame["shared_blocks"].max() == 2
    shared = frame.filter(pl.col("shared_blocks") == 2).row(0, named=True)
    assert shared["allocated_blocks"] == 2 + 1 + 1
    assert len(frame["layer"].unique()) == LAYERS


def test_each_block_is_listed_with_its_tokens_and_sequences() -> None:
    common = draw_prompts(2 * PAGE)[0]
    run, _answers, _pool = serve([[*common, 5], [*common, 6, 7]])
    blocks, frame = run.kv_blocks(), run.kv_cache()
    assert set(blocks["block_tokens"]) == {PAGE}
    assert set(blocks["pool_blocks"]) == {BLOCKS}
    assert blocks["tokens"].max() == PAGE
    sums = blocks.group_by("forward", maintain_order=True).agg(
        tokens=pl.col("tokens").sum(),
        allocated_blocks=pl.len().cast(pl.Int64),
        shared_blocks=(pl.col("sequences") > 1).sum().cast(pl.Int64),
    )
    layer = frame.filter(pl.col("layer") == frame["layer"][0])
    assert sums["forward"].to_list() == layer["forward"].to_list()
    assert sums["allocated_blocks"].to_list() == layer["allocated_blocks"].to_list()
    assert sums["shared_blocks"].to_list() == layer["shared_blocks"].to_list()
    last = layer.row(-1, named=True)
    room = last["used_blocks"] * PAGE - int(sums["tokens"][-1])
    assert last["last_block_slack_bytes"] == room * TOKEN


def test_run_without_block_tables_lists_no_blocks() -> None:
    with attnprof.trace(samples_per_second=0) as tracer:
        torch.ones(3)
    assert tracer.run.kv_blocks().is_empty()


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_tokens": 0, "free_blocks": 1, "sequences": []},
        {"block_tokens": 4, "free_blocks": -1, "sequences": []},
        {"block_tokens": 4, "free_blocks": 2**70, "sequences": []},
        {"block_tokens": 4, "free_blocks": 1, "sequences": [([0, 1], 9)]},
    ],
)
def test_impossible_block_tables_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"note_blocks\(\) got .*expected"):
        note_blocks(torch.zeros(1), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_tokens": 4.5, "free_blocks": 1, "sequences": []},
        {"block_tokens": 4, "free_blocks": float("nan"), "sequences": []},
        {"block_tokens": 4, "free_blocks": 1, "sequences": [3]},
        {"block_tokens": 4, "free_blocks": 1, "sequences": [([0], 2)], "layers": "abc"},
    ],
)
def test_what_is_no_number_in_a_block_table_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"note_blocks\(\) got .*whole number.*expected"):
        note_blocks(torch.zeros(1), **wrong)


def test_block_tables_are_noted_in_a_trace_only() -> None:
    pool, table = torch.zeros(8), {"block_tokens": 4, "free_blocks": 1}
    note_blocks(pool, **table, sequences=[([0], 3)])
    with attnprof.trace(samples_per_second=0) as tracer:
        pool.add_(1)
        note_blocks(pool, **table, sequences=[([1], 2)])
    note_blocks(pool, **table, sequences=[([2], 1)])
    rows = tracer.run.attribution.facts.stored.table("block_tables")
    assert rows["blocks"].to_pylist() == [[1]]
    assert rows["filled"].to_pylist() == [[2]]
