"""One workload at one sequence length: build a step, run it, and keep what was recorded."""

import dataclasses
import gc
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch

from attnprof.capture.tracer import Tracer
from attnprof.units import require_count

if TYPE_CHECKING:
    from attnprof.run import Run

Step = Callable[[], Any]
"""Runs one step of a workload."""
MakeStep = Callable[[int, str], Step]
"""``make_step(seq_len, device)``: builds a model and its inputs and returns a `Step`."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice)
_PLAIN_KINDS = (Enum, Path, torch.dtype, torch.device)
"""What ``repr`` tells from everything else."""


def record_workload(
    make_step: MakeStep,
    seq_len: int,
    *,
    device: str = "cpu",
    directory: str | Path | None = None,
    steps: int | None = None,
) -> "Run":
    """Build a workload, run it for real, and return its run.

    Building is part of the run: what the model needs while it is made can be the peak too.

    Args:
        make_step: Builds model and inputs for a length on a device and returns a function
            without arguments that runs one step.
        seq_len: The sequence length n, in tokens.
        device: Handed to ``make_step``.
        directory: Where to write the run; a temporary one without it.
        steps: How many steps to run. Without it one, and a second one if the first left memory
            behind (gradients, optimizer state), which the next step then has beside its own.

    Raises:
        TypeError: ``make_step`` or what it returns cannot be called.
        ValueError: ``seq_len`` or ``steps`` is not a positive whole number.
        CaptureError: Another trace is running, or the directory cannot be used.
        Exception: Whatever the workload raises, as it was raised.
    """
    seq_len, steps = check_workload(make_step, seq_len, steps)
    workload = describe_workload(make_step, seq_len, source="measured")
    tracer = Tracer(directory, detail="full", info={"workload": workload})
    with tracer:
        workload["steps"] = run_steps(tracer, make_step, seq_len, device, steps)
    return tracer.run


def run_steps(
    tracer: Tracer, make_step: MakeStep, seq_len: int, device: str, steps: int | None
) -> int:
    """Build the step and run it under a running trace; return how many steps were run.

    Args:
        tracer: The trace, inside its ``with``.
        make_step: As for `record_workload`.
        seq_len: As for `record_workload`.
        device: As for `record_workload`.
        steps: As for `record_workload`.

    Raises:
        TypeError: ``make_step`` does not return a function that can be called without arguments
            and runs the step.
    """
    step = make_step(seq_len, device)
    _check_step(step, make_step)
    before = tracer.ledger.mark()
    for _ in range(steps or 1):
        _check_ran(step(), make_step)
        tracer.step()
    if steps is not None:
        return steps
    if not tracer.ledger.count_bytes(since=before):
        return 1
    gc.collect()  # what only reference cycles hold is not left behind
    if not tracer.ledger.count_bytes(since=before):
        return 1
    step()
    tracer.step()
    return 2


def _check_step(step: object, make_step: MakeStep) -> None:
    if not callable(step):
        raise TypeError(
            f"make_step must return a function that runs one step, got {type(step).__name__}; "
            f"end {name_of(make_step)} with 'return step', where 'def step(): ...' does the work"
        )
    try:
        # Of a module: calling it takes any arguments and hands them to forward.
        inspect.signature(getattr(step, "forward", step)).bind()
    except ValueError:  # a builtin that has no signature to read
        pass
    except TypeError as error:
        raise TypeError(
            f"{name_of(make_step)} returned {name_of(step)}, which cannot be called without "
            f"arguments: {error}; return a function without parameters, as in "
            "'def step(): model(inputs)'"
        ) from None


def _check_ran(result: object, make_step: MakeStep) -> None:
    if inspect.iscoroutine(result):
        result.close()  # or Python warns that nobody awaited it
        kind = "coroutine, which 'async def' makes"
    elif inspect.isgenerator(result) or inspect.isasyncgen(result):
        kind = "generator, which 'yield' makes"
    else:
        return
    raise TypeError(
        f"the step that {name_of(make_step)} returned gave a {kind}: none of it has run; return a "
        "plain function that runs the whole step"
    )


def check_workload(
    make_step: object, seq_len: object, steps: object = None
) -> tuple[int, int | None]:
    """Return length and steps as ints, or raise if these cannot be arguments of `record_workload`.

    Raises:
        TypeError: ``make_step`` cannot be called with a length and a device, or a number is none.
        ValueError: ``seq_len`` or ``steps`` is under 1.
    """
    if not callable(make_step):
        raise TypeError(
            "make_step must be a function make_step(seq_len, device) that builds a model and "
            f"returns a function running one step, got {type(make_step).__name__}"
        )
    try:
        inspect.signature(make_step).bind(1, "cpu")
    except ValueError:  # a builtin that has no signature to read
        pass
    except TypeError as error:
        raise TypeError(
            f"{name_of(make_step)} cannot be called as make_step(seq_len, device): {error}"
        ) from None
    whole_steps = None if steps is None else require_count("steps", steps)
    return require_count("seq_len", seq_len), whole_steps


def describe_workload(make_step: MakeStep, seq_len: int, *, source: str) -> dict[str, Any]:
    """Return what run.json says of a workload; ``steps`` joins it when they have been run."""
    return {"seq_len": seq_len, "source": source, "make_step": name_of(make_step)}


def name_of(make_step: object) -> str:
    """Return a name by which a reader finds the function: ``file.py:function``."""
    described = getattr(make_step, "target", None)  # a reference to a function in a script
    if isinstance(described, str):
        return described
    if isinstance(make_step, partial):
        return f"{name_of(make_step.func)}(…)"
    function = inspect.unwrap(make_step) if callable(make_step) else make_step
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    return f"{os.path.basename(code.co_filename)}:{name}" if code is not None else name


def identify(make_step: object) -> str | None:
    """Return what tells a function from all others, now and in later processes.

    That is the whole path of its file, its name, and what a partial or the function around it
    has given it.

    Returns:
        None if nothing does: for a lambda, an object that can be called and does not say what it
        holds, or a function that was given such an object.
    """
    identity = getattr(make_step, "identity", None)  # a reference to a function in a script
    if isinstance(identity, str):
        return identity
    try:
        return _spell(make_step)
    except (_NamelessError, RecursionError):
        return None


class _NamelessError(Exception):
    """A value has no text that is its own."""


def _spell(value: object) -> str:
    """Return text that no other value has."""
    if type(value) in _PLAIN or isinstance(value, _PLAIN_KINDS):
        return repr(value)
    if isinstance(value, partial):
        return f"{_spell(value.func)}{_spell_given(value.args, value.keywords)}"
    if isinstance(value, MethodType):
        return f"{_spell(value.__func__)} of {_spell(value.__self__)}"
    function = inspect.unwrap(value) if callable(value) else value
    if isinstance(function, FunctionType):
        return _spell_function(function)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{_spell(type(value))}{_spell_content(value)}"


def _spell_content(value: object) -> str:
    if isinstance(value, list | tuple):
        return _spell_given(value, {})
    if isinstance(value, set | frozenset):
        return f"({', '.join(sorted(map(_spell, value)))})"
    if isinstance(value, dict):
        return f"({', '.join(f'{_spell(key)}: {_spell(value[key])}' for key in value)})"
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _spell_given((), fields)
    raise _NamelessError


def _spell_given(args: Iterable[object], keywords: Mapping[str, object]) -> str:
    given = [*map(_spell, args), *(f"{key}={_spell(keywords[key])}" for key in sorted(keywords))]
    return f"({', '.join(given)})"


def _spell_function(function: FunctionType) -> str:
    code = function.__code__
    if "<lambda>" in function.__qualname__:
        raise _NamelessError
    path = code.co_filename
    # A notebook's cell is no file: its path changes with every kernel, its name with its content.
    path = os.path.realpath(path) if os.path.exists(path) else os.path.basename(path)
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # not filled yet
        raise _NamelessError from None
    around = dict(zip(code.co_freevars, cells, strict=True))
    return f"{path}:{function.__qualname__}{_spell_given((), around) if around else ''}"
