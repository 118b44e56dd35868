"""Asking for what-ifs: what is advised, in which order, and what is refused."""

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from what_if_programs import Form, evaluate, make_program, train

import attnprof
from attnprof.analysis.what_if.advice import SCENARIOS, ask_all
from attnprof.analysis.what_if.scenario import Options
from attnprof.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Attention written out, with dropout."""
    return train(tmp_path_factory.mktemp("advice") / "run", Form(dropout=0.1))


def test_advice_comes_with_the_largest_saving_first(run: Run) -> None:
    advice = run.advice()
    savings = [one.saves_bytes for one in advice]
    assert savings == sorted(savings, reverse=True)
    assert savings[-1] > 0.01 * run.peak().total_bytes


def test_advice_is_a_what_if(run: Run) -> None:
    for one in run.advice():
        found = run.what_if(*one.scenarios)
        assert (one.saves_bytes, one.new_peak_bytes) == (
            found.saves_bytes,
            found.after.total_bytes,
        )
        assert one.new_peak_bytes + one.saves_bytes == run.peak().total_bytes
        assert (one.new_peak_phase, one.new_peak_layer) == (found.after.phase, found.after.layer)


def test_advice_says_what_why_and_how(run: Run) -> None:
    by_kind = {one.kind: one for one in run.advice()}
    fused = by_kind["fused_attention"]
    assert fused.title == "Fused attention, no dropout on attention weights"
    assert fused.scenarios == ("no_attention_dropout", "fused_attention")
    assert "F.scaled_dot_product_attention(q, k, v, is_causal=True)" in fused.how
    assert fused.evidence.startswith("3 layers write out scores and softmax, which hold ")
    assert fused.layers == ("blocks.0", "blocks.1", "blocks.2")
    assert by_kind["checkpointing"].layers == fused.layers
    assert all(one.exact or one.kind in ("chunked_loss", "optimizer_8bit") for one in run.advice())


def test_advice_leaves_out_what_needs_a_number(run: Run) -> None:
    needy = {scenario.name for scenario in SCENARIOS if scenario.needs}
    assert needy == {"gqa", "cache_latent", "batch", "seq_len"}
    assert not needy & {one.kind for one in run.advice()}


def test_a_run_without_anything_has_no_advice(tmp_path: Path) -> None:
    with attnprof.trace(tmp_path / "run", samples_per_second=0) as tracer:
        pass
    assert tracer.run.advice() == []


def test_a_run_without_attention_is_told_so(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    with attnprof.trace(tmp_path / "run", samples_per_second=0) as tracer:
        model(torch.randn(4, 8)).sum().backward()
    with pytest.raises(ValueError, match="fused_attention does not apply to this run: it has no"):
        tracer.run.what_if("fused_attention")
    with pytest.raises(ValueError, match="no modules of one class in a list"):
        tracer.run.what_if("checkpointing")


def test_several_changes_come_in_a_fixed_order(run: Run) -> None:
    one = run.what_if("checkpointing", "fused_attention", "no_attention_dropout")
    other = run.what_if("no_attention_dropout", "fused_attention", "checkpointing")
    assert one.scenarios == other.scenarios
    assert one.after.total_bytes == other.after.total_bytes
    assert one.saves_bytes > run.what_if("checkpointing").saves_bytes


def test_numbers_add_the_scenario_that_needs_them(run: Run) -> None:
    assert run.what_if(batch=2).scenarios == ("batch",)
    assert run.what_if("checkpointing", seq_len=144).scenarios == ("checkpointing", "seq_len")


@pytest.mark.parametrize(
    ("scenarios", "arguments", "message"),
    [
        ((["fused_attention"],), {}, "scenarios are names, one argument each; got ['fused"),
        ((), {"seq_len": "4K"}, "seq_len must be a whole number, got '4K' (str)"),
        ((), {"batch": "2"}, "batch must be a number, got '2' (str)"),
    ],
)
def test_what_is_of_the_wrong_type_is_refused(
    run: Run, scenarios: tuple[Any, ...], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        run.what_if(*scenarios, **arguments)


@pytest.mark.parametrize(
    ("scenarios", "arguments", "message"),
    [
        ((), {}, "no scenario was given; expected one or more of: no_attention_dropout, fused"),
        (("flash",), {}, "unknown scenario 'flash'; expected one or more of: no_attention_dro"),
        (("batch",), {}, "batch needs a number: give batch (in a shell, --batch)"),
        (("gqa",), {}, "gqa needs a number: give kv_heads (in a shell, --heads)"),
        ((), {"batch": 0.0}, "batch must be a number above 0, got 0.0"),
        ((), {"batch": float("nan")}, "batch must be a number above 0, got nan"),
        ((), {"seq_len": -4}, "seq_len must be a number above 0, got -4"),
        ((), {"seq_len": 2**40}, "the blocks would add up to 2^63 bytes or more"),
        ((), {"batch": 1e300}, "the blocks would add up to 2^63 bytes or more"),
        (
            ("cache_fp8", "cache_int4"),
            {},
            "cache_fp8 and cache_int4 both decide the cache's dtype; give one of them",
        ),
        (
            ("fused_attention",),
            {},
            "fused_attention does not apply to this run: the CPU's fused kernel takes no dropout",
        ),
        (("no_grad",), {}, "every forward with gradients on was followed by its backward"),
        (("checkpointing",), {"device": "cuda:0"}, "the run has no device 'cuda:0'"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    run: Run, scenarios: tuple[str, ...], arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run.what_if(*scenarios, **arguments)  # type: ignore[arg-type]  # of several types


def test_every_scenario_applies_or_says_why(run: Run) -> None:
    applied, refused = ask_all(run.attribution, Options(kv_heads=2, batch=2, seq_len=100))
    names = [*(what_if.scenarios[0] for what_if in applied), *refused]
    assert sorted(names) == sorted(s.name for s in SCENARIOS if s.name != "cache_latent")
    assert all(reason and "\n" not in reason for reason in refused.values())
    for what_if in applied:
        (change,) = what_if.changes
        assert change.title
        assert change.evidence
        assert change.how
        assert sum(what_if.after.by_category().values()) == what_if.after.total_bytes


def test_repeated_forwards_are_not_checkpointed_again(tmp_path: Path) -> None:
    run = train(tmp_path / "run", Form(checkpoint=True))
    with pytest.raises(ValueError, match="forwards are repeated in backward already"):
        run.what_if("checkpointing")


def test_a_forward_alone_has_nothing_to_checkpoint(tmp_path: Path) -> None:
    run = evaluate(tmp_path / "run", Form(), with_gradients=True)
    with pytest.raises(ValueError, match="no backward was recorded"):
        run.what_if("checkpointing")


def test_a_program_that_died_in_forward_is_not_told_to_do_without_gradients(
    tmp_path: Path,
) -> None:
    program, make_batch = make_program(Form())

    class Dying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program = program

        def forward(self, ids: torch.Tensor) -> None:
            self.program(ids)
            raise MemoryError

    tracing = attnprof.trace(tmp_path / "run", samples_per_second=0)
    with pytest.raises(MemoryError), tracing as tracer:
        Dying()(make_batch())
    kinds = {one.kind for one in tracer.run.advice()}
    assert "no_grad" not in kinds
    assert "fused_attention" in kinds


def test_forwards_of_several_threads_are_not_taken_for_ones_without_backward(
    tmp_path: Path,
) -> None:
    program, make_batch = make_program(Form())
    with attnprof.trace(tmp_path / "run", samples_per_second=0) as tracer:
        threads = [
            threading.Thread(target=lambda: program(make_batch()).backward()) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "no_grad" not in {one.kind for one in tracer.run.advice()}
