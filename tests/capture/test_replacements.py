"""What a program puts in the place of torch's functions itself stays as the program left it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnprof


@pytest.fixture(autouse=True)
def _torch_is_put_back() -> Iterator[None]:
    places = (torch.UntypedStorage, torch.Tensor)
    before = [dict(vars(place)) for place in places]
    yield
    for place, own in zip(places, before, strict=True):
        for name in ("resize_", "numpy"):
            if name in own:
                setattr(place, name, own[name])
            elif name in vars(place):
                delattr(place, name)


def wrap(place: Any, name: str) -> tuple[Any, list[int]]:
    """Put a wrapper that notes its calls in the place of a method, as programs do."""
    original = getattr(place, name)
    calls: list[int] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    setattr(place, name, wrapper)
    return wrapper, calls


def run_dry() -> None:
    attnprof.dry_run(lambda n, device: lambda: torch.ones(n).exp(), 4)


def test_resize_that_is_wrapped_inside_a_trace_stays_wrapped() -> None:
    with attnprof.trace(samples_per_second=0):
        wrapper, calls = wrap(torch.UntypedStorage, "resize_")
    assert torch.UntypedStorage.resize_ is wrapper
    torch.ones(3).untyped_storage().resize_(0)  # the trace's own, below, only passes on
    assert calls == [1]


def test_resize_that_was_wrapped_before_is_put_back() -> None:
    wrapper, calls = wrap(torch.UntypedStorage, "resize_")
    with attnprof.trace(samples_per_second=0):
        torch.ones(3).untyped_storage().resize_(0)
    assert torch.UntypedStorage.resize_ is wrapper
    assert calls == [1]


def test_numpy_that_was_wrapped_before_a_dry_run_is_put_back() -> None:
    wrapper, calls = wrap(torch.Tensor, "numpy")
    run_dry()
    assert torch.Tensor.numpy is wrapper
    assert torch.ones(2).numpy().tolist() == [1, 1]
    assert calls == [1]


def test_numpy_is_inherited_again_after_a_dry_run() -> None:
    run_dry()
    assert "numpy" not in vars(torch.Tensor)
    assert torch.ones(2).numpy().tolist() == [1, 1]


def test_numpy_that_is_wrapped_inside_a_dry_run_stays_wrapped() -> None:
    wrapped: list[tuple[Any, list[int]]] = []

    def make_step(n: int, device: str) -> Any:
        wrapped.append(wrap(torch.Tensor, "numpy"))
        return lambda: torch.ones(n).exp()

    attnprof.dry_run(make_step, 4)
    ((wrapper, calls),) = wrapped
    assert torch.Tensor.numpy is wrapper
    assert torch.ones(2).numpy().tolist() == [1, 1]
    assert calls == [1]
