"""The values a program needs to know of fake tensors, so that it takes the path it really takes.

A fake tensor has a shape and no values. Programs read values all the same: drop-path rates from
``torch.linspace``, whether a mask is all ones, the loss for a log. `FakeValues` follows the values
that depend on nothing unknown, as long as that is cheap: tensors that hold one number everywhere,
of any size, and vectors. It answers reads from those, and says which read it cannot answer.
"""

import math
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from attnprof.capture.dynamo import SKIPPING, leave_alone
from attnprof.capture.fake_failures import refuse_real_parameters
from attnprof.capture.fake_views import VIEWS, make_view
from attnprof.capture.lines import find_line, is_under
from attnprof.errors import DryRunError

SMALL = 1024
"""Tensors of up to so many elements are computed for real."""
ROWS = 8
"""So are tensors of up to so many vectors, such as positions or lengths of a batch; what has n²
elements never is."""
MOST = 2**24
"""No tensor of more elements is: a vector may be long for being n² of something flattened."""

_SAMPLING = os.path.join(os.path.dirname(torch.__file__), "nn", "init.py")

ASSUMED_READ = 1.0
"""What reading an unknown floating-point value gives: finite, positive and fit for a logarithm."""

aten = torch.ops.aten

_FILLED_WITH: dict[str, Any] = {
    "aten::zeros": 0, "aten::zeros_like": 0, "aten::new_zeros": 0, "aten::zero_": 0,
    "aten::ones": 1, "aten::ones_like": 1, "aten::new_ones": 1,
}  # fmt: skip
"""Ops that put one number everywhere -> the number."""
_NUMBER_AT = {
    "aten::scalar_tensor": 0, "aten::full": 1, "aten::full_like": 1, "aten::fill_": 1,
    "aten::new_full": 2,
}  # fmt: skip
"""Ops that put one number everywhere -> the position of the number among their arguments."""
_DRAWS = frozenset({"aten::randint", "aten::randperm", "aten::random_"})
"""Ops that draw whole numbers: token ids, mostly. One draw is as good as another, but for a program
that reads it."""
_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "_to_copy", "clone", "flip", "gather", "index", "index_select", "repeat", "roll",
    )
)  # fmt: skip
"""Ops whose result holds elements of their first operand and nothing else."""
_KEEPERS = frozenset(f"aten::{name}" for name in ("all", "amax", "amin", "any", "mean"))
"""Reductions that give the number of which an operand consists."""


@dataclass(frozen=True, slots=True)
class _Value:
    """What is known of a fake tensor."""

    data: torch.Tensor
    """Its values; or, if it consists of one number, a tensor with all dimensions 1."""
    version: int
    """Of the fake tensor when this was so: writing into it or a view of it counts on."""
    is_drawn: bool = False
    """Whether chance decided on it: a real run has other values."""


class FakeValues(TorchDispatchMode):  # type: ignore[no-untyped-call]  # not annotated
    """Knows some tensors by value while a program runs on fake tensors.

    Enter it after (inside of) a FakeTensorMode.
    """

    supports_higher_order_operators = True

    def __init__(self, assumed: dict[str, None]) -> None:
        """Know nothing yet.

        Args:
            assumed: Gets a line for everything that was assumed, in order.
        """
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated
        self._assumed = assumed
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], _Value]] = {}
        """By the id of the fake tensor, for as long as it lives."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code alone."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return SKIPPING is None  # see `attnprof.capture.ops.OpMode`

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Return whether the values of a tensor can be read."""
        return self._find(tensor) is not None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on fake tensors, and follow values where that is cheap and possible."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked so often that the way down would double the time
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        tensors = list(_list_tensors((*args, *kwargs.values())))
        refuse_real_parameters(tensors)
        if func is aten._grouped_mm.default:
            return _make_grouped_product(*args, **kwargs)
        is_known = self._knows_operands(func, tensors)
        try:
            result: Any
            if func in VIEWS and type(args[0]) is FakeTensor:
                result = make_view(func, args, kwargs)
            else:
                result = func(*args, **kwargs)
        except DynamicOutputShapeException:
            if not is_known or not all(_is_cheap(tensor) for tensor in tensors):
                raise
            result = self._make_fake(self._compute(func, args, kwargs))
            if self._depends_on_chance(func, tensors):
                self._assume_drawn("decided on a shape")
                self._mark_drawn((result,))
            return result
        if isinstance(result, FakeTensor | tuple | list):
            self._follow(func, args, kwargs, tensors if is_known else None, result)
        elif result is None and is_known and all(_is_cheap(tensor) for tensor in tensors):
            self._follow_writes(func, args, kwargs)
        if is_known and self._depends_on_chance(func, tensors):
            self._mark_drawn((result if result is not None else tensors,))
        return result

    def _read(self, tensor: torch.Tensor) -> Any:
        data = self._find(tensor)
        if data is not None:
            if self._is_drawn(tensor):
                self._assume_drawn("were read")
            with _disable_current_modes():
                return data.item()
        if tensor.dtype.is_floating_point:
            self._assumed[
                f"a value that a dry run cannot know was read as {ASSUMED_READ} at {find_line()}"
            ] = None
            return ASSUMED_READ
        if tensor.dtype is torch.bool and is_under(_SAMPLING):
            return False  # an initialiser asks if its samples are bad; this ends its search
        raise DryRunError(
            f"the program reads the value of a {str(tensor.dtype).removeprefix('torch.')} tensor "
            f"at {find_line()}, and a dry run has shapes but no values; take the value from "
            "Python instead (a length, a flag; to generate, no end token), or measure this model "
            "for real"
        )

    def _find(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the values of a tensor, or one number with as many dimensions, if known."""
        if not isinstance(tensor, FakeTensor):
            with _disable_current_modes():
                # A copy: what holds on to the program's own tensor changes how long it lives.
                return tensor.detach().clone() if _is_cheap(tensor) else None
        entry = self._known.get(id(tensor))
        if entry is not None and entry[1].version == _version_of(tensor):
            return entry[1].data
        return None

    def _is_drawn(self, tensor: torch.Tensor) -> bool:
        entry = self._known.get(id(tensor))
        return entry is not None and entry[1].is_drawn

    def _depends_on_chance(self, func: Any, tensors: list[torch.Tensor]) -> bool:
        schema = getattr(func, "_schema", None)
        return (schema is not None and schema.name in _DRAWS) or any(map(self._is_drawn, tensors))

    def _mark_drawn(self, results: Iterable[Any]) -> None:
        for tensor in _list_tensors(results):
            if (entry := self._known.get(id(tensor))) is not None:
                self._known[id(tensor)] = entry[0], replace(entry[1], is_drawn=True)

    def _assume_drawn(self, what: str) -> None:
        self._assumed[
            f"whole numbers drawn at random {what} at {find_line()}; another run draws others"
        ] = None

    def _knows_operands(self, func: Any, tensors: list[torch.Tensor]) -> bool:
        """Return whether the result of ``func`` depends on known values only."""
        schema = getattr(func, "_schema", None)  # a higher-order operator has none
        if schema is not None and schema.name in _DRAWS:
            return True
        if schema is None or torch.Tag.nondeterministic_seeded in func.tags:
            return False
        if schema.name in _FILLED_WITH or schema.name in _NUMBER_AT:
            return True
        if not tensors:
            # Of numbers alone: a counter, a quotient. What is empty holds whatever was there.
            return func.namespace == "aten" and not schema.name.startswith("aten::empty")
        if schema.name == "aten::copy_":
            return self._find(tensors[1]) is not None
        return all(self._find(tensor) is not None for tensor in tensors)

    def _follow(
        self, func: Any, args: Any, kwargs: Any, operands: list[torch.Tensor] | None, result: Any
    ) -> None:
        """Remember what is known of the result; ``operands`` is None if they are not all known."""
        results = [leaf for leaf in _list_tensors((result,)) if isinstance(leaf, FakeTensor)]
        if operands is None:
            answer = _answer_if_finite(func, args)
            if answer is not None:
                self._remember(func, results[0], answer)
            return
        name = func._schema.name
        number = _FILLED_WITH.get(name)
        if number is None and name in _NUMBER_AT and len(args) > _NUMBER_AT[name]:
            number = args[_NUMBER_AT[name]]
        if isinstance(number, bool | int | float | complex):
            self._remember(func, results[0], number)
        elif all(_is_cheap(tensor) for tensor in (*operands, *results)):
            computed = _list_tensors((self._compute(func, args, kwargs),))
            for fake, real in zip(results, computed, strict=True):
                self._keep(fake, _Value(_shorten(real), _version_after(func, fake)))
        elif operands:
            self._follow_number(func, args, kwargs, operands, results)

    def _follow_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Remember what an op wrote that returns nothing, such as the ``_foreach`` ones."""
        reals: dict[int, tuple[Any, torch.Tensor]] = {}
        self._compute(func, args, kwargs, reals)
        for fake, real in reals.values():
            if isinstance(fake, FakeTensor):
                self._keep(fake, _Value(_shorten(real), _version_after(func, fake)))

    def _follow_number(
        self, func: Any, args: Any, kwargs: Any, operands: list[Any], results: list[Any]
    ) -> None:
        """Follow tensors that consist of one number through what keeps them so."""
        values = [self._find(tensor) for tensor in operands]
        if not all(value is not None and value.numel() == 1 for value in values):
            return
        name, first = func._schema.name, values[0]
        assert first is not None
        makes_view = any(r.alias_info is not None for r in func._schema.returns)
        with _disable_current_modes():
            if name == "aten::copy_":
                first = values[1]
            elif torch.Tag.pointwise in func.tags:
                first = self._compute(func, args, kwargs, as_number=True)
            elif name == "aten::cat":
                if any(value.item() != first.item() for value in values if value is not None):
                    return
            elif not (makes_view or name in _MOVES or name in _KEEPERS):
                return
            for fake in results:
                if first is not None and fake.numel():
                    self._remember(func, fake, first.reshape(()).item())

    def _remember(self, func: Any, fake: FakeTensor, number: Any) -> None:
        with _disable_current_modes():
            data = torch.full((1,) * fake.ndim, number, dtype=fake.dtype)
        self._keep(fake, _Value(data, _version_after(func, fake)))

    def _keep(self, fake: torch.Tensor, value: _Value) -> None:
        key = id(fake)
        self._known[key] = weakref.ref(fake, lambda _: self._known.pop(key, None)), value

    def _compute(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        reals: dict[int, tuple[Any, torch.Tensor]] | None = None,
        *,
        as_number: bool = False,
    ) -> Any:
        """Run ``func`` on the values of its operands, which are all known.

        Args:
            func: The op.
            args: Its arguments.
            kwargs: Its keyword arguments.
            reals: Gets every operand and what stood for it, by the operand's id.
            as_number: Let operands that consist of one number stand with one element.
        """

        def to_real(tensor: torch.Tensor) -> torch.Tensor:
            data = self._find(tensor)
            if data is None:  # of `copy_`: what it overwrites
                data = torch.empty((1,) * tensor.ndim, dtype=tensor.dtype)
            real = data.clone() if as_number else data.expand(tensor.shape).clone()
            if reals is not None:
                reals[id(tensor)] = tensor, real
            return real

        draws = func._schema.name in _DRAWS
        # What is drawn here must not change what the program draws elsewhere.
        apart = torch.random.fork_rng(devices=()) if draws else nullcontext()
        with _disable_current_modes(), apart:
            real_args, real_kwargs = tree_map_only(torch.Tensor, to_real, (args, kwargs))
            if real_kwargs.get("device") is not None:
                real_kwargs["device"] = torch.device("cpu")
            return func(*real_args, **real_kwargs)

    def _make_fake(self, real: Any) -> Any:
        """Return fake tensors for real results whose shape only the values could tell."""

        def to_fake(tensor: torch.Tensor) -> torch.Tensor:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._keep(fake, _Value(tensor, _version_of(fake)))
            return fake

        return tree_map_only(torch.Tensor, to_fake, real)


if SKIPPING is not None:
    leave_alone(FakeValues.__torch_dispatch__)


def _list_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _list_tensors(value)


def _shorten(data: torch.Tensor) -> torch.Tensor:
    """Return one element, with as many dimensions, if all are the same; else the data."""
    with _disable_current_modes():
        if data.numel() < 2:
            return data
        first = data.flatten()[:1]
        return first.reshape((1,) * data.ndim).clone() if bool((data == first).all()) else data


def _is_cheap(tensor: torch.Tensor) -> bool:
    longest = max(tensor.shape, default=1)
    return tensor.numel() <= max(SMALL, min(ROWS * longest, MOST))


def _version_of(tensor: torch.Tensor) -> int:
    # Under inference_mode writes are not counted.
    return -1 if tensor.is_inference() else tensor._version


def _version_after(func: Any, tensor: torch.Tensor) -> int:
    """Return the version that a result of ``func`` has once autograd has counted the write."""
    version = _version_of(tensor)
    return version if version < 0 or not func._schema.is_mutable else version + 1


def _answer_if_finite(func: Any, args: Any) -> bool | None:
    """Return what a test for NaN or infinity gives if all values are finite; None for other ops.

    ``torch.isfinite`` arrives here as ``x == x`` and ``abs(x) != inf``.
    """
    if func in (aten.isnan.default, aten.isinf.default):
        return False
    if func in (aten.eq.Tensor, aten.ne.Tensor) and args[0] is args[1]:
        return bool(func is aten.eq.Tensor)
    if func in (aten.eq.Scalar, aten.ne.Scalar) and args[1] in (math.inf, -math.inf):
        return bool(func is aten.ne.Scalar)
    return None


def _make_grouped_product(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the result of ``_grouped_mm``, whose fake rule knows bfloat16 only.

    The kernel for the CPU takes other dtypes too; its result is the same:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_meta_registrations.py#L8560
    """
    from torch import _meta_registrations

    make: Any = _meta_registrations._create_grouped_mm_output_tensor
    result: torch.Tensor = make(a, b, offs, out_dtype or a.dtype)
    return result
