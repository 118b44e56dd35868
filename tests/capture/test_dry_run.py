"""A dry run is the real program without its memory: same ops, same bytes, and honest refusals."""

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import CASES, Case, make_llama, make_nano
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.optim import optimizer
from torch.utils import _foreach_utils

from attnprof.capture.dry_run import dry_run
from attnprof.capture.fake_rules import ASSUMED_READ
from attnprof.capture.workload import record_workload
from attnprof.errors import DryRunError
from attnprof.run import Run

Step = Callable[[], Any]


def make_training(make_case: Callable[[], Case], seq_len: int, device: str) -> Step:
    case = make_case()

    def step() -> None:
        case.train()

    return step


def make_adamw(seq_len: int, device: str) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(2, seq_len, 16, device=device)

    def step() -> None:
        model(batch).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


async def step_later() -> None:
    """Run when it is awaited."""


def step_partly() -> Iterator[None]:
    """Run when it is iterated over."""
    yield


def both(make_step: Callable[[int, str], Step], seq_len: int = 24) -> tuple[Run, Run]:
    return record_workload(make_step, seq_len), dry_run(make_step, seq_len)


def tabulate(run: Run) -> list[tuple[Any, ...]]:
    """Return what a run's allocations have in common with any other run of the program."""
    return sorted(
        run.allocations.select(
            "size_bytes", "step", "phase", "layer", "op", "category", "role", "dtype", "saved"
        ).rows(),
        key=repr,
    )


PROGRAMS = {
    **CASES,
    "dropout": functools.partial(make_nano, dropout=0.1),
    "checkpoint": functools.partial(make_nano, checkpoint="non-reentrant"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_dry_run_has_the_peak_of_the_real_one(name: str) -> None:
    real, dry = both(functools.partial(make_training, PROGRAMS[name]))
    assert dry.peak().total_bytes == real.peak().total_bytes
    assert dry.peak().by_category() == real.peak().by_category()


def test_dry_run_makes_the_same_allocations() -> None:
    real, dry = both(make_adamw)
    assert tabulate(dry) == tabulate(real)
    assert dry.peak().device == "cpu"
    assert dry.info["workload"]["steps"] == real.info["workload"]["steps"] == 2


def test_dry_run_uses_no_memory_that_grows_with_the_length() -> None:
    n = 2**20

    def make_step(seq_len: int, device: str) -> Step:
        x = torch.zeros(1, seq_len, device=device)
        return lambda: (x.transpose(0, 1) @ x).softmax(-1)

    assert dry_run(make_step, n).peak().total_bytes == 4 * n + 2 * 4 * n * n


def test_dry_run_restores_torch() -> None:
    def list_replaced() -> list[Any]:
        return [
            torch._subclasses.FakeTensor,
            torch.utils.swap_tensors,
            optimizer._foreach_supported_types,
            optimizer._get_foreach_kernels_supported_devices,
            _foreach_utils._foreach_supported_types,
            FakeTensor.__deepcopy__,
            logging.getLogger("torch._subclasses.fake_tensor").disabled,
        ]

    before = list_replaced()
    dry_run(make_adamw, 8)
    assert list_replaced() == before


def test_dry_run_knows_values_made_of_numbers() -> None:
    seen = []

    def make_step(seq_len: int, device: str) -> Step:
        rates = [rate.item() for rate in torch.linspace(0, 0.5, 3, device=device)]
        mask = torch.ones(2, seq_len, seq_len, device=device)
        positions = torch.arange(seq_len, device=device)

        def step() -> None:
            seen.append(rates)
            seen.append(bool((mask == 1).all()))
            seen.append(bool((1 - mask[:, :1]).any()))
            seen.append(int((positions + 1).max()))
            seen.append((positions.diff() == 1).nonzero().shape[0])
            seen.append(positions[: torch.div(seq_len, 4, rounding_mode="trunc")].shape[0])

        return step

    dry_run(make_step, 100_000)
    assert seen == [[0.0, 0.25, 0.5], True, False, 100_000, 99_999, 25_000]


def test_dry_run_forgets_values_that_are_written_over() -> None:
    def make_step(seq_len: int, device: str) -> Step:
        flags = torch.zeros(4, dtype=torch.bool, device=device)
        view = flags[1:]
        view.copy_(torch.randn(3, device=device) > 0.5)
        return lambda: bool(flags.any())

    with pytest.raises(DryRunError, match=r"reads the value of a bool tensor at .*test_dry_run.py"):
        dry_run(make_step, 8)


def test_dry_run_says_which_reads_it_assumed() -> None:
    losses = []

    def make_step(seq_len: int, device: str) -> Step:
        x = torch.randn(seq_len, device=device)

        def step() -> None:
            losses.append(x.square().mean().item())

        return step

    run = dry_run(make_step, 8)
    assert losses == [ASSUMED_READ]
    (line,) = run.info["dry_run"]["assumptions"]
    assert line.startswith("a value that a dry run cannot know was read as 1.0 at ")
    assert "test_dry_run.py:" in line


def assumed_by(use: Callable[[], Any]) -> list[str]:
    """Return what a dry run of one function assumes."""
    run = dry_run(lambda seq_len, device: use, 8)
    assumptions: list[str] = run.info["dry_run"]["assumptions"]
    return assumptions


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda: torch.ones(int(torch.randint(1, 9, (2,)).max())), "were read"),
        (lambda: (torch.randperm(8).view(2, 4) + 1)[0].clone().tolist(), "were read"),
        (lambda: torch.randint(0, 2, (8,)).nonzero(), "decided on a shape"),
        (lambda: torch.empty((), dtype=torch.int64).random_().item(), "were read"),
    ],
)
def test_dry_run_says_where_chance_decided(use: Callable[[], Any], what: str) -> None:
    (line,) = assumed_by(use)
    assert line.startswith(f"numbers drawn at random {what} at ")
    assert "test_dry_run.py:" in line


def test_dry_run_knows_what_chance_has_no_part_in() -> None:
    def use() -> None:
        drawn = torch.randint(0, 9, (2, 8))
        assert drawn.zero_().sum().item() == 0
        assert torch.arange(8).sum().item() == 28
        nn.functional.embedding(torch.randint(0, 9, (2, 8)), torch.zeros(9, 4))

    assert assumed_by(use) == []


def test_dry_run_takes_batches_from_a_loader() -> None:
    data = torch.utils.data.TensorDataset(torch.zeros(8, 16))

    def make_step(seq_len: int, device: str) -> Step:
        batches = iter(torch.utils.data.DataLoader(data, batch_size=2, shuffle=True))
        layer = nn.Linear(16, 16, device=device)
        return lambda: layer(next(batches)[0]).sum().backward()

    real, dry = both(make_step)
    assert dry.peak().total_bytes == real.peak().total_bytes


def test_dry_run_takes_no_memory_for_long_vectors() -> None:
    n = 2**21  # 32 TiB, as int64

    def make_step(seq_len: int, device: str) -> Step:
        return lambda: torch.arange(seq_len * seq_len).view(seq_len, seq_len)

    assert dry_run(make_step, n).peak().total_bytes == n * n * 8


def test_dry_run_formats_numbers() -> None:
    texts = []

    def make_step(seq_len: int, device: str) -> Step:
        loss = torch.randn(seq_len, device=device, requires_grad=True).mean()
        return lambda: texts.append(f"{loss:.3f} of {torch.tensor(seq_len):>3}")

    run = dry_run(make_step, 8)
    assert texts == [f"{ASSUMED_READ:.3f} of   8"]
    assert len(run.info["dry_run"]["assumptions"]) == 1


def test_dry_run_takes_values_for_finite() -> None:
    def make_step(seq_len: int, device: str) -> Step:
        x = torch.randn(seq_len, device=device)

        def step() -> None:
            loss = x.square().mean()
            assert torch.isfinite(loss)
            assert not torch.isnan(loss)

        return step

    dry_run(make_step, 8)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda x: x[x > 0], "the shape of a result depends on the values"),
        (lambda x: x.argsort()[0].item(), "reads the value of a int64 tensor"),
        (lambda x: x.argsort().numpy(), "reads the value of a int64 tensor"),
        (lambda x: torch.equal(x, -x), "the program reads values of a tensor"),
        (lambda x: nn.Linear(2, 2, device="meta").to_empty(device="cpu"), "moved from the meta"),
    ],
)
def test_dry_run_names_the_line_that_needs_values(
    use: Callable[[torch.Tensor], Any], message: str
) -> None:
    def make_step(seq_len: int, device: str) -> Step:
        x = torch.randn(seq_len, device=device)
        return lambda: use(x)

    with pytest.raises(DryRunError, match=message) as caught:
        dry_run(make_step, 8)
    assert "test_dry_run.py:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dry_run_refuses_a_model_from_outside() -> None:
    model = nn.Linear(4, 4)

    def make_step(seq_len: int, device: str) -> Step:
        return lambda: model(torch.zeros(seq_len, 4, device=device)).sum().backward()

    with pytest.raises(DryRunError, match=r"shape \(4, 4\).*build the model inside make_step"):
        dry_run(make_step, 8)
    assert model.weight.grad is None


def test_dry_run_passes_the_programs_own_exceptions_on() -> None:
    def make_step(seq_len: int, device: str) -> Step:
        raise LookupError(f"no model for {seq_len}")

    with pytest.raises(LookupError, match="no model for 8"):
        dry_run(make_step, 8)


def test_dry_run_copies_and_converts_modules() -> None:
    def make_step(seq_len: int, device: str) -> Step:
        layer = nn.Linear(8, 8, device=device)
        layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(3)]).to(torch.bfloat16)
        x = torch.zeros(seq_len, 8, dtype=torch.bfloat16, device=device)

        def step() -> None:
            y = x
            for each in layers:
                y = functional.relu(each(y))
            y.sum().backward()

        return step

    real, dry = both(make_step)
    assert tabulate(dry) == tabulate(real)


@pytest.mark.parametrize(
    ("make_step", "seq_len", "error", "message"),
    [
        (None, 8, TypeError, "make_step must be a function make_step"),
        (lambda seq_len: None, 8, TypeError, r"cannot be called as make_step\(seq_len, device\)"),
        (lambda seq_len, device: 3, 8, TypeError, "must return a function that runs one step"),
        (lambda seq_len, device: nn.Linear(1, 1), 8, TypeError, "Linear, .* without arguments"),
        (lambda seq_len, device: lambda batch: None, 8, TypeError, "without arguments: .*'batch'"),
        (lambda seq_len, device: step_later, 8, TypeError, "a coroutine, .* none of it has run"),
        (lambda seq_len, device: step_partly, 8, TypeError, "a generator, .* none of it has run"),
        (make_adamw, 0, ValueError, "seq_len must be 1 or more, got 0"),
        (make_adamw, 8.0, TypeError, "seq_len must be a whole number, got 8.0"),
        (make_adamw, True, TypeError, "seq_len must be a whole number, got True"),
    ],
)
@pytest.mark.parametrize("record", [record_workload, dry_run])
def test_bad_arguments_are_refused(
    record: Any, make_step: Any, seq_len: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        record(make_step, seq_len)


def test_steps_are_as_many_as_asked_for() -> None:
    assert len(record_workload(make_adamw, 8, steps=3).steps) == 3
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        record_workload(make_adamw, 8, steps=0)


def test_one_step_is_enough_where_nothing_is_left_behind() -> None:
    def make_step(seq_len: int, device: str) -> Step:
        x = torch.zeros(seq_len, device=device)
        return lambda: x * 2

    assert record_workload(make_step, 8).info["workload"] == {
        "seq_len": 8,
        "source": "measured",
        "make_step": "test_dry_run.py:"
        "test_one_step_is_enough_where_nothing_is_left_behind.<locals>.make_step",
        "steps": 1,
    }


def test_dry_run_generates_without_an_end_token() -> None:
    def make_step(seq_len: int, device: str) -> Step:
        model = make_llama("sdpa").model
        model.generation_config.eos_token_id = None
        ids = torch.randint(3, 60, (2, seq_len), device=device)
        return lambda: model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)

    real, dry = both(make_step, 12)
    assert dry.peak().total_bytes == real.peak().total_bytes
    assert dry.peak().by_category() == real.peak().by_category()
    assert dry.peak().by_category()["kv_cache"] > 0


def test_dry_run_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()

    def make_step(seq_len: int, device: str) -> Step:
        ids = torch.randint(0, 9, (seq_len,), device=device)
        assert not (ids < 0).any()
        return lambda: torch.randn(seq_len, device=device)

    dry_run(make_step, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
