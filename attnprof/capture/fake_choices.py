"""Tokens that a program chose by values that a dry run cannot know.

What a model generates cannot be known, and most programs ask only whether it is the end: taking it
for none of the tokens it is compared with lets them generate as many as they may, which needs the
most memory. With gradients on no tokens are chosen: there, choices are routes, to experts say, and
how many take each decides on memory.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from attnprof.capture.fake_rules import MOVES

NO_TOKEN = -1
"""What reading a chosen token gives: no program compares tokens with it."""

_CHOICES = frozenset({"aten::argmax", "aten::multinomial"})
_KEEPERS = MOVES | {"aten::cat", "aten::stack", "aten::copy_", "aten::index_put_"}
"""Ops whose result holds tokens if an operand does, beside what is element-wise or a view."""


class Choices:
    """Knows which tensors hold chosen tokens."""

    def __init__(self) -> None:
        """Know none yet."""
        self._chosen: dict[int, weakref.ref[torch.Tensor]] = {}

    def has(self, value: object) -> bool:
        """Return whether this is a tensor of chosen tokens."""
        return id(value) in self._chosen

    def follow(
        self, func: Any, operands: Iterable[torch.Tensor], results: Iterable[torch.Tensor]
    ) -> None:
        """Note which results of an op, that depends on unknown values, are chosen tokens."""
        name = func._schema.name
        if name in _CHOICES:
            if torch.is_grad_enabled():
                return
        elif not (self._chosen and any(map(self.has, operands)) and _keeps_tokens(func)):
            return
        for result in results:
            if result.dtype in (torch.int64, torch.int32):
                self._add(result)

    def answer(self, func: Any, args: Any) -> bool | None:
        """Return what comparing chosen tokens gives; None if ``func`` does something else."""
        name = func._schema.name
        if name not in ("aten::eq", "aten::ne", "aten::isin") or not any(map(self.has, args[:2])):
            return None
        return bool(name == "aten::ne")

    def _add(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        self._chosen[key] = weakref.ref(tensor, lambda _: self._chosen.pop(key, None))


def _keeps_tokens(func: Any) -> bool:
    return (
        func._schema.name in _KEEPERS
        or torch.Tag.pointwise in func.tags
        or any(r.alias_info is not None for r in func._schema.returns)
    )
