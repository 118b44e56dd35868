"""torch.compile and a trace leave each other alone: what is compiled stays so, and is seen."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import attnprof
from attnprof import Run
from attnprof.pytest_plugin.verdicts import find_doubts
from attnprof.report.notes import collect_notes
from tests.versions import needs_compiled_code

WIDTH = 24


class Block(nn.Module):
    """Two products with element-wise ops between them that a compiler fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)) * 2 + 1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def run_step(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Run forward and backward; return the result and the gradients."""
    x = x.clone().requires_grad_()
    result = model(x)
    result.square().sum().backward()
    assert x.grad is not None
    return {"result": result.detach(), "gradient": x.grad}


def names_of(run: Run) -> set[str]:
    """Return the short names of the ops of a run."""
    return set(run.attribution.facts.short_names)


def read_counters() -> dict[str, dict[str, int]]:
    """Return what Dynamo counts of graphs and breaks."""
    wanted = ("stats", "graph_break", "recompiles", "frames")
    return {name: dict(counters[name]) for name in wanted}


@needs_compiled_code
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of inductor itself
def test_compiled_model_stays_compiled() -> None:
    """The default backend, to the end: fused kernels run, and nothing falls back to eager."""
    model, x = Block(), torch.randn(5, WIDTH)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():  # to compile a backward too takes as long again
        untraced = compiled(x)
        before = read_counters()
        with attnprof.trace(samples_per_second=0) as tracer:
            traced = compiled(x)
        assert read_counters() == before  # neither a new graph nor a break
        assert torch.equal(traced, untraced)
        torch.testing.assert_close(traced, model(x))
    assert "sin" not in names_of(tracer.run)  # it runs inside a kernel


@needs_compiled_code
def test_trace_does_not_compile_again() -> None:
    compiled, x = torch.compile(Block(), backend="aot_eager", fullgraph=True), torch.ones(5, WIDTH)
    untraced = run_step(compiled, x)
    before = read_counters()
    with attnprof.trace(samples_per_second=0):
        traced = run_step(compiled, x)
    assert read_counters() == before
    torch.testing.assert_close(traced, untraced, rtol=0, atol=0)


@needs_compiled_code
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiling_inside_a_trace_breaks_no_graph(backend: str, dynamic: bool) -> None:
    def compile_and_run() -> tuple[list[dict[str, Tensor]], dict[str, dict[str, int]]]:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(1)
        compiled = torch.compile(Block(), backend=backend, dynamic=dynamic, fullgraph=True)
        results = [run_step(compiled, torch.ones(length, WIDTH)) for length in (5, 7, 9)]
        return results, read_counters()

    untraced, without = compile_and_run()
    with attnprof.trace(samples_per_second=0):
        traced, with_trace = compile_and_run()
    assert with_trace == without
    torch.testing.assert_close(traced, untraced, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch before 2.10 runs compiled code op by op:RuntimeWarning")
def test_compiling_in_place_inside_a_trace_works() -> None:
    model = Block()
    with attnprof.trace(samples_per_second=0) as tracer:
        model.compile(backend="aot_eager", fullgraph=True)
        run_step(model, torch.ones(5, WIDTH))
    peak = tracer.run.peak()
    assert peak.total_bytes == sum(peak.by_category().values())
    assert peak.total_bytes > 2 * 4 * (WIDTH * WIDTH + WIDTH)
    assert not counters["graph_break"]


@needs_compiled_code
def test_model_compiled_inside_a_trace_goes_on_afterwards() -> None:
    with attnprof.trace(samples_per_second=0):
        compiled = torch.compile(Block(), backend="eager", fullgraph=True)
        traced = run_step(compiled, torch.ones(5, WIDTH))
    torch.testing.assert_close(run_step(compiled, torch.ones(5, WIDTH)), traced)
    # Dynamo guards what it saw of global module hooks: once more, for the time after, and no more.
    assert counters["stats"]["unique_graphs"] == 2
    with attnprof.trace(samples_per_second=0):
        run_step(compiled, torch.ones(5, WIDTH))
    run_step(compiled, torch.ones(5, WIDTH))
    assert counters["stats"]["unique_graphs"] == 2


def test_trace_may_begin_inside_a_compiled_function() -> None:
    @torch.compile(backend="eager")
    def program(x: Tensor) -> tuple[Tensor, Run]:
        with attnprof.trace(samples_per_second=0) as tracer:
            result = x + 1
        return result, tracer.run

    result, run = program(torch.ones(3))
    assert torch.equal(result, torch.full((3,), 2.0))
    assert run.peak().total_bytes == 2 * 3 * 4


def test_marks_inside_a_compiled_function_work() -> None:
    def make(tracer: attnprof.Tracer) -> Callable[[Tensor], Tensor]:
        @torch.compile(backend="eager")
        def program(x: Tensor) -> Tensor:
            y = attnprof.tag(x + 1, "kv_cache")
            tracer.step()
            return y * 2

        return program

    with attnprof.trace(samples_per_second=0) as tracer:
        program = make(tracer)
        program(torch.ones(3))
        program(torch.ones(3))
    assert len(tracer.run.steps) >= 2


def test_tag_breaks_no_graph() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def program(x: Tensor) -> Tensor:
        return attnprof.tag(x + 1, "kv_cache") * 2

    with attnprof.trace(samples_per_second=0):
        assert torch.equal(program(torch.ones(3)), torch.full((3,), 4.0))


def test_exported_program_is_the_same_inside_a_trace() -> None:
    model = Block().eval()
    with attnprof.trace(samples_per_second=0):
        inside = torch.export.export(model, (torch.ones(5, WIDTH),))
    outside = torch.export.export(model, (torch.ones(5, WIDTH),))
    assert inside.graph_module.code == outside.graph_module.code


def test_a_torch_that_runs_compiled_code_op_by_op_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnprof.capture.modules.RUNS_COMPILED", False)
    compiled = torch.compile(Block(), backend="eager")
    with attnprof.trace(samples_per_second=0) as tracer:
        with pytest.warns(RuntimeWarning, match="torch before 2.10 runs compiled code op by op"):
            compiled(torch.ones(5, WIDTH))
        compiled(torch.ones(5, WIDTH))  # says it once: a second warning would be an error
    run = tracer.run
    assert run.has_uncompiled_code
    assert not run.has_compiled_code
    assert "torch before 2.10 runs compiled code op by op" in "".join(find_doubts(run))
    assert "uncompiled" in {note.subject for note in collect_notes(run, run.peak())}


def test_what_the_program_has_run_eagerly_is_not_called_compiled() -> None:
    compiled, x = torch.compile(Block(), backend="eager"), torch.ones(5, WIDTH)
    compiled(x)
    with attnprof.trace(samples_per_second=0) as tracer, torch.compiler.set_stance("force_eager"):
        compiled(x)
    assert not tracer.run.has_compiled_code
    assert not tracer.run.has_uncompiled_code
