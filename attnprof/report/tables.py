"""Tables that fit: on a narrow terminal the least important columns go, numbers are never cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_BAR_WIDTHS = (8, 24)
"""Least and most characters of a `Bar`."""
_NAME_WIDTH = 24
"""A column goes before the names of layers are folded to less than this."""
_GAP = 3
"""Characters between two columns."""
_EIGHTHS = " ▏▎▍▌▋▊▉"
_RULED = box.Box("    \n    \n ── \n    \n ── \n ── \n    \n    \n")
"""A line below the head and above a total, and no others."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a `FittedTable`."""

    title: str
    right: bool = False
    """Numbers: aligned to the right."""
    drop: int = 0
    """Where width is short, columns go from 1 upwards; 0 stays."""
    is_name: bool = False
    """Layer names and prose: folded over several lines rather than cut."""


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
        widths = [self._width_of(i, console, options) for i in range(len(self.columns))]
        dropped = 0
        for dropped in range(max(column.drop for column in self.columns) + 1):
            kept = self._keep(dropped)
            if sum(widths[i] for i in kept) + _GAP * (len(kept) - 1) <= options.max_width:
                break
        yield self._build(self._keep(dropped))

    def _keep(self, dropped: int) -> list[int]:
        return [i for i, c in enumerate(self.columns) if not c.drop or c.drop > dropped]

    def _width_of(self, column: int, console: Console, options: ConsoleOptions) -> int:
        """Return what a column needs to show everything, names folded if they are long."""
        cells = [row[column] for row in self.rows] + [self.columns[column].title]
        wide = options.update(max_width=10_000)
        needs = [
            Measurement.get(console, wide, cell).minimum
            if isinstance(cell, Bar)
            else Measurement.get(console, wide, cell).maximum
            for cell in cells
        ]
        return min(max(needs), _NAME_WIDTH) if self.columns[column].is_name else max(needs)

    def _build(self, kept: Sequence[int]) -> Table:
        table = Table(
            box=_RULED if self.has_head else None,
            show_edge=False,
            show_header=self.has_head,
            header_style="dim",
            pad_edge=False,
            padding=(0, 1),
        )
        for i in kept:
            column = self.columns[i]
            table.add_column(
                Text(column.title),
                justify="right" if column.right else "left",
                # A bar may shrink; what else is neither name nor prose must not.
                no_wrap=not column.is_name
                and any(isinstance(row[i], str | Text) for row in self.rows[:1]),
                overflow="fold",
            )
        for number, row in enumerate(self.rows):
            before_total = number == len(self.rows) - self.ruled_off - 1 and self.ruled_off > 0
            cells = [Text(cell) if isinstance(cell, str) else cell for cell in row]
            table.add_row(*(cells[i] for i in kept), end_section=before_total)
        return table


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar, exact to an eighth of a character."""

    fraction: float
    """From 0 to 1."""
    colour: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it; with ``#`` where the output cannot show blocks."""
        width = min(options.max_width, _BAR_WIDTHS[1])
        eighths = max(round(self.fraction * width * 8), 1 if self.fraction > 0 else 0)
        whole, part = divmod(eighths, 8)
        if options.ascii_only:
            yield Text("#" * (whole + (part >= 4)), style=self.colour)
        else:
            yield Text("█" * whole + (_EIGHTHS[part] if part else ""), style=self.colour)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take the full width, so that bars of several tables compare."""
        least, most = _BAR_WIDTHS
        return Measurement(min(least, options.max_width), min(most, options.max_width))


def show_name(name: object) -> str:
    """Return text that came from a run with its control characters made visible.

    A layer's name is chosen by the traced program; it must not be able to steer the terminal.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))
