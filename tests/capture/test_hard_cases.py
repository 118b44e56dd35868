"""Facts are recorded rightly, and nothing breaks, where tensors and modules are unusual."""

import contextlib
import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import attnprof
from attnprof import Run
from attnprof.capture import devices
from attnprof.store import open_run
from attnprof.store.schema import BORN, FOUND, FREED
from tests.models import NanoGPT, make_nano, tokens


def record(program: Callable[[], object]) -> Run:
    """Run ``program`` traced and drop its result."""
    with attnprof.trace(samples_per_second=0) as tracer:
        program()
    return tracer.run


def sizes(run: Run, **columns: str | None) -> list[int]:
    """Return the sizes of the allocations whose columns have the given values, smallest first."""
    frame = run.allocations
    for name, value in columns.items():
        text = pl.col(name).cast(pl.String)
        frame = frame.filter(text.is_null() if value is None else text == value)
    return sorted(frame["size_bytes"].to_list())


# --- Tensors of unusual kinds -------------------------------------------------------------------


def test_sparse_tensor_counts_its_indices_and_values() -> None:
    dense = torch.eye(5)
    run = record(lambda: dense.to_sparse())
    indices, values = 2 * 5 * 8, 5 * 4
    assert {indices, values} <= set(sizes(run))


def test_sparse_operands_work_with_out() -> None:
    sparse, out = torch.eye(5).to_sparse(), torch.empty(5, 3)
    run = record(lambda: torch.mm(sparse, torch.ones(5, 3), out=out))
    assert torch.equal(out, torch.ones(5, 3))
    assert run.peak().total_bytes == 2 * 5 * 8 + 5 * 4 + 2 * 5 * 3 * 4


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta:UserWarning")
def test_compressed_sparse_tensor_counts_its_parts(layout: torch.layout) -> None:
    dense = torch.eye(6)
    run = record(lambda: dense.to_sparse(layout=layout))
    ends, coordinates, values = (6 + 1) * 8, 2 * 6 * 8, 6 * 4
    assert {ends, coordinates, values} <= set(sizes(run))


def test_sparse_gradients_train_an_embedding() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()))

    def program() -> None:
        for _ in range(2):
            table(torch.tensor([1, 2, 1])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert sizes(record(program), category="parameters") == [10 * 4 * 4]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensor_counts_its_values(layout: torch.layout) -> None:
    parts = [torch.ones(3, 4), torch.ones(5, 4)]
    linear = nn.Linear(4, 6)

    def program() -> None:
        nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        result = linear(nested)
        sum(part.sum() for part in result.unbind()).backward()

    run = record(program)
    assert (3 + 5) * 6 * 4 in sizes(run)
    assert run.peak().total_bytes == sum(run.peak().by_category().values())


def test_meta_tensors_take_nothing_of_the_cpu() -> None:
    model = nn.Linear(1000, 1000, device="meta")
    run = record(lambda: model(torch.empty(2, 1000, device="meta")))
    assert run.peak(device="meta").total_bytes == 4 * (1000 * 1000 + 1000 + 2 * 2 * 1000)
    with pytest.raises(ValueError, match="no device 'cpu'"):
        run.peak(device="cpu")


def test_fake_tensors_are_recorded_in_either_order() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def program() -> None:
        model = nn.Linear(4, 6)
        model(torch.randn(2, 4)).sum().backward()

    with FakeTensorMode():
        outside = record(program)

    def inside() -> None:
        with FakeTensorMode():
            program()

    assert len(record(inside).allocations) > 0
    expected = record(program).peak().total_bytes
    assert outside.peak(device="meta").total_bytes == expected


def test_symbolic_shapes_are_passed_over() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    record(lambda: make_fx(lambda x: x.sin() + 1, tracing_mode="symbolic")(torch.ones(3)))


class Pair(torch.Tensor):
    """A wrapper around two tensors that does every op on both."""

    first: Tensor
    second: Tensor

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor) -> "Pair":
        return torch.Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.dtype, device=first.device
        )

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: object) -> "Pair":
        return Pair(parts["first"], parts["second"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def run(name: str) -> Any:
            own = pytree.tree_map_only(Pair, lambda pair: getattr(pair, name), (args, kwargs or {}))
            return func(*own[0], **own[1])

        result = pytree.tree_map(
            lambda a, b: Pair(a, b) if isinstance(a, Tensor) else a, run("first"), run("second")
        )
        return return_and_correct_aliasing(func, args, kwargs or {}, result)


def test_wrapper_subclass_counts_what_it_wraps_and_not_itself() -> None:
    model = nn.Linear(5, 3, bias=False)
    model.weight = nn.Parameter(Pair(torch.ones(3, 5), torch.ones(3, 5)))

    def program() -> None:
        model(Pair(torch.ones(2, 5), torch.ones(2, 5))).sum().backward()

    run = record(program)
    assert sizes(run, category="parameters") == 2 * [3 * 5 * 4]
    gradients = run.allocations.filter(pl.col("category").cast(pl.String) == "gradients")
    assert 3 * 5 * 4 in gradients["size_bytes"].to_list()


class Marked(torch.Tensor):
    """A subclass that only takes part in ``__torch_function__``."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_function_subclass_is_a_tensor_like_any() -> None:
    x = torch.ones(7, 7).as_subclass(Marked)
    kept = []
    run = record(lambda: kept.append(x @ x))
    assert type(kept[0]) is Marked
    assert sizes(run) == 2 * [7 * 7 * 4]


class OwnParameter(nn.Parameter):
    """What quantisation libraries make of a parameter."""


def test_parameter_subclass_gives_its_data() -> None:
    """Reading ``.data`` names the class to dispatch modes, though it takes no part in dispatch."""
    model = nn.Linear(3, 3, bias=False)
    model.weight = OwnParameter(torch.ones(3, 3))

    def program() -> None:
        assert model.weight.data.shape == (3, 3)
        model(torch.ones(2, 3)).sum().backward()

    assert sizes(record(program), category="parameters") == [3 * 3 * 4]


def test_lazy_parameters_are_made_inside_a_trace() -> None:
    model = nn.Sequential(nn.LazyLinear(4, bias=False), nn.LazyBatchNorm1d())
    run = record(lambda: model(torch.ones(2, 3)).sum().backward())
    assert sizes(run, category="parameters") == [4 * 4, 4 * 4, 3 * 4 * 4]


def test_conjugate_takes_nothing_until_it_is_used() -> None:
    signal = torch.ones(9, dtype=torch.complex64)
    kept = []
    assert sizes(record(lambda: kept.append(signal.conj()))) == [9 * 8]
    assert sizes(record(lambda: kept.append(kept[0].resolve_conj()))) == 2 * [9 * 8]


# --- Storages -----------------------------------------------------------------------------------


def test_storage_resized_away_and_back_is_counted_while_it_is_there() -> None:
    def program() -> None:
        x = torch.ones(100)
        x.untyped_storage().resize_(0)
        torch.ones(30)
        x.untyped_storage().resize_(4 * 100)
        torch.ones(50)

    run = record(program)
    assert run.peak().total_bytes == 4 * 100 + 4 * 50
    assert len(run.allocations) == 5


def test_resize_by_an_op_is_counted() -> None:
    def program() -> None:
        x = torch.ones(10)
        x.resize_(200)

    run = record(program)
    assert run.peak().total_bytes == 4 * 200


def test_result_that_grows_its_out_argument_is_counted() -> None:
    out = torch.empty(0)
    run = record(lambda: torch.add(torch.ones(60), 1, out=out))
    assert run.peak().total_bytes == 2 * 60 * 4


def test_operation_in_place_takes_nothing() -> None:
    x = torch.ones(100)

    def program() -> None:
        x.add_(1).mul_(2)
        x[:10].zero_()

    assert sizes(record(program)) == [400]


def test_views_of_a_parameter_are_not_new_bytes() -> None:
    model = nn.Linear(8, 8, bias=False)

    def program() -> None:
        half = model.weight[:4].t()  # seen through a view before the module has run
        torch.ones(2, 8) @ half
        model(torch.ones(2, 8))

    run = record(program)
    assert sizes(run, category="parameters") == [8 * 8 * 4]


def test_tied_weights_are_counted_once() -> None:
    case = make_nano()
    run = record(case.train)
    tied = case.model.get_submodule("embed").weight
    assert sizes(run, category="parameters").count(tied.nbytes) == 1


def test_tensor_made_from_python_data_is_born_where_it_is_made() -> None:
    def program() -> None:
        torch.ones(1000)
        torch.tensor([1.0] * 500)

    assert record(program).peak().total_bytes == 4 * 1000


def test_memory_of_numpy_is_born_where_it_becomes_a_tensor() -> None:
    array = np.ones(50, np.float32)
    run = record(lambda: torch.from_numpy(array) + 1)
    assert sizes(run, op="aten::lift_fresh") == [50 * 4]


def test_tensor_that_no_op_made_is_found_when_it_is_used() -> None:
    run = record(lambda: torch.get_rng_state() + 1)
    assert sizes(run, op=None) == [torch.get_rng_state().nbytes]


def test_address_that_is_used_again_is_another_block() -> None:
    def program() -> None:
        for _ in range(50):
            torch.ones(1000)

    run = record(program)
    assert len(run.allocations) == 50
    assert run.peak().total_bytes == 4 * 1000


def test_reference_cycle_lives_until_it_is_collected() -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self
            self.data = torch.ones(1000)

    def program() -> None:
        gc.disable()
        try:
            Node()
            torch.ones(10)
        finally:
            gc.enable()
        gc.collect()
        torch.ones(20)

    assert record(program).peak().total_bytes == 4 * 1000 + 4 * 10


def test_tag_names_every_part_of_a_wrapper() -> None:
    run = record(
        lambda: attnprof.tag(Pair(torch.ones(6), torch.ones(6)), "kv_cache", layer="layers.3")
    )
    assert sizes(run, category="kv_cache", layer="layers.3") == 2 * [6 * 4]


# --- Modules ------------------------------------------------------------------------------------


def scope_stack_is_empty(tracer_run: Run, after: str) -> bool:
    """Return whether the op that made the block of ``after`` elements ran in no module."""
    row = tracer_run.allocations.filter(pl.col("size_bytes") == int(after) * 4)
    return row["layer"].cast(pl.String).to_list() == [""]


class Failing(nn.Module):
    """A module that raises half-way down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(4, 4), nn.Linear(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x)  # the second does not fit
        return x


def test_exception_inside_forward_leaves_the_scopes_right() -> None:
    model, sound = nn.Sequential(Failing()), nn.Linear(4, 7, bias=False)
    kept = []

    def program() -> None:
        for _ in range(3):
            with contextlib.suppress(RuntimeError):
                model(torch.ones(2, 4))
        kept.append(torch.ones(77))
        kept.append(sound(torch.ones(2, 4)))

    run = record(program)
    assert scope_stack_is_empty(run, "77")
    assert sizes(run, layer="Linear", op="aten::mm") == [2 * 7 * 4]


def fail(*_: object) -> None:
    raise ArithmeticError("of a hook")


def test_module_hooks_that_raise_leave_the_scopes_right() -> None:
    outer = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    kept = []

    def program() -> None:
        for module in outer.modules():
            for register in (module.register_forward_pre_hook, module.register_forward_hook):
                hook = register(fail)
                with pytest.raises(ArithmeticError, match="of a hook"):
                    outer(torch.ones(2, 4))
                hook.remove()
        kept.append(torch.ones(77))

    assert scope_stack_is_empty(record(program), "77")


def test_module_called_twice_in_a_step_is_one_layer() -> None:
    tied = nn.Linear(4, 4, bias=False)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied = tied

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.tied(x).relu())

    model = Twice()
    run = record(lambda: model(torch.ones(3, 4)).sum().backward())
    assert sizes(run, layer="tied", op="aten::mm", phase="forward") == 2 * [3 * 4 * 4]
    assert sizes(run, category="parameters") == [4 * 4 * 4]


def test_module_that_calls_itself_is_followed() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor, depth: int = 3) -> Tensor:
            return self(self.linear(x), depth - 1) if depth else x

    model = Recursive()
    run = record(lambda: model(torch.ones(3, 4)).sum().backward())
    assert len(sizes(run, layer="linear", op="aten::mm", phase="forward")) == 3


def test_several_models_in_one_trace_have_names_of_their_own() -> None:
    class Generator(nn.Sequential):
        """A model."""

    class Judge(nn.Sequential):
        """Another."""

    models = [Generator(nn.Linear(4, 4), nn.ReLU()), Judge(nn.Linear(4, 4), nn.ReLU())]
    run = record(lambda: [model(torch.ones(2, 4)) for model in models])
    layers = set(run.allocations["layer"].cast(pl.String))
    assert {"Generator.0", "Judge.0"} <= layers


def test_module_freed_inside_the_trace_is_freed() -> None:
    with attnprof.trace() as tracer:
        model = nn.Sequential(nn.Linear(100, 100), nn.GELU())
        model(torch.ones(2, 100)).sum().backward()
        weight = weakref.ref(model[0].weight)
        module = weakref.ref(model)
        del model
        gc.collect()
        assert module() is None
        assert weight() is None
        torch.ones(30)
    live = tracer.run.allocations.filter(pl.col("end_ns").is_null())
    assert live["size_bytes"].sum() == 0


def test_module_made_where_another_was_has_its_own_name() -> None:
    """An ``id`` is used again once its object is gone."""

    def program() -> None:
        for width in range(2, 30):
            model = nn.ModuleDict({f"width{width}": nn.Linear(4, width, bias=False)})
            nn.Sequential(model[f"width{width}"])(torch.ones(1, 4))

    run = record(program)
    assert len(sizes(run, op="aten::mm")) == 28


def test_functional_call_warns_of_nothing() -> None:
    model = nn.Linear(4, 4)

    def program() -> None:
        doubled = {name: p * 2 for name, p in model.named_parameters()}
        torch.func.functional_call(model, doubled, (torch.ones(2, 4),)).sum().backward()

    record(program)
    assert model.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch retires it
def test_scripted_module_is_traced() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    run = record(lambda: model(torch.ones(2, 4)).sum().backward())
    assert sizes(run, category="parameters") == [4 * 4, 4 * 4 * 4]


# --- Optimizers ---------------------------------------------------------------------------------


def train_with(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_optimizer_state_is_known_however_it_is_kept() -> None:
    class Keeping(torch.optim.SGD):
        """Keeps a tensor, a list and a number where others keep a dictionary per parameter."""

        def step(self, closure: Any = None) -> None:
            if not self.state:
                self.state["slow"] = [torch.zeros(30), torch.zeros(40)]
                self.state["count"] = torch.zeros(50)
            self.state["calls"] = self.state.get("calls", 0) + 1

    model = nn.Linear(4, 4)
    optimizer = Keeping(model.parameters(), lr=0.1)
    run = record(lambda: train_with(optimizer, model))
    assert sizes(run, category="optimizer_state") == [30 * 4, 40 * 4, 50 * 4]


def test_optimizer_state_that_is_loaded_is_known() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def program() -> None:
        train_with(optimizer, model)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train_with(optimizer, model)

    run = record(program)
    assert sizes(run, category="optimizer_state") == 2 * [4 * 4 * 4]


def test_optimizer_made_where_another_was_has_its_own_state() -> None:
    def program() -> None:
        for width in range(5, 25):
            model = nn.Sequential(nn.Linear(4, width, bias=False))
            train_with(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)

    run = record(program)
    expected = [4 * width * 4 for width in range(5, 25)]
    assert sorted(set(sizes(run, category="optimizer_state"))) == expected


# --- Threads ------------------------------------------------------------------------------------


def run_in_thread(program: Callable[[], object]) -> None:
    errors = []

    def work() -> None:
        try:
            program()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_forward_and_backward_in_another_thread_are_seen() -> None:
    case = make_nano()
    case.train()
    case.model.zero_grad()
    expected = record(case.train)
    case.model.zero_grad()
    run = record(lambda: run_in_thread(case.train))
    assert run.peak().by_category() == expected.peak().by_category()
    facts = ("phase", "layer", "op", "size_bytes", "category")
    assert run.allocations.select(facts).rows() == expected.allocations.select(facts).rows()


def test_thread_is_left_without_a_mode() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    left = []

    def work() -> None:
        nn.Linear(4, 4)(torch.ones(2, 4)).sum().backward()
        left.extend(_get_current_dispatch_mode_stack())

    record(lambda: run_in_thread(work))
    assert left == []


def test_exception_in_another_thread_leaves_it_without_a_mode() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    left = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            Failing()(torch.ones(2, 4))
        left.extend(_get_current_dispatch_mode_stack())

    record(lambda: run_in_thread(work))
    assert left == []


def test_storages_of_many_threads_have_numbers_of_their_own() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])

    def work() -> None:
        for _ in range(10):
            model(torch.ones(2, 4)).sum().backward()

    def program() -> None:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    import sys

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run = record(program)
    finally:
        sys.setswitchinterval(interval)
    events = run.attribution.facts.events
    entered = events["storage"][np.isin(events["kind"], (BORN, FOUND))]
    assert len(np.unique(entered)) == len(entered)
    freed = events["storage"][events["kind"] == FREED]
    assert len(np.unique(freed)) == len(freed)
    assert set(freed) <= set(entered)


# --- Modes of torch -----------------------------------------------------------------------------


def test_inference_mode_is_taken_apart() -> None:
    """Nobody else takes composite operators apart there; attention would be one op."""
    q = torch.ones(2, 3, 16, 8)

    def program() -> Tensor:
        return functional.scaled_dot_product_attention(q, q, q)

    with torch.inference_mode():
        run = record(program)
    with torch.no_grad():
        expected = record(program)
    names = [name for name in run.attribution.facts.short_names if "attention" in name]
    assert "_scaled_dot_product_flash_attention_for_cpu" in names
    assert sizes(run) == sizes(expected)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointing_is_seen_as_recomputing(kind: str) -> None:
    model = NanoGPT(checkpoint=kind)
    ids = tokens()
    run = record(lambda: model(ids).backward())
    layers = run.allocations.filter(pl.col("phase").cast(pl.String) == "recompute")
    names = {layer.split(".")[1] for layer in layers["layer"].cast(pl.String) if layer}
    assert names == {"0", "1"}


def test_selective_checkpointing_works_inside_a_trace() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint
    from torch.utils.checkpoint import create_selective_checkpoint_contexts as contexts

    def choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_product = op == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def program() -> None:
        x = torch.ones(2, 4, requires_grad=True)
        result = checkpoint(model, x, use_reentrant=False, context_fn=lambda: contexts(choose))
        result.sum().backward()

    record(program)
    traced = model[0].weight.grad.clone()
    model.zero_grad()
    program()
    assert torch.equal(traced, model[0].weight.grad)


def test_autocast_copies_are_seen() -> None:
    model = nn.Linear(16, 8, bias=False)

    def program() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(4, 16))

    run = record(program)
    assert sizes(run, dtype="bfloat16") == [4 * 8 * 2, 4 * 16 * 2, 8 * 16 * 2]


def test_modes_of_the_program_see_what_they_would_see() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def program() -> Tensor:
        return torch.ones(4, 5) @ torch.ones(5, 6)

    with FlopCounterMode(display=False) as around:
        record(program)

    def inside() -> None:
        with FlopCounterMode(display=False) as counter:
            program()
        assert counter.get_total_flops() == 2 * 4 * 5 * 6

    record(inside)
    assert around.get_total_flops() == 2 * 4 * 5 * 6


def test_modes_of_the_program_do_not_see_ours() -> None:
    class Counting(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.ops += 1
            return func(*args, **(kwargs or {}))

    with Counting() as mode:
        record(lambda: None)
    assert mode.ops == 0


def test_hooks_for_saved_tensors_do_not_see_ours() -> None:
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        record(lambda: None)
    assert packed == []


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of jvp itself
def test_function_transforms_work_inside_a_trace() -> None:
    def program() -> None:
        x = torch.ones(3, 4)
        torch.func.vmap(torch.sin)(x)
        torch.func.vmap(torch.func.grad(lambda row: (row**3).sum()))(x)
        torch.func.jacrev(torch.sin)(x[0])
        torch.func.jvp(torch.sin, (x,), (x,))

    assert record(program).peak().total_bytes > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_shows_its_scores_where_it_is_not_compiled() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    expected = flex_attention(q, k, k, enable_gqa=True)
    results = []
    run = record(lambda: results.append(flex_attention(q, k, k, enable_gqa=True)))
    torch.testing.assert_close(results[0], expected, rtol=0, atol=0)
    row = run.layers().row(0, named=True)
    assert row["kind"] == "materialised"
    shape = ("batch", "heads", "kv_heads", "q_len", "k_len", "softmax_bytes")
    assert tuple(row[name] for name in shape) == (2, 4, 2, 12, 12, 2 * 4 * 12 * 12 * 4)
    assert row["backend_reason"].startswith("flex_attention without torch.compile")


def test_sharded_training_runs_inside_a_trace() -> None:
    """A DTensor names its mesh of devices among its parts."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = nn.Linear(4, 6, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        run = record(lambda: model(torch.ones(2, 4)).sum().backward())
    finally:
        dist.destroy_process_group()
    assert 6 * 4 * 4 // 2 in sizes(run, category="parameters")


# --- Samples ------------------------------------------------------------------------------------


def test_samples_without_a_gpu_are_of_the_host_only() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with attnprof.trace(samples_per_second=200) as tracer:
        threading.Event().wait(0.05)
    samples = tracer.run.attribution.facts.stored.table("samples")
    assert set(samples["device"].to_pylist()) == {"host"}
    own, used, total = (
        np.array(samples[name]) for name in ("process_bytes", "used_bytes", "total_bytes")
    )
    assert len(own) >= 2
    assert (own > 0).all()
    assert (own < total).all()
    assert (used < total).all()


def test_samples_of_an_idle_program_do_not_wait_for_its_next_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "COMMIT_SECONDS", 0.01)
    with attnprof.trace(tmp_path, samples_per_second=200) as tracer:
        torch.ones(3)
        deadline = time.monotonic() + 60
        while not open_run(tmp_path).table("samples").num_rows and time.monotonic() < deadline:
            time.sleep(0.01)
        stored = open_run(tmp_path)
        assert stored.table("samples").num_rows
        assert not stored.table("ops").num_rows  # that is left to the thread that records them
    assert tracer.run.attribution.facts.stored.table("ops").num_rows


def test_samples_are_not_taken_when_not_wanted() -> None:
    with attnprof.trace(samples_per_second=0) as tracer:
        torch.ones(3)
    assert tracer.run.attribution.facts.stored.table("samples").num_rows == 0
