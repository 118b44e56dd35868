"""Runs of compiled code and of CUDA graphs, recorded with a real history of CUDA's allocator."""

import polars as pl
import pytest

from attnprof.pytest_plugin.verdicts import find_doubts
from tests.traced.recordings import LAYERS, SCORES, Load, notes_of, rounded


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
