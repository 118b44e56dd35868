"""Tables that fit: on a narrow terminal the least important columns go, numbers are never cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_BAR_WIDTH = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LINE_OF_A_TABLE = box.Box("    \n    \n ── \n    \n ── \n ── \n    \n    \n")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a `FittedTable`."""

    title: str
    right: bool = False
    """Numbers: aligned to the right."""
    drop: int = 0
    """Where width is short, columns go from 1 upwards; 0 stays."""
    is_name: bool = False
    """Layer names: folded over several lines rather than cut."""
    is_text: bool = False
    """Prose: wrapped at words."""


@dataclass(frozen=True, slots=True)
class FittedTable:
    """A table without frame that leaves out columns until it fits."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[RenderableType]]
    ruled_off: int = 0
    """So many last rows stand under a line of their own, as a total does."""
    has_head: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the widest choice of columns that fits."""
        dropped = 0
        last = max(column.drop for column in self.columns)
        table = self._build(dropped)
        while dropped < last and _width_of(console, options, table) > options.max_width:
            dropped += 1
            table = self._build(dropped)
        yield table

    def _build(self, dropped: int) -> Table:
        table = Table(
            box=_LINE_OF_A_TABLE if self.has_head else None,
            show_edge=False,
            show_header=self.has_head,
            header_style="dim",
            pad_edge=False,
            padding=(0, 1),
        )
        kept = [i for i, c in enumerate(self.columns) if not c.drop or c.drop > dropped]
        for i in kept:
            column = self.columns[i]
            table.add_column(
                Text(column.title),
                justify="right" if column.right else "left",
                no_wrap=not (column.is_name or column.is_text),
                overflow="ellipsis" if column.right else "fold",
                min_width=10 if column.is_name or column.is_text else None,
            )
        for number, row in enumerate(self.rows):
            before_total = number == len(self.rows) - self.ruled_off - 1 and self.ruled_off > 0
            cells = [Text(cell) if isinstance(cell, str) else cell for cell in row]
            table.add_row(*(cells[i] for i in kept), end_section=before_total)
        return table


def _width_of(console: Console, options: ConsoleOptions, table: Table) -> int:
    return Measurement.get(console, options.update(max_width=10_000), table).maximum


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar, exact to an eighth of a character."""

    fraction: float
    """From 0 to 1."""
    colour: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it; with ``#`` where the output cannot show blocks."""
        eighths = max(round(self.fraction * _BAR_WIDTH * 8), 1 if self.fraction > 0 else 0)
        whole, part = divmod(eighths, 8)
        if options.ascii_only:
            yield Text("#" * (whole + (part >= 4)), style=self.colour)
        else:
            yield Text("█" * whole + (_EIGHTHS[part] if part else ""), style=self.colour)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take the full width, so that bars of several tables compare."""
        return Measurement(_BAR_WIDTH, _BAR_WIDTH)


def show_name(name: Any) -> str:
    """Return text that came from a run with its control characters made visible.

    A layer's name is chosen by the traced program; it must not be able to steer the terminal.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))
