"""The ledger against the CPU allocator itself, on real models, to the byte."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import attnprof
from attnprof import Run
from tests.capture.oracle import Block, find_peak_bytes, record_blocks
from tests.models import CASES, Case, make_gpt2, make_llama, make_nano, storage_bytes, tokens
from tests.versions import needs_profiled_modes


def record_traced(program: Callable[[], object]) -> tuple[Run, list[Block]]:
    """Run ``program`` traced; return the run and the allocator's account of the same moments."""
    with attnprof.trace(samples_per_second=0) as tracer:
        blocks = record_blocks(program)
    return tracer.run, blocks


NUMBER_BYTES = 8
"""What C++ makes of a Python number that takes part in an op; a mode is handed the number."""


def assert_ledger_is_exact(case: Case, program: Callable[[], object]) -> None:
    """Assert that a run's peak is what existed before plus the allocator's peak.

    What no dispatch mode can see is left out of the latter: scratch, which an op takes and gives
    back before it returns, and what C++ takes beside ops: numbers, and the random states that
    checkpointing keeps.
    """
    run, blocks = record_traced(program)
    beside = {block.size_bytes for block in blocks if block.is_beside_ops}
    assert beside <= {NUMBER_BYTES, torch.get_rng_state().nbytes}
    seen = [block for block in blocks if not (block.is_scratch or block.is_beside_ops)]
    peak = run.peak()
    assert peak.total_bytes - storage_bytes(case.tensors()) == find_peak_bytes(seen)
    assert sum(peak.by_category().values()) == peak.total_bytes


@pytest.mark.parametrize("name", CASES)
def test_ledger_of_training_matches_allocator(name: str) -> None:
    case = CASES[name]()
    assert_ledger_is_exact(case, case.train)


@needs_profiled_modes
@pytest.mark.parametrize("name", CASES)
def test_ledger_of_inference_matches_allocator(name: str) -> None:
    case = CASES[name]()
    assert_ledger_is_exact(case, case.infer)


@needs_profiled_modes
@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_ledger_of_decoding_matches_allocator(make: Callable[[str], Case], attention: str) -> None:
    model = make(attention).model.eval()
    case = Case(model, {"input_ids": tokens(length=9)})
    assert_ledger_is_exact(
        case,
        lambda: model.generate(**case.inputs, max_new_tokens=5, do_sample=False, pad_token_id=0),
    )


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_ledger_of_layers_that_run_as_one_op_matches_allocator(
    norm_first: bool, is_padded: bool
) -> None:
    """In evaluation torch's own encoder is an op per layer, and its scores come and go inside."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    inputs = {"src": torch.randn(2, 48, 16)}
    if is_padded:
        inputs["src_key_padding_mask"] = torch.arange(48).expand(2, 48) > 40
    case = Case(model, inputs)

    @torch.no_grad()
    def infer() -> torch.Tensor:
        return model(**inputs)

    expected = infer()
    assert_ledger_is_exact(case, infer)
    run, _ = record_traced(lambda: torch.testing.assert_close(infer(), expected, rtol=0, atol=0))
    assert (
        run.layers()["scores_peak_bytes"].to_list() == [(1 + is_padded) * 2 * 2 * 48 * 48 * 4] * 2
    )


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_ledger_of_checkpointing_matches_allocator(kind: str) -> None:
    case = make_nano(dropout=0.1, checkpoint=kind)
    assert_ledger_is_exact(case, case.train)


@needs_profiled_modes
def test_ledger_of_autocast_matches_allocator() -> None:
    case = make_nano()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = case.loss()
        loss.backward()

    assert_ledger_is_exact(case, step)


def test_ledger_of_an_optimizer_step_matches_allocator() -> None:
    case = make_gpt2()
    optimizer = torch.optim.AdamW(case.model.parameters())

    def steps() -> None:
        for _ in range(2):
            case.train()
            optimizer.step()
            optimizer.zero_grad()

    assert_ledger_is_exact(case, steps)


@needs_profiled_modes
def test_oracle_sees_scratch() -> None:
    """A check of the judge: a product of transposed matrices copies one of them inside itself."""
    x = torch.randn(3, 40, 50)
    with attnprof.trace(samples_per_second=0):
        blocks = record_blocks(lambda: torch.nn.functional.conv1d(x, torch.ones(7, 40, 3)))
    scratch = [block for block in blocks if block.is_scratch]
    assert sum(block.size_bytes for block in scratch) > 0
    assert find_peak_bytes(blocks) > find_peak_bytes([b for b in blocks if not b.is_scratch])
