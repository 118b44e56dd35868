"""What is measured is not moved: results, random numbers, memory are those of an untraced run."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import attnprof
from tests.capture.oracle import find_peak_bytes, record_blocks
from tests.capture.remains import list_remains
from tests.models import CASES, Case, make_bert, make_gpt2, make_nano, tokens
from tests.versions import needs_profiled_modes


def tracing(*, on: bool) -> contextlib.AbstractContextManager[object]:
    return attnprof.trace(samples_per_second=0) if on else contextlib.nullcontext()


def run_steps(
    make: Callable[[], Case],
    *,
    on: bool,
    optimize: Callable[[Any], torch.optim.Optimizer] | None = None,
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, Any]:
    """Train two steps from a fixed seed; return everything that could differ afterwards."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    case = make()
    optimizer = optimize(case.model.parameters()) if optimize else None
    losses = []
    with tracing(on=on):
        for _ in range(2):
            with around():
                loss = case.loss()
            loss.backward()
            losses.append(loss.detach())
            if optimizer is not None:
                optimizer.step()
    found: dict[str, Any] = {"losses": losses, "random": random.random()}
    found["numpy"] = np.random.rand()
    found["torch random"] = torch.get_rng_state()
    found |= {f"grad of {n}": p.grad for n, p in case.model.named_parameters()}
    found |= dict(case.model.state_dict())
    for number, state in enumerate(optimizer.state.values() if optimizer else ()):
        found |= {f"state {number} {name}": value for name, value in state.items()}
    return found


def assert_same(traced: dict[str, Any], untraced: dict[str, Any]) -> None:
    """Assert equality to the last bit."""
    torch.testing.assert_close(traced, untraced, rtol=0, atol=0, equal_nan=True)


class WithBuffers(nn.Module):
    """Batch norm, whose running statistics are buffers that a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_with_buffers() -> Case:
    return Case(WithBuffers(), {"x": torch.randn(5, 7)})


def make_bfloat16() -> Case:
    case = make_gpt2("sdpa", dropout=0.1)
    case.model.to(torch.bfloat16)
    return case


CONFIGURATIONS: dict[str, Callable[[], Case]] = {
    **CASES,
    "gpt2-dropout": lambda: make_gpt2("sdpa", dropout=0.1),
    "bfloat16": make_bfloat16,
    "buffers": make_with_buffers,
    "checkpoint-reentrant": lambda: make_nano(dropout=0.1, checkpoint="reentrant"),
    "checkpoint-non-reentrant": lambda: make_nano(dropout=0.1, checkpoint="non-reentrant"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_trace_leaves_results_and_randomness_as_they_are(name: str) -> None:
    make = CONFIGURATIONS[name]
    assert_same(run_steps(make, on=True), run_steps(make, on=False))


@pytest.mark.parametrize("name", [*CASES, "bfloat16", "checkpoint-non-reentrant"])
@pytest.mark.parametrize("what", ["train", pytest.param("infer", marks=needs_profiled_modes)])
def test_trace_leaves_the_peak_as_it_is(name: str, what: str) -> None:
    torch.manual_seed(3)
    case = CONFIGURATIONS[name]()
    program: Callable[[], object] = getattr(case, what)
    peaks = []
    for on in (True, False):
        case.model.zero_grad()
        torch.manual_seed(3)
        with tracing(on=on):
            blocks = record_blocks(program)
        # The mode hands a Python number on, and torch makes its 8 bytes a second time.
        peaks.append(find_peak_bytes([block for block in blocks if not block.is_beside_ops]))
    traced, untraced = peaks
    assert traced == untraced


def test_trace_leaves_autocast_as_it_is() -> None:
    def around() -> contextlib.AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16)

    traced, untraced = (run_steps(make_bert, on=on, around=around) for on in (True, False))
    assert_same(traced, untraced)


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True, "foreach": False}]
)
def test_trace_leaves_adamw_as_it_is(options: dict[str, bool]) -> None:
    def optimize(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01, **options)

    traced, untraced = (run_steps(make_nano, on=on, optimize=optimize) for on in (True, False))
    assert_same(traced, untraced)


def test_trace_leaves_sgd_with_momentum_as_it_is() -> None:
    def optimize(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True)

    traced, untraced = (run_steps(make_nano, on=on, optimize=optimize) for on in (True, False))
    assert_same(traced, untraced)


@pytest.mark.parametrize("name", ["gpt2-eager", "llama-sdpa", "torch-encoder"])
def test_trace_leaves_inference_mode_as_it_is(name: str) -> None:
    torch.manual_seed(3)
    case = CASES[name]()
    case.model.eval()

    @torch.inference_mode()
    def run(*, on: bool) -> Tensor:
        with tracing(on=on):
            output = case.model(**case.inputs)
        return output if isinstance(output, Tensor) else output["logits"]

    traced, untraced = run(on=True), run(on=False)
    assert traced.is_inference()
    assert_same({"logits": traced}, {"logits": untraced})


def test_trace_leaves_generation_as_it_is() -> None:
    model = make_gpt2("sdpa").model.eval()
    ids = tokens(length=7)

    def generate(*, on: bool) -> Tensor:
        torch.manual_seed(3)
        with tracing(on=on):
            return model.generate(input_ids=ids, max_new_tokens=5, do_sample=True, pad_token_id=0)

    assert torch.equal(generate(on=True), generate(on=False))


# Where several gradients meet, autograd adds in place if nobody watches, and the trace does so in
# its stead. Each of these programs would show a gradient that was added to once too often.
def _meet(x: Tensor) -> Tensor:
    y = x * 2
    return (y.exp() + y.sin() * y + y.cos().tanh() + y[:, :3].sum() + y.t()[0].prod()).sum()


def _meet_in_a_retained_gradient(x: Tensor) -> Tensor:
    y = x * 2
    y.retain_grad()
    z = (y.exp() + y.sin() + y.cos()).sum()
    torch.autograd.backward(z, retain_graph=True, inputs=[x, y])
    x.grad = None
    return z * y.grad.sum()


def _meet_under_a_hook(x: Tensor) -> Tensor:
    y = x * 2
    kept = []
    y.register_hook(lambda grad: kept.append(grad) or grad * 3 + grad)
    w = y.exp()
    w.register_hook(lambda grad: (grad * 2) + grad)
    return (w + y.sin() + y.cos()).sum()


def _meet_where_a_gradient_is_kept(x: Tensor) -> Tensor:
    kept = []
    y = x * 2
    for z in (y.exp(), y.sin(), y.cos()):
        z.register_hook(kept.append)
        y = y + z
    y.sum().backward(retain_graph=True)
    total = sum(grad.sum() for grad in kept)
    x.grad = None
    return y.sum() * total


class _PassesOn(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, y: Tensor) -> Tensor:
        context.save_for_backward(y)
        return x * y

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = context.saved_tensors
        return y, grad + y + grad  # a saved tensor, as it is, and a sum


def _meet_a_saved_tensor(x: Tensor) -> Tensor:
    y = x * 2
    z = y.exp()
    w = _PassesOn.apply(y, z)
    return (w + y.sin() + _PassesOn.apply(y, z)).sum() + z.sum()


def _meet_the_same_tensor_twice(x: Tensor) -> Tensor:
    y = x.exp()
    return (y * y + y + y.expand(3, *y.shape).sum(0) + torch.stack([y, y]).sum(0)).sum()


def _meet_twice_over(x: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(_meet(x), x, create_graph=True)
    return (grad * x).sum()


def _meet_views(x: Tensor) -> Tensor:
    first, second = x.exp().chunk(2)
    y = torch.cat([first, second]).view(-1)
    return (y.view(x.shape) + y.flip(0).view(x.shape) + y.unsqueeze(0).sum()).sum()


def _select(x: Tensor) -> Tensor:
    rows = torch.tensor([0, 2, 0, 1])
    y = x.exp()
    found = [y[rows], y[y > 1], y.gather(0, rows[None]), y.index_select(0, rows), y.max(0)[0]]
    found += [y.sort(1)[0], y.topk(2)[0], y.take(rows), y.cummax(0)[0], y.masked_select(y > 1)]
    found += [y.median(0)[0], y.kthvalue(2, 0)[0], y.take_along_dim(rows[:, None], 0)]
    return torch.stack([(f * f).sum() for f in found]).sum()


MEETINGS = [
    _meet,
    _meet_in_a_retained_gradient,
    _meet_under_a_hook,
    _meet_where_a_gradient_is_kept,
    _meet_a_saved_tensor,
    _meet_the_same_tensor_twice,
    _meet_twice_over,
    _meet_views,
    _select,
]


@pytest.mark.parametrize("program", MEETINGS)
def test_trace_leaves_gradients_that_meet_as_they_are(program: Callable[[Tensor], Tensor]) -> None:
    start = torch.randn(4, 4)

    def run(*, on: bool) -> Tensor | None:
        x = start.clone().requires_grad_()
        with tracing(on=on):
            program(x).backward()
            program(x).backward()  # onto the gradient that is there
        return x.grad

    assert_same({"grad": run(on=True)}, {"grad": run(on=False)})


@pytest.mark.parametrize("program", [_meet, _meet_the_same_tensor_twice, _meet_views, _select])
def test_trace_leaves_the_peak_of_gradients_that_meet_as_it_is(
    program: Callable[[Tensor], Tensor],
) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    peaks = []
    for on in (True, False):
        x.grad = None
        with tracing(on=on):
            blocks = record_blocks(lambda: program(x).backward())
        peaks.append(find_peak_bytes([block for block in blocks if not block.is_beside_ops]))
    assert peaks[0] == peaks[1]


def test_trace_adds_gradients_up_in_place() -> None:
    """What keeps the peak: of three gradients that meet, none is held twice."""
    x = torch.randn(50, 50, requires_grad=True)

    def step() -> None:
        y = x * 2
        (y.exp() + y.sin() + y.cos()).sum().backward()

    with attnprof.trace(samples_per_second=0) as tracer:
        step()
    made = tracer.run.allocations.filter(pl.col("phase").cast(pl.String) == "backward")
    assert "aten::add.Tensor" not in made["op"].to_list()


def end_with(error: BaseException) -> None:
    with contextlib.suppress(type(error)), attnprof.trace():
        torch.ones(2).exp()
        raise error


def end_inside_forward() -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise ArithmeticError

    inner = nn.Linear(2, 2)
    inner.register_forward_pre_hook(fail)
    with contextlib.suppress(ArithmeticError), attnprof.trace():
        nn.Sequential(nn.Linear(2, 2), inner)(torch.ones(1, 2))


def end_inside_backward() -> None:
    def fail(grad: Tensor) -> None:
        raise ArithmeticError

    with contextlib.suppress(ArithmeticError), attnprof.trace():
        x = torch.ones(2, requires_grad=True)
        y = x.exp()
        y.register_hook(fail)
        y.sum().backward()


def end_by_closing_a_generator() -> None:
    def produce() -> Iterator[Tensor]:
        with attnprof.trace():
            yield torch.ones(2)

    generator = produce()
    next(generator)
    generator.close()


def end_by_refusal() -> None:
    with attnprof.trace(), contextlib.suppress(attnprof.AttnprofError), attnprof.trace():
        pass


def end_normally() -> None:
    with attnprof.trace():
        nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()


ENDINGS: dict[str, Callable[[], None]] = {
    "normal": end_normally,
    "exception": lambda: end_with(ValueError("of the program")),
    "interrupt": lambda: end_with(KeyboardInterrupt()),
    "exit": lambda: end_with(SystemExit(0)),
    "failed exit": lambda: end_with(SystemExit(3)),
    "out of memory": lambda: end_with(MemoryError()),
    "inside forward": end_inside_forward,
    "inside backward": end_inside_backward,
    "generator": end_by_closing_a_generator,
    "refusal": end_by_refusal,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_trace_leaves_nothing_behind(ending: str) -> None:
    before = list_remains()
    ENDINGS[ending]()
    assert list_remains() == before


def test_trace_restores_what_was_replaced_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*args: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(torch.autograd, "backward", own)
    with attnprof.trace():
        assert torch.autograd.backward is not own
    assert torch.autograd.backward is own


def test_trace_keeps_what_is_replaced_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*args: Any, **kwargs: Any) -> None: ...

    with attnprof.trace():
        monkeypatch.setattr(torch.autograd, "backward", own)
    assert torch.autograd.backward is own


def test_backward_that_someone_kept_from_inside_the_trace_only_passes_on() -> None:
    x = torch.ones(3, requires_grad=True)
    modes: list[object] = []
    x.register_hook(lambda _: modes.extend(_get_current_dispatch_mode_stack()))
    with attnprof.trace():
        kept = torch.autograd.backward
    kept([(x * 2).sum()])
    assert modes == []
