"""Optimizer steps: their span, and which storages are their state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from attnprof.capture.ledger import Ledger
from attnprof.capture.modules import ModuleNames
from attnprof.capture.recorder import Recorder
from attnprof.store.schema import OPTIMIZER_BEGIN, OPTIMIZER_END
from attnprof.vocabulary import Role


class OptimizerWatch:
    """Marks where every optimizer's step begins and ends."""

    def __init__(self, names: ModuleNames, ledger: Ledger, recorder: Recorder) -> None:
        """Record marks and identities into ``recorder``."""
        self._names = names
        self._ledger = ledger
        self._recorder = recorder
        self._settled: dict[int, int] = {}
        """id of an optimizer -> number of states when a walk last found nothing new."""

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Mark the beginning; the global step pre-hook."""
        self._identify(optimizer)
        self._recorder.mark(OPTIMIZER_BEGIN)

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Mark the end and commit; the global step post-hook."""
        self._identify(optimizer)
        self._recorder.mark(OPTIMIZER_END)
        self._recorder.commit()

    def _identify(self, optimizer: Optimizer) -> None:
        # State is made in the first step and then updated in place; walking it again at every
        # step would cost more than the step of a small model.
        if self._settled.get(id(optimizer)) == len(optimizer.state):
            return
        news = False
        for parameter, state in optimizer.state.items():
            owner = self._ledger.find(parameter)
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    written = self._names.write_identity(
                        value, Role.OPTIMIZER_STATE, name, -1, owner=owner
                    )
                    news = news or written >= 0
        if not news:
            self._settled[id(optimizer)] = len(optimizer.state)

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
