"""Optimizer steps: their span, and which storages they update and keep as their state."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from attnprof.capture.detail import DetailSwitch
from attnprof.capture.ledger import Ledger
from attnprof.capture.modules import ModuleNames
from attnprof.capture.recorder import Recorder
from attnprof.store.schema import OPTIMIZER_BEGIN, OPTIMIZER_END
from attnprof.vocabulary import Role


def _walk(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in a state, which may be a tensor, or hold some at any depth, by name."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(str(key), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(name, inner)


class OptimizerWatch:
    """Marks where every optimizer's step begins and ends."""

    def __init__(
        self, names: ModuleNames, ledger: Ledger, recorder: Recorder, detail: DetailSwitch
    ) -> None:
        """Record marks and identities into ``recorder``, and tell ``detail`` of every step."""
        self._names = names
        self._ledger = ledger
        self._recorder = recorder
        self._detail = detail
        self._settled: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = (
            weakref.WeakKeyDictionary()
        )
        """Optimizer -> its state's id and length when a walk last found nothing new. Loading a
        checkpoint gives it another state."""
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Mark the beginning; the global step pre-hook."""
        if not self._detail.is_on:
            return
        self._identify(optimizer)
        self._recorder.mark(OPTIMIZER_BEGIN)

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Mark the end and commit; the global step post-hook."""
        if self._detail.is_on:
            self._identify(optimizer)
            self._recorder.mark(OPTIMIZER_END)
            self._recorder.commit()
        self._detail.note_update()

    def _identify(self, optimizer: Optimizer) -> None:
        # State is made in the first step and then updated in place; walking it again at every
        # step would cost more than the step of a small model.
        self._seen.add(optimizer)
        states: dict[Any, Any] = optimizer.state  # by parameter; some keep more than that in it
        now = (id(states), len(states))
        if self._settled.get(optimizer) == now:
            return
        news = False
        for parameter, state in states.items():
            owner = self._ledger.find(parameter) if isinstance(parameter, torch.Tensor) else -1
            for name, value in _walk("", state):
                written = self._names.write_identity(
                    value, Role.OPTIMIZER_STATE, name, -1, owner=owner
                )
                news = news or written >= 0
        if not news:
            self._settled[optimizer] = now

    def identify_late(self) -> None:
        """Identify parameters that belong to no module, which a program keeps by itself.

        At the end, when the models have said which are theirs.
        """
        for optimizer in list(self._seen):
            for group in optimizer.param_groups:
                for number, parameter in enumerate(group["params"]):
                    self._names.write_identity(parameter, Role.PARAMETER, str(number), -1)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the hooks installed for the time being."""
        first = register_optimizer_step_pre_hook(self.before)
        try:
            last = register_optimizer_step_post_hook(self.after)
            try:
                yield
            finally:
                last.remove()
        finally:
            first.remove()
