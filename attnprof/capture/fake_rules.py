"""What is known of ops and tensors without running anything, for `attnprof.capture.fake_values`."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

SMALL = 1024
"""Tensors of up to so many elements are computed for real."""
ROWS = 8
"""So are tensors of up to so many vectors, such as positions or lengths of a batch; what has n²
elements never is."""
MOST = 2**24
"""No tensor of more elements is: a vector may be long for being n² of something flattened."""

aten = torch.ops.aten

ASSUMED_READ = 1.0
"""What reading an unknown floating-point value gives: finite, positive and fit for a logarithm."""


class Guess(IntEnum):
    """What a dry run takes the liberty to assume of values, the boldest last."""

    DRAWN = 1
    READ = 2
    CHOSEN = 3

    def describe(self, what: str, where: str) -> str:
        """Return a line for the user: what was done with such values, and where."""
        if self is Guess.DRAWN:
            return f"numbers drawn at random {what} at {where}; another run draws others"
        if self is Guess.CHOSEN:
            return f"tokens that a dry run cannot know were taken for no end token at {where}"
        return f"a value that a dry run cannot know was read as {ASSUMED_READ} at {where}"


FILLED_WITH: dict[str, Any] = {
    "aten::zeros": 0, "aten::zeros_like": 0, "aten::new_zeros": 0, "aten::zero_": 0,
    "aten::ones": 1, "aten::ones_like": 1, "aten::new_ones": 1,
}  # fmt: skip
"""Ops that put one number everywhere -> the number."""
NUMBER_AT = {
    "aten::scalar_tensor": 0, "aten::full": 1, "aten::full_like": 1, "aten::fill_": 1,
    "aten::new_full": 2,
}  # fmt: skip
"""Ops that put one number everywhere -> the position of the number among their arguments."""
_DRAWS = frozenset({"aten::randint", "aten::randperm", "aten::random_"})
"""Ops that draw whole numbers: token ids, mostly. One draw is as good as another, but for a program
that reads it."""
_DRAWS_TO_DECIDE = frozenset({"aten::rand", "aten::rand_like"})
"""Ops that draw what programs compare with a rate, to leave out a token or a layer."""
_DRAWS_OF_ONE = frozenset(
    f"aten::{name}" for name in ("bernoulli_", "normal_", "randn", "randn_like", "uniform_")
)
"""Ops that draw weights and noise; to decide, they draw one number."""
DRAWS_BY = frozenset({"aten::bernoulli", "aten::multinomial"})
"""Ops that draw by the probabilities in their first operand."""
MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "_to_copy", "clone", "flip", "gather", "index", "index_select", "repeat", "roll",
    )
)  # fmt: skip
"""Ops whose result holds elements of their first operand and nothing else."""
_DRAWS_IF_FEW = _DRAWS_TO_DECIDE | _DRAWS_OF_ONE | DRAWS_BY
_COMPARISONS = frozenset(f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge"))
KEEPERS = frozenset(f"aten::{name}" for name in ("all", "amax", "amin", "any", "mean"))
"""Reductions that give the number of which an operand consists."""


def list_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among values, which may be lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from list_tensors(value)


def name_of(func: Any) -> str:
    """Return an operator's name without its overload; "" for a higher-order one."""
    name: str = getattr(getattr(func, "_schema", None), "name", "")
    return name


def shorten(data: torch.Tensor) -> torch.Tensor:
    """Return one element, with as many dimensions, if all are the same; else the data."""
    with _disable_current_modes():
        if data.numel() < 2:
            return data
        first = data.flatten()[:1]
        return first.reshape((1,) * data.ndim).clone() if bool((data == first).all()) else data


def list_written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that an op writes into."""
    schema = getattr(func, "_schema", None)  # a higher-order operator has none
    if schema is None or not schema.is_mutable:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (t for t in list_tensors((given,)) if t.layout is torch.strided)


def is_cheap(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is small enough for its values to be followed."""
    return _is_small(tensor.shape)


def _is_small(shape: torch.Size) -> bool:
    return shape.numel() <= max(SMALL, min(ROWS * max(shape, default=1), MOST))


def draws(func: Any, args: Any) -> bool:
    """Return whether ``func`` draws numbers that can be followed."""
    name = name_of(func)
    if name in _DRAWS:
        return True
    if name not in _DRAWS_IF_FEW:
        return False
    shape = args[0].shape if isinstance(args[0], torch.Tensor) else torch.Size(args[0])
    return shape.numel() == 1 if name in _DRAWS_OF_ONE else _is_small(shape)


class Dice:
    """Draws numbers of its own, so that a dry run leaves the program's random state alone."""

    def __init__(self) -> None:
        """Go on from the program's state, whenever that has changed."""
        self._state = self._seen = torch.get_rng_state()

    @contextmanager
    def thrown(self) -> Iterator[None]:
        """Draw within from a state that moves on from draw to draw."""
        with torch.random.fork_rng(devices=()):
            seen = torch.get_rng_state()
            if not seen.equal(self._seen):
                self._state = self._seen = seen
            torch.set_rng_state(self._state)
            yield
            self._state = torch.get_rng_state()


def compares_numbers(func: Any, args: Any) -> bool:
    """Return whether ``func`` compares one floating-point number with another."""
    if func._schema.name not in _COMPARISONS or len(args) != 2:
        return False
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    return all(t.numel() == 1 and t.dtype.is_floating_point for t in tensors)


def answer_if_finite(func: Any, args: Any) -> bool | None:
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
