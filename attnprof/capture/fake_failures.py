"""Say in one line why a program cannot run on fake tensors, and where."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from attnprof.capture.lines import find_line, find_origin
from attnprof.errors import DryRunError

_MEASURE = "or measure this model for real"
_BY_TYPE: dict[type[Exception], tuple[str, str]] = {
    DataDependentOutputException: (
        "the program reads values of a tensor",
        f"a dry run has shapes but no values; take the value from Python instead, {_MEASURE}",
    ),
    DynamicOutputShapeException: (
        "the shape of a result depends on the values of its operands",
        "a dry run has shapes but no values; use a form with a fixed shape (a mask in place of "
        f"boolean indexing), {_MEASURE}",
    ),
    UnsupportedOperatorException: (
        "an operator says nothing of the shapes it returns",
        f"register that with torch.library.register_fake, {_MEASURE}",
    ),
    UnsupportedFakeTensorException: (
        "a tensor of a kind that cannot be faked is used",
        f"use a plain one, {_MEASURE}",
    ),
}
_BY_TEXT: dict[str, tuple[str, str]] = {
    "Mixing fake modes": (
        "a tensor that an earlier dry run made is still in use",
        "something keeps tensors from one run to the next (a global, a cache); build all of it "
        "inside make_step",
    ),
    "data pointer": (
        "a kernel outside of torch's operators reads memory directly",
        f"wrap it with torch.library.custom_op and register_fake, {_MEASURE}",
    ),
    "data is not allocated yet": (
        "torch reads or writes a tensor's memory outside of its operators",
        f"give it tensors where it takes lists of numbers, {_MEASURE}",
    ),
    "Couldn't swap": (
        "a module is moved from the meta device, or to it",
        "build it on the device that make_step is given: in a dry run that takes no memory either",
    ),
    "FakeTensor": ("an operation does not work on fake tensors", "measure this model for real"),
}

_NESTED = ("_nested_tensor", "NestedTensor", "shape_env must not be None")
"""In what torch raises where the lengths in a nested tensor would have to be known."""


@contextmanager
def saying_what_fails() -> Iterator[None]:
    """Turn what torch raises because tensors are fake into a `DryRunError` that names the line.

    Other exceptions are the program's own and pass on as they are. Torch's log of failed fake
    kernels, a traceback for each, is silent meanwhile: the exception says the same.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    except DryRunError:
        raise
    except Exception as error:
        reason = _find_reason(error)
        if reason is None:
            raise
        what, remedy = reason
        raise DryRunError(
            f"{what} at {find_origin(error)} ({_shorten(error)}); {remedy}"
        ) from error
    finally:
        log.disabled = was_disabled


def refuse_real_parameters(tensors: Iterable[Any]) -> None:
    """Raise if the program computes with a model that exists: its gradients would become fake."""
    for tensor in tensors:
        if not isinstance(tensor, FakeTensor) and tensor.requires_grad and tensor.is_leaf:
            raise DryRunError(
                f"a parameter of shape {tuple(tensor.shape)} that was made before the dry run is "
                f"used at {find_line()}; build the model inside make_step, so that the dry run "
                "can build one without memory and yours stays as it is"
            )


def refuse_sparse_copies(func: Any) -> None:
    """Raise if an op makes a sparse copy: a fake kernel takes all values for zeros."""
    if func._schema.name.startswith("aten::_to_sparse"):
        raise DryRunError(
            f"a sparse copy holds as many values as are not zero, at {find_line()}, and a dry run "
            f"has shapes but no values; make it of indices and values, {_MEASURE}"
        )


def _find_reason(error: Exception) -> tuple[str, str] | None:
    if _is_of_nested_tensors(error):
        return "a nested tensor is made", f"use a padded one and a mask, {_MEASURE}"
    for kind, reason in _BY_TYPE.items():
        if isinstance(error, kind):
            return reason
    text = str(error)
    return next((reason for sign, reason in _BY_TEXT.items() if sign in text), None)


def _is_of_nested_tensors(error: Exception) -> bool:
    if any(sign in str(error) for sign in _NESTED):
        return True
    *_, (innermost, _line) = walk_tb(error.__traceback__)
    return innermost.f_code.co_name == "create_symbolic_nested_int"  # wordless in torch 2.8


def _shorten(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
