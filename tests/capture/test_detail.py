"""When steps are recorded and when they are only counted, with made-up counters: no GPU needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import attnprof
from attnprof import Run, Tracer
from attnprof.capture import tracer as tracing
from attnprof.capture.cuda import AllocatorHistory
from attnprof.capture.cuda_counters import Counters
from attnprof.capture.detail import FIRST_STEPS, MORE_STEPS
from attnprof.vocabulary import Status

WIDTH = 8


class Allocator(AllocatorHistory):
    """Counts on a device what a test says, and has no history."""

    peak_bytes = 0
    calls: list[str]

    def __init__(self, *_: Any) -> None:
        self.info = {}
        Allocator.calls = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        yield

    def count(self) -> dict[int, Counters]:
        return {0: Counters(7, Allocator.peak_bytes, 11, 13)} if Allocator.peak_bytes else {}

    def pause(self) -> None:
        Allocator.calls.append("pause")

    def resume(self) -> None:
        Allocator.calls.append("resume")


@pytest.fixture(autouse=True)
def allocator(monkeypatch: pytest.MonkeyPatch) -> type[Allocator]:
    monkeypatch.setattr(tracing, "AllocatorHistory", Allocator)
    Allocator.peak_bytes = 1000
    return Allocator


class Training:
    """Steps of one layer, which note how many dispatch modes they ran in."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.modes: list[int] = []
        self.losses: list[float] = []

    def step(self) -> None:
        loss = self.model(torch.ones(4, WIDTH)).square().sum()
        self.modes.append(len(_get_current_dispatch_mode_stack()))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def record(body: Callable[[Training, Tracer], None], **options: Any) -> tuple[Training, Run]:
    training = Training()
    with attnprof.trace(samples_per_second=0, **options) as tracer:
        body(training, tracer)
    return training, tracer.run


def is_detailed(run: Run) -> list[bool]:
    return run.steps["is_detailed"].to_list()


def test_first_steps_are_recorded_and_the_others_counted() -> None:
    training, run = record(lambda training, _: training.steps(8))
    assert training.modes == [1] * FIRST_STEPS + [0] * 5
    assert is_detailed(run) == [True] * FIRST_STEPS + [False] * 5
    assert Allocator.calls == ["pause", "resume"]  # what is live in the end is told anew


def test_every_step_is_recorded_where_nothing_counts() -> None:
    Allocator.peak_bytes = 0
    training, run = record(lambda training, _: training.steps(8))
    assert training.modes == [1] * 8
    assert all(is_detailed(run))


def test_full_detail_records_every_step() -> None:
    training, run = record(lambda training, _: training.steps(8), detail="full")
    assert training.modes == [1] * 8
    assert all(is_detailed(run))


def test_unknown_detail_is_refused() -> None:
    with pytest.raises(ValueError, match="detail must be one of auto, full, got 'some'"):
        attnprof.trace(detail="some")


@pytest.mark.parametrize(("peak", "rises"), [(1010, False), (1011, True)])
def test_steps_after_a_higher_peak_are_recorded(peak: int, rises: bool) -> None:
    def loop(training: Training, _: Tracer) -> None:
        training.steps(5)
        Allocator.peak_bytes = peak
        training.steps(5)

    _, run = record(loop)
    # That of the fifth step is read when the sixth begins.
    again = [True] * MORE_STEPS + [False] * 3 if rises else [False] * 5
    assert is_detailed(run) == [True] * FIRST_STEPS + [False] * 2 + again


def test_losses_are_those_of_an_untraced_loop() -> None:
    untraced = Training()
    untraced.steps(8)
    traced, _ = record(lambda training, _: training.steps(8))
    assert traced.losses == untraced.losses


def test_nothing_is_left_when_the_trace_ends_in_a_counted_step() -> None:
    record(lambda training, _: training.steps(5))
    assert _get_current_dispatch_mode_stack() == []
    assert torch.autograd.backward.__module__ == "torch.autograd"
    training, _ = record(lambda training, _: training.steps(1))
    assert training.modes == [1]


def test_marked_steps_are_counted_as_they_are_marked() -> None:
    def loop(training: Training, tracer: Tracer) -> None:
        for _ in range(6):
            training.steps(2)
            tracer.step()

    training, run = record(loop)
    # The first marks a step after two updates; what came before it went by updates.
    assert training.modes[-2:] == [0, 0]
    assert is_detailed(run)[-1] is False
    assert run.steps["step"].to_list() == list(range(len(run.steps)))


def test_loop_without_an_optimizer_is_recorded_in_full() -> None:
    def infer(training: Training, _: Tracer) -> None:
        with torch.no_grad():
            for _ in range(6):
                training.model(torch.ones(4, WIDTH))

    _, run = record(infer)
    assert is_detailed(run) == [True] * 6


class Passing(TorchDispatchMode):
    """A mode of the program's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_program_in_a_mode_of_its_own_is_recorded_in_full() -> None:
    def loop(training: Training, _: Tracer) -> None:
        with Passing():
            training.steps(6)
        training.steps(2)

    training, run = record(loop)
    assert training.modes == [2] * 6 + [0] * 2
    assert is_detailed(run) == [True] * 6 + [False] * 2


def test_mode_that_is_entered_in_counted_steps_stays_where_it_is() -> None:
    def loop(training: Training, _: Tracer) -> None:
        training.steps(4)
        Allocator.peak_bytes = 2000
        with Passing():
            training.steps(3)
        training.steps(2)

    training, _ = record(loop)
    # Recorded again only once the program has left its mode.
    assert training.modes == [1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert _get_current_dispatch_mode_stack() == []


def test_error_in_a_counted_step_ends_the_run_with_it() -> None:
    training, tracer = Training(), attnprof.trace(samples_per_second=0)

    def fail() -> None:
        with tracer:
            training.steps(5)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert tracer.run.status is Status.FAILED
    assert is_detailed(tracer.run) == [True] * FIRST_STEPS + [False] * 2


def test_what_is_said_in_counted_steps_is_not_recorded() -> None:
    def loop(training: Training, tracer: Tracer) -> None:
        training.steps(FIRST_STEPS)
        assert tracer.is_recording
        training.steps(1)
        assert not tracer.is_recording
        attnprof.tag(torch.ones(100), "kv_cache")

    _, run = record(loop)
    assert "kv_cache" not in set(run.allocations["category"].cast(str))


def test_run_can_be_read_while_steps_are_counted(tmp_path: Path) -> None:
    def loop(training: Training, tracer: Tracer) -> None:
        training.steps(6)
        assert is_detailed(tracer.run)[:FIRST_STEPS] == [True] * FIRST_STEPS
        assert len(tracer.run.steps) >= FIRST_STEPS + 1

    record(loop, directory=tmp_path / "run")


def test_modules_run_by_other_threads_are_left_alone_meanwhile() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def loop(training: Training, _: Tracer) -> None:
        training.steps(5)
        with ThreadPoolExecutor(1) as pool:
            result: Tensor = pool.submit(training.model, torch.ones(4, WIDTH)).result()
            assert pool.submit(_get_current_dispatch_mode_stack).result() == []
        assert result.shape == (4, WIDTH)

    _, run = record(loop)
    assert len(run.steps) == 5
