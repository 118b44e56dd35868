"""Runs of compiled code and of CUDA graphs, recorded with a real history of CUDA's allocator."""

import polars as pl
import pytest

from attnprof.analysis.allocator.pools import SHARED
from attnprof.analysis.device_history import AllocatorAttribution
from attnprof.pytest_plugin.verdicts import find_doubts
from attnprof.report.allocator_summary import describe_state, explain_failure
from attnprof.units import format_bytes
from tests.traced.recordings import (
    BATCH,
    LAYERS,
    LENGTH,
    MIB,
    SCORES,
    WIDTH,
    Load,
    notes_of,
    rounded,
)


@pytest.mark.parametrize("case", ["compiled", "graphs"])
def test_softmax_inside_kernels_that_triton_compiled_is_found(load: Load, case: str) -> None:
    layers = load(case).layers()
    assert layers["layer"].cast(pl.String).unique().sort().to_list() == [
        f"transformer.h.{i}.attn" for i in range(LAYERS)
    ]
    assert layers["softmax_bytes"].to_list() == [SCORES] * len(layers)


def test_memory_from_before_is_not_what_the_first_compiled_op_takes(load: Load) -> None:
    categories = load("compiled_gqa").peak().by_category()
    cublas = 2 * 4096 * 1024 + 8 * 16 * 1024
    assert categories["preexisting"] == 2 * cublas
    assert "workspace" not in categories


def test_replayed_graphs_are_said_to_hide_what_they_need(load: Load) -> None:
    run = load("replayed_graphs")
    assert run.layers().is_empty()
    (note,) = notes_of(run, "pools")
    assert note.is_warning
    assert "A CUDA graph that is replayed takes no blocks" in note.text
    (doubt,) = [doubt for doubt in find_doubts(run) if "private pools" in doubt]
    assert doubt.startswith("private pools held 26.0 MiB of cuda:0")
    assert not [doubt for doubt in find_doubts(load("compiled")) if "private pools" in doubt]
    # Where they are recorded inside the trace, it is there.
    recorded = load("graphs").peak().by_category()
    assert recorded["softmax"] == LAYERS * rounded(SCORES)


def test_private_pools_are_said_and_counted(load: Load) -> None:
    (note,) = notes_of(load("private_pool"), "pools")
    assert note.text.startswith("22.0 MiB of what was reserved at the end belong to private pools")
    assert notes_of(load("gpt2"), "pools") == []


@pytest.mark.parametrize("case", ["private_pool", "own_graph"])
def test_blocks_that_the_layer_made_in_a_pool_of_its_own_lie_there(load: Load, case: str) -> None:
    run = load(case)
    assert isinstance(run.attribution, AllocatorAttribution)
    (history,) = run.attribution.histories
    lies_there = history.pool[history.lives.begin] != SHARED
    # Q, K and V in one, once in the pool and once outside.
    sizes = history.lives.size_bytes
    qkv = rounded(4 * BATCH * LENGTH * 3 * WIDTH)
    assert (sizes[lies_there] == qkv).sum() == (sizes[~lies_there] == qkv).sum() == 1
    state = run.memory_state(run.peak(device="cuda:0"))
    assert state is not None
    assert 0 < state.private_bytes < state.allocated_bytes
    assert f"{format_bytes(state.private_bytes)} of what was in use lay" in describe_state(state)


def test_failed_request_could_not_have_what_is_free_in_a_private_pool(load: Load) -> None:
    failure = load("pool_out_of_memory").out_of_memory()
    assert failure is not None
    assert failure.requested_bytes == 50 * MIB
    state = failure.state
    assert failure.requested_bytes < state.free_bytes + failure.device_free_bytes
    assert not failure.is_fragmented
    assert failure.fits_with_expandable_segments is False
    text = " ".join(explain_failure(failure))
    locked = format_bytes(state.private_free_bytes)
    assert f"{locked} of them lay in private pools" in text
    assert "what was free outside of private pools would have been 4.1 MiB too little" in text


def test_modules_whose_weights_are_cast_inside_kernels_are_told_apart(load: Load) -> None:
    run = load("compiled_gqa")
    assert run.layers()["layer"].to_list() == [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    facts = run.attribution.facts
    products = [
        op
        for op in range(facts.count)
        if facts.is_compiled[op] and facts.short_names[facts.code[op]] == "mm"
    ]
    linear = [
        *(f"model.layers.{i}.{name}" for i in range(LAYERS) for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )),
        "lm_head",
    ]  # fmt: skip
    for is_backward, times in ((False, 1), (True, 2)):
        paths = [
            facts.module_paths[facts.op_module[op]]
            for op in products
            if facts.is_backward[op] == is_backward
        ]
        steps = len(paths) // (len(linear) * times)
        assert sorted(paths) == sorted(steps * times * linear)
