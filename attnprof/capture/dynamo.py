"""Keep Dynamo, torch.compile's front end, out of the tracer's own functions.

Where a traced program compiles a function that calls into attnprof, Dynamo would go on to compile
attnprof. `torch.compiler.disable` prevents that at the price of 1 µs a call and of importing
Dynamo, over a second, into programs that compile nothing.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

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
