"""Keep Dynamo, torch.compile's front end, and the tracer's own functions out of each other's way.

Where a traced program compiles a function that calls into attnprof, Dynamo would go on to compile
attnprof. `torch.compiler.disable` prevents that at the price of 1 µs a call and of importing
Dynamo, over a second, into programs that compile nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

P = ParamSpec("P")
R = TypeVar("R")


def _find_skipping() -> Any:
    """Return what makes Dynamo leave a frame alone and all that it calls, if torch has it."""
    frames = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if frames is None or not hasattr(frames, "set_code_exec_strategy"):
        return None
    return frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)


SKIPPING = _find_skipping()


def leave_alone(function: Callable[P, R]) -> Callable[P, R]:
    """Have Dynamo run ``function``, and all that it calls, as they are; return it."""
    if SKIPPING is None:
        disabled: Callable[P, R] = torch._compile._disable_dynamo(function)
        return disabled
    torch._C._dynamo.eval_frame.set_code_exec_strategy(function.__code__, SKIPPING)
    # Where it would be taken into the caller's graph instead of being a frame of its own:
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # as `disable` does
    return function


RUNS_COMPILED = hasattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None),
    "set_is_in_mode_without_ignore_compile_internals",
)
"""Whether compiled code may run under a dispatch mode. Not before torch 2.10: the keys that a mode
adds to a thread fail the guards of compiled code. Torch 2.8 then runs it op by op; torch 2.9, told
of a mode that does not mind compiled code, would compile it again at every call."""
_KNOWS_MODES = hasattr(TorchDispatchMode, "supports_higher_order_operators")
"""Whether higher-order operators ask a mode what to do; in torch 2.8 it has to be registered."""


def is_forced_eager() -> bool:
    """Return whether the program, or a dry run, has what it compiled run as it is written."""
    return bool(torch._dynamo.eval_frame._stance.stance == "force_eager")


class PassiveMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # not annotated
    """A dispatch mode that changes nothing: what is compiled runs compiled under it.

    Its ``__torch_dispatch__`` should be left alone, see `leave_alone`.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        """Make a mode that is not entered yet."""
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated
        if not _KNOWS_MODES:
            self._register_with_higher_order_operators()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell Dynamo that compiled code may run as it is; without this it would run eagerly."""
        return RUNS_COMPILED

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Where this is true, torch wraps __torch_dispatch__ in `torch._dynamo.disable`: 1 µs an
        # op. `leave_alone`, above, says the same to Dynamo once.
        return SKIPPING is None

    @classmethod
    def _register_with_higher_order_operators(cls) -> None:
        def run(operator: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
            return mode.__torch_dispatch__(operator, (), args, kwargs)

        for operator in torch._ops._higher_order_ops.values():
            operator.python_key_table.setdefault(cls, partial(run, operator))
