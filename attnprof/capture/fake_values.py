"""The values a program needs to know of fake tensors, so that it takes the path it really takes.

A fake tensor has a shape and no values. Programs read values all the same: drop-path rates from
``torch.linspace``, whether a mask is all ones, the loss for a log. `FakeValues` follows the values
that depend on nothing unknown, as long as that is cheap: tensors that hold one number everywhere,
of any size, and vectors. It answers reads from those, and says which read it cannot answer.
"""

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from attnprof.capture.dynamo import SKIPPING, PassiveMode, leave_alone
from attnprof.capture.fake_choices import NO_TOKEN, Choices
from attnprof.capture.fake_failures import refuse_sparse_copies
from attnprof.capture.fake_kernels import run_kernel
from attnprof.capture.fake_knowledge import Knowledge
from attnprof.capture.fake_rules import (
    ASSUMED_READ,
    DRAWS_BY,
    FILLED_WITH,
    KEEPERS,
    MOVES,
    NUMBER_AT,
    Dice,
    Guess,
    answer_if_finite,
    compares_numbers,
    draws,
    is_cheap,
    list_tensors,
    list_written,
    name_of,
    shorten,
)
from attnprof.capture.fake_shapes import run_by_values
from attnprof.capture.fake_tables import LOOKUPS, Tables
from attnprof.capture.fake_twins import Twins
from attnprof.capture.fake_views import VIEWS, make_view
from attnprof.capture.lines import find_line, is_under
from attnprof.errors import DryRunError

_SAMPLING = os.path.join(os.path.dirname(torch.__file__), "nn", "init.py")

aten = torch.ops.aten


class FakeValues(PassiveMode):  # type: ignore[no-untyped-call]  # not annotated
    """Knows some tensors by value while a program runs on fake tensors.

    Enter it after (inside of) a FakeTensorMode.
    """

    def __init__(self, assumed: dict[str, None], twins: Twins) -> None:
        """Know nothing yet.

        Args:
            assumed: Gets a line for everything that was assumed, in order.
            twins: The fakes that stand for real tensors, whose values are there.
        """
        super().__init__()
        self._assumed = assumed
        self._knowledge = Knowledge(twins)
        self.tables = Tables(self._knowledge)
        """The tables that the program looks positions up in."""
        self._choices = Choices()
        self._dice = Dice()

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Return whether the values of a tensor can be read."""
        return self._knowledge.find(tensor) is not None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on fake tensors, and follow values where that is cheap and possible."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked so often that the way down would double the time
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        tensors = list(list_tensors((*args, *kwargs.values())))
        if func in LOOKUPS:
            self.tables.check(func, args)
        is_known = self._knows_operands(func, args, tensors)
        guess = self._find_guess(func, args, tensors) if is_known else None
        written = list(list_written(func, args, kwargs))
        before = self._knowledge.list_sharing(written)
        try:
            result: Any
            if func in VIEWS and type(args[0]) is FakeTensor:
                result = make_view(func, args, kwargs)
            else:
                result = run_kernel(func, args, kwargs)
        except DynamicOutputShapeException:
            result = self._shape_by_values(func, args, kwargs, tensors if is_known else None)
            guess = self._find_guess(func, args, tensors)
            if result is None or guess is Guess.CHOSEN:
                raise
            self._note(guess, "decided on a shape")
            self._knowledge.mark(list_tensors((result,)), guess)
            return result
        if isinstance(result, FakeTensor | tuple | list):
            self._follow(func, args, kwargs, tensors if is_known else None, result)
        elif result is None and is_known and all(is_cheap(tensor) for tensor in tensors):
            self._follow_writes(func, args, kwargs)
        self._knowledge.mark(list_tensors((tensors if result is None else result,)), guess)
        if written:
            self._knowledge.spread(written, before)
        return result

    def read_array(self, tensor: torch.Tensor) -> Any:
        """Return the values of a fake tensor as a numpy array, which cannot be written into.

        Raises:
            DryRunError: They are whole numbers, or flags, that a dry run cannot know.
        """
        with _disable_current_modes():
            values = torch.as_tensor(self._read_values(tensor), dtype=tensor.dtype)
            if self._choices.has(tensor):
                values = values.clamp(min=0)  # whoever wants them all looks them up
            return values.expand(tensor.shape).numpy()

    def _read(self, tensor: torch.Tensor) -> Any:
        values = self._read_values(tensor)
        with _disable_current_modes():
            return values.item() if isinstance(values, torch.Tensor) else values

    def _read_values(self, tensor: torch.Tensor) -> torch.Tensor | float | bool:
        """Return the values of a tensor, or one that stands for all of them."""
        data = self._knowledge.find(tensor)
        if data is not None:
            self._note(self._knowledge.find_guess((tensor,)), "were read")
            return data
        if tensor.dtype.is_floating_point:
            self._note(Guess.READ, "")
            return ASSUMED_READ
        if self._choices.has(tensor):
            self._note(Guess.CHOSEN, "")
            return NO_TOKEN
        if tensor.dtype is torch.bool and is_under(_SAMPLING):
            return False  # an initialiser asks if its samples are bad; this ends its search
        raise DryRunError(
            f"the program reads the value of a {str(tensor.dtype).removeprefix('torch.')} tensor "
            f"at {find_line()}, and a dry run has shapes but no values; take the value from "
            "Python instead (a length, a flag; to generate, no end token), or measure this model "
            "for real"
        )

    def _find_guess(self, func: Any, args: Any, tensors: list[torch.Tensor]) -> Guess | None:
        """Return the boldest guess that a result of ``func`` rests on."""
        name = name_of(func)
        if name in FILLED_WITH or name in NUMBER_AT:
            return None
        guess = self._knowledge.find_guess(tensors[1:] if name == "aten::copy_" else tensors)
        return Guess.DRAWN if guess is None and draws(func, args) else guess

    def _note(self, guess: Guess | None, what: str) -> None:
        if guess is not None:
            self._assumed[guess.describe(what, find_line())] = None

    def _knows_operands(self, func: Any, args: Any, tensors: list[torch.Tensor]) -> bool:
        """Return whether the result of ``func`` depends on known values only."""
        schema = getattr(func, "_schema", None)  # a higher-order operator has none
        if draws(func, args):
            return func._schema.name not in DRAWS_BY or self._knowledge.find(tensors[0]) is not None
        if schema is None or torch.Tag.nondeterministic_seeded in func.tags:
            return False
        if schema.name in FILLED_WITH or schema.name in NUMBER_AT:
            return True
        if not tensors:
            # Of numbers alone: a counter, a quotient. What is empty holds whatever was there.
            return func.namespace == "aten" and not schema.name.startswith("aten::empty")
        if schema.name == "aten::copy_":
            return self._knowledge.find(tensors[1]) is not None
        return all(self._knowledge.find(tensor) is not None for tensor in tensors)

    def _follow(
        self, func: Any, args: Any, kwargs: Any, operands: list[torch.Tensor] | None, result: Any
    ) -> None:
        """Remember what is known of the result; ``operands`` is None if they are not all known."""
        results = [leaf for leaf in list_tensors((result,)) if isinstance(leaf, FakeTensor)]
        if any(leaf.layout is not torch.strided for leaf in (*results, *(operands or ()))):
            refuse_sparse_copies(func)
            return
        if operands is None:
            answer = answer_if_finite(func, args)
            chosen = self._choices.answer(func, args)
            if answer is not None:
                self._remember(results[0], answer)
            elif chosen is not None:
                self._remember(results[0], chosen)
                self._knowledge.mark(results, Guess.CHOSEN)
            elif compares_numbers(func, args):
                self._guess_comparison(func, args, results[0])
            else:
                self._choices.follow(func, list_tensors((*args, *kwargs.values())), results)
            return
        name = func._schema.name
        number = FILLED_WITH.get(name)
        if number is None and name in NUMBER_AT and len(args) > NUMBER_AT[name]:
            number = args[NUMBER_AT[name]]
        if isinstance(number, bool | int | float | complex):
            self._remember(results[0], number)
        elif all(is_cheap(tensor) for tensor in (*operands, *results)):
            computed = list_tensors((self._compute(func, args, kwargs),))
            for fake, real in zip(results, computed, strict=True):
                self._knowledge.keep(fake, shorten(real))
        elif operands:
            self._follow_number(func, args, kwargs, operands, results)

    def _guess_comparison(self, func: Any, args: Any, result: FakeTensor) -> None:
        """Answer as if numbers that nobody knows were what reading them gives."""
        numbers = []
        for value in args:
            known = self._knowledge.find(value) if isinstance(value, torch.Tensor) else value
            with _disable_current_modes():
                number = known.item() if isinstance(known, torch.Tensor) else known
            numbers.append(ASSUMED_READ if number is None else number)
        with _disable_current_modes():
            answer = bool(func._overloadpacket(*map(torch.tensor, numbers)))
        self._remember(result, answer)
        self._knowledge.mark((result,), Guess.READ)

    def _follow_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Remember what an op wrote that returns nothing, such as the ``_foreach`` ones."""
        reals: dict[int, tuple[Any, torch.Tensor]] = {}
        self._compute(func, args, kwargs, reals)
        for fake, real in reals.values():
            if isinstance(fake, FakeTensor):
                self._knowledge.keep(fake, shorten(real))

    def _follow_number(
        self, func: Any, args: Any, kwargs: Any, operands: list[Any], results: list[Any]
    ) -> None:
        """Follow tensors that consist of one number through what keeps them so."""
        values = [self._knowledge.find(tensor) for tensor in operands]
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
            elif not (makes_view or name in MOVES or name in KEEPERS):
                return
            for fake in results:
                # A view of complex numbers as real ones is twice as long.
                if first is not None and first.dtype == fake.dtype and fake.numel():
                    self._remember(fake, first.reshape(()).item())

    def _remember(self, fake: FakeTensor, number: Any) -> None:
        with _disable_current_modes():
            data = torch.full((1,) * fake.ndim, number, dtype=fake.dtype)
        self._knowledge.keep(fake, data)

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
            data = self._knowledge.find(tensor)
            if data is None:  # of `copy_`: what it overwrites
                data = torch.empty((1,) * tensor.ndim, dtype=tensor.dtype)
            real = data.clone() if as_number else data.expand(tensor.shape).clone()
            if reals is not None:
                reals[id(tensor)] = tensor, real
            return real

        is_draw = draws(func, args)
        with _disable_current_modes(), self._dice.thrown() if is_draw else nullcontext():
            real_args, real_kwargs = tree_map_only(torch.Tensor, to_real, (args, kwargs))
            if real_kwargs.get("device") is not None:
                real_kwargs["device"] = torch.device("cpu")
            return func(*real_args, **real_kwargs)

    def _shape_by_values(
        self, func: Any, args: Any, kwargs: Any, operands: list[torch.Tensor] | None
    ) -> Any:
        """Return the result of an op whose shape depends on values, if those are known.

        ``operands`` is None if not all of them are known.
        """
        if operands is not None and all(map(is_cheap, operands)):
            return self._make_fake(self._compute(func, args, kwargs))
        return self._make_fake(run_by_values(func, args, kwargs, self._knowledge.find))

    def _make_fake(self, real: Any) -> Any:
        """Return fake tensors for real ones among results whose shape only values could tell."""

        def to_fake(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor):
                return tensor
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._knowledge.keep(fake, tensor)
            return fake

        return tree_map_only(torch.Tensor, to_fake, real)


if SKIPPING is not None:
    leave_alone(FakeValues.__torch_dispatch__)
