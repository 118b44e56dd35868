"""The tables that a program looks positions up in, which end somewhere.

On fake tensors a lookup past the end of a table goes unnoticed, and a length would pass for one
that a model can take.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from attnprof.capture.fake_knowledge import Knowledge
from attnprof.capture.fake_rules import MOST
from attnprof.capture.lines import find_line
from attnprof.errors import LengthError

aten = torch.ops.aten

LOOKUPS = frozenset(
    {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.slice.Tensor}
)
"""Ops that take rows of a table."""


class Tables:
    """Watches how far down tables are used."""

    def __init__(self, knowledge: Knowledge) -> None:
        """Look for indices in what is known."""
        self._knowledge = knowledge
        self._used: dict[tuple[str, int], int] = {}
        """Line of the program and rows of a table -> how many of the rows, from the first."""

    def describe(self) -> list[dict[str, Any]]:
        """Return what run.json says of them."""
        return [{"at": at, "rows": rows, "used": used} for (at, rows), used in self._used.items()]

    def check(self, func: Any, args: Any) -> None:
        """Note how far down a table an op of `LOOKUPS` looks.

        Raises:
            LengthError: The table ends before that.
        """
        if func is aten.slice.Tensor:
            end = args[3] if len(args) > 3 else None  # of (table, dim, start, end, …)
            if end is not None and 0 < end <= args[0].shape[args[1]]:
                self._note(args[0].shape[args[1]], end)
        elif func is aten.embedding.default:
            self._look_up(args[0].shape[0], args[1], from_end=False)
        elif func is aten.index_select.default:
            self._look_up(args[0].shape[args[1]], args[2], from_end=False)
        elif all(index is None or index.dtype in (torch.int64, torch.int32) for index in args[1]):
            for rows, index in zip(args[0].shape, args[1], strict=False):
                if index is not None:
                    self._look_up(rows, index, from_end=True)

    def _look_up(self, rows: int, index: torch.Tensor, *, from_end: bool) -> None:
        values = self._knowledge.find(index)
        if values is None or not values.numel() or values.numel() > MOST:
            return
        with _disable_current_modes():
            lowest, highest = (int(value) for value in values.aminmax())
        if highest >= rows or lowest < (-rows if from_end else 0):
            missing = highest if highest >= rows else lowest
            error = LengthError(
                f"row {missing} of a table of {rows} rows is looked up at {find_line()}; if it "
                f"holds positions, take a length within those {rows}, or build the model with more"
            )
            error.rows = rows
            raise error
        if self._knowledge.find_guess((index,)) is None:
            self._note(rows, highest + 1)

    def _note(self, rows: int, used: int) -> None:
        key = find_line(), rows
        self._used[key] = max(used, self._used.get(key, 0))
