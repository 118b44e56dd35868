"""What tracing costs in memory and on disk, over a long loop."""

import gc
import os
import threading
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import attnprof
from attnprof import Tracer
from attnprof.capture.ops import OpMode
from tests.models import make_gpt2

BYTES_PER_OP = 200
STEPS = 2000
LIMIT = 3 * 2**20
"""Bytes that a loop of so many steps may add to the process."""


def count_waiting(tracer: Tracer) -> dict[str, int]:
    """Return how many facts of each kind are held in memory."""
    recorder = tracer._recorder
    assert recorder is not None
    kinds = {name: value for name, value in vars(recorder).items() if isinstance(value, list)}
    assert {"ops", "storage_events", "scopes", "samples"} <= set(kinds)
    return {name: len(value) for name, value in kinds.items() if name != "before_commit"}


def size_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_run_takes_few_bytes_per_op(tmp_path: Path) -> None:
    case = make_gpt2()
    optimizer = torch.optim.AdamW(case.model.parameters())
    with attnprof.trace(tmp_path, samples_per_second=0) as tracer:
        for _ in range(5):
            case.train()
            optimizer.step()
            optimizer.zero_grad()
    ops = int(tracer.run.steps["ops"].sum())
    assert ops > 2000
    assert size_on_disk(tmp_path) < BYTES_PER_OP * ops


def test_long_loop_holds_nothing_between_steps() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    process = psutil.Process(os.getpid())

    def step() -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with attnprof.trace(samples_per_second=0) as tracer:
        for _ in range(STEPS // 10):
            step()
        gc.collect()
        before = process.memory_info().rss
        live = len(tracer._ledger.live)
        for _ in range(STEPS):
            step()
            assert max(count_waiting(tracer).values()) < 10  # frees since the optimizer's step
        gc.collect()
        assert len(tracer._ledger.live) == live
        assert len(tracer._names._roles) < STEPS
        # Kept by Python and by Arrow's pool for the next commit; growth would be 100 bytes an op.
        assert process.memory_info().rss - before < LIMIT
    ops_per_step = tracer.run.steps["ops"].to_list()[-2]
    assert STEPS * ops_per_step * 100 > LIMIT  # so that growth would have been seen


def test_step_mark_commits_everything() -> None:
    with attnprof.trace(samples_per_second=0) as tracer:
        nn.Linear(4, 4)(torch.ones(2, 4)).sum().backward()
        assert count_waiting(tracer)["ops"] > 0
        tracer.step()
        assert set(count_waiting(tracer).values()) == {0}


def test_long_step_is_committed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnprof.capture.ops.COMMIT_OPS", 50)
    waiting = []
    with attnprof.trace(samples_per_second=0) as tracer:
        x = torch.ones(3)
        for _ in range(500):
            x = x + 1
            waiting.append(count_waiting(tracer)["ops"])
    assert max(waiting) < 50
    assert len(tracer.run.steps) == 1
    assert tracer.run.steps["ops"].to_list() == [501]


def test_thread_that_serves_many_requests_stays_one_thread() -> None:
    model = nn.Linear(4, 4)

    def serve() -> None:
        for _ in range(200):
            model(torch.ones(1, 4))

    with attnprof.trace(samples_per_second=0) as tracer:
        worker = threading.Thread(target=serve)
        worker.start()
        worker.join()
    facts = tracer.run.attribution.facts
    assert set(facts.thread) == {1}
    assert len(facts.code_names) == len(set(facts.code_names))


def list_modes() -> list[OpMode]:
    return [each for each in gc.get_objects() if type(each) is OpMode]


def test_threads_that_have_ended_leave_their_ops_and_nothing_else() -> None:
    model, inputs = nn.Linear(4, 4), torch.ones(1, 4)
    others = list_modes()  # of tests that have failed or are not collected yet
    with attnprof.trace(samples_per_second=0) as tracer:
        for _ in range(40):
            worker = threading.Thread(target=model, args=(inputs,))
            worker.start()
            worker.join()
        held = sum(all(mode is not other for other in others) for mode in list_modes())
    facts = tracer.run.attribution.facts
    assert len(facts.code_names) == len(set(facts.code_names))
    assert set(facts.thread) == set(range(1, 41))  # no two are taken for one
    assert held <= 2  # this thread's, and perhaps the last one's


def test_trace_is_freed_with_its_temporary_run() -> None:
    with attnprof.trace() as tracer:
        torch.ones(3)
    run, path = tracer.run, tracer.run.path
    del tracer
    gc.collect()
    assert path.exists()
    del run
    gc.collect()
    assert not path.exists()
