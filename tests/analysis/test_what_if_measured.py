"""What one form of a small program predicts of another, measured: to the byte."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from what_if_programs import Form, evaluate, train

from attnprof.analysis.what_if.table import Table
from attnprof.run import Run

Record = Callable[..., Run]

WRITTEN = Form()
FUSED = Form(attention="fused")
MASKED = Form(attention="masked")
DROPPED = Form(dropout=0.1)
HALF = Form(dtype=torch.bfloat16)
LARGE_HEAD = Form(vocabulary=4000)
CHECKPOINTED = Form(checkpoint=True)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Return the run of a form of the program; each is recorded once."""
    folder, numbers, runs = tmp_path_factory.mktemp("forms"), count(), dict[Any, Run]()

    def find(form: Form, how: Callable[[Path, Form], Run] = train) -> Run:
        if (form, how) not in runs:
            runs[form, how] = how(folder / str(next(numbers)), form)
        return runs[form, how]

    return find


@pytest.mark.parametrize(
    ("scenarios", "first", "second"),
    [
        (["fused_attention"], WRITTEN, FUSED),
        (["fused_attention"], replace(WRITTEN, attention="scaled"), FUSED),
        (["fused_attention"], replace(WRITTEN, mask="bool"), FUSED),
        (["fused_attention"], CHECKPOINTED, replace(FUSED, checkpoint=True)),
        (["no_attention_dropout"], DROPPED, WRITTEN),
        (["no_attention_dropout", "fused_attention"], DROPPED, FUSED),
        (["bf16_softmax"], replace(HALF, upcast=True), HALF),
        (
            ["bf16_softmax"],
            replace(HALF, upcast=True, dropout=0.1),
            replace(HALF, dropout=0.1),
        ),
        (["causal_flag"], MASKED, FUSED),
        (["causal_flag"], replace(MASKED, mask="bool"), FUSED),
        (["no_mask_copies"], MASKED, replace(MASKED, mask="float")),
        (["no_mask_copies"], replace(MASKED, mask="bool"), replace(MASKED, mask="float")),
        (["checkpointing"], WRITTEN, CHECKPOINTED),
        (["checkpointing"], DROPPED, replace(CHECKPOINTED, dropout=0.1)),
        (["fused_attention", "checkpointing"], WRITTEN, replace(FUSED, checkpoint=True)),
    ],
)
def test_training_predicts_another_form(
    record: Record, scenarios: list[str], first: Form, second: Form
) -> None:
    before, measured = record(first), record(second).peak()
    predicted = before.what_if(*scenarios)
    assert predicted.after.total_bytes == measured.total_bytes
    assert predicted.after.phase == measured.phase
    # What is found must be worth finding: a forecast of no change would not do.
    assert predicted.saves_bytes > 0.02 * before.peak().total_bytes


@pytest.mark.parametrize("length", [72, 180])
def test_forward_alone_predicts_fused_attention(record: Record, length: int) -> None:
    before = record(replace(WRITTEN, length=length), evaluate)
    measured = record(replace(FUSED, length=length), evaluate).peak()
    assert before.what_if("fused_attention").after.total_bytes == measured.total_bytes


@pytest.mark.parametrize("scenarios", [[], ["fused_attention"]])
def test_longer_sequences_are_predicted(record: Record, scenarios: list[str]) -> None:
    predicted = record(WRITTEN).what_if(*scenarios, seq_len=180).after
    second = FUSED if scenarios else WRITTEN
    assert predicted.total_bytes == record(replace(second, length=180)).peak().total_bytes


def test_larger_batches_are_predicted(record: Record) -> None:
    predicted = record(WRITTEN).what_if(batch=3).after
    assert predicted.total_bytes == record(replace(WRITTEN, batch=6)).peak().total_bytes


def test_batches_of_as_many_as_heads_are_told_apart(record: Record) -> None:
    form = replace(WRITTEN, batch=WRITTEN.heads)
    predicted = record(form).what_if(batch=0.5).after
    assert predicted.total_bytes == record(replace(form, batch=2)).peak().total_bytes


def test_lengths_of_as_many_as_features_are_told_apart(record: Record) -> None:
    form = replace(WRITTEN, length=WRITTEN.width)
    predicted = record(form).what_if(seq_len=2 * WRITTEN.width).after
    measured = record(replace(form, length=2 * WRITTEN.width)).peak()
    assert predicted.total_bytes == measured.total_bytes


def test_a_batch_of_one_scales_all_that_has_tokens(record: Record) -> None:
    predicted = record(replace(WRITTEN, batch=1)).what_if(batch=2).after
    measured = record(WRITTEN).peak()
    # Where the batch is 1, torch reshapes without a copy here and there.
    assert predicted.total_bytes == pytest.approx(measured.total_bytes, rel=0.02)


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has it from 2.13 on"
)
def test_a_chunked_loss_is_predicted(record: Record) -> None:
    predicted = record(LARGE_HEAD).what_if("chunked_loss")
    measured = record(replace(LARGE_HEAD, chunked=True)).peak()
    # What torch makes besides its buffer is small beside the logits.
    assert predicted.after.total_bytes == pytest.approx(measured.total_bytes, rel=0.02)
    assert not predicted.exact


def test_a_fused_optimizer_is_predicted(record: Record) -> None:
    form = replace(WRITTEN, length=8)  # so short that the peak is in the optimizer's step
    foreach = partial(train, make_optimizer=partial(torch.optim.AdamW, foreach=True))
    fused = partial(train, make_optimizer=partial(torch.optim.AdamW, fused=True))
    before = record(form, foreach)
    assert before.peak().phase == "optimizer"
    predicted = before.what_if("fused_optimizer").after
    assert predicted.total_bytes == record(form, fused).peak().total_bytes


@pytest.mark.parametrize("form", [WRITTEN, LARGE_HEAD])
def test_gradients_freed_in_time_are_predicted(record: Record, form: Form) -> None:
    before = record(form, partial(train, steps=3, zeroing="zeros"))
    after = record(form, partial(train, steps=3))
    predicted = before.what_if("free_gradients")
    assert predicted.after.total_bytes == after.peak().total_bytes
    assert predicted.saves_bytes > 0


def test_forwards_without_backward_need_no_activations(record: Record) -> None:
    before = record(WRITTEN, partial(evaluate, with_gradients=True))
    measured = record(WRITTEN, evaluate).peak()
    predicted = before.what_if("no_grad").after
    # How long local variables live is a guess; what autograd held is not.
    assert predicted.total_bytes == pytest.approx(measured.total_bytes, rel=0.1)
    assert predicted.total_bytes < 0.5 * before.peak().total_bytes


def test_optimizer_states_of_8_bits_are_counted(record: Record) -> None:
    predicted = record(LARGE_HEAD).what_if("optimizer_8bit")
    # Two moments of the embedding and of the head; all other tensors are too small.
    elements = 4 * LARGE_HEAD.vocabulary * LARGE_HEAD.width
    saved = 4 * elements - (elements + 4 * elements // 256)
    before, after = (
        p.by_category()["optimizer_state"] for p in (predicted.before, predicted.after)
    )
    assert before - after == predicted.saves_bytes == saved


def test_predictions_hold_what_they_say(record: Record) -> None:
    for scenario in ("fused_attention", "checkpointing"):
        peak = record(WRITTEN).what_if(scenario).after
        assert sum(peak.by_category().values()) == peak.total_bytes
        assert peak.by_layer()["size_bytes"].sum() == peak.total_bytes
        assert peak.allocations["size_bytes"].sum() == peak.total_bytes


def test_fused_attention_holds_no_scores(record: Record) -> None:
    held = record(WRITTEN).what_if("fused_attention").after.by_category()
    assert not {"softmax", "attention_scores", "attention_mask"} & held.keys()


def test_a_table_as_recorded_has_the_recorded_peak(record: Record) -> None:
    run = record(WRITTEN)
    replayed = Table.of(run.attribution).find_peak(run.attribution)
    peak = run.peak()
    assert replayed.allocations.equals(peak.allocations)
    for name in ("device", "total_bytes", "step", "phase", "layer", "op", "time_ns"):
        assert getattr(replayed, name) == getattr(peak, name)


def test_a_what_if_leaves_the_run_as_it_was(record: Record) -> None:
    run = record(WRITTEN)
    before = run.peak().by_category()
    run.advice()
    run.what_if("checkpointing")
    assert run.peak().by_category() == before
