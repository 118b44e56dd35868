"""`Table`: a chart's numbers as rows and columns, for the page and for a file alike."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""


class Unit(Enum):
    """How a column's values are read."""

    TEXT = auto()
    """A word or a few; not broken over lines."""
    NAME = auto()
    """The path of a module: it may be long."""
    PROSE = auto()
    CATEGORY = auto()
    BYTES = auto()
    COUNT = auto()
    SECONDS = auto()
    SHARE = auto()
    """From 0 to 1; shown in per cent."""
    BOOL = auto()


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    name: str
    """In the file: lower case, with the unit at its end."""
    unit: Unit = Unit.TEXT
    label: str = ""
    """On the page; without it the name in words."""

    @property
    def title(self) -> str:
        """What stands above the column."""
        return self.label or self.name.removesuffix("_bytes").replace("_", " ")

    @property
    def is_number(self) -> bool:
        """Whether values are aligned to the right."""
        return self.unit in (Unit.BYTES, Unit.COUNT, Unit.SECONDS, Unit.SHARE)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of values; sizes are whole bytes."""

    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, columns: Iterable[Column], records: Iterable[dict[str, Any]]) -> "Table":
        """Return a table of records, of which columns take what is under their name."""
        columns = tuple(columns)
        return cls(columns, [[record.get(c.name) for c in columns] for record in records])


def write_csv(table: Table) -> str:
    """Return a table as CSV: exact numbers, and no text that a spreadsheet would run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(column.name for column in table.columns)
    for row in table.rows:
        writer.writerow(_neutralise(value) for value in row)
    return out.getvalue()


@dataclass(frozen=True, slots=True)
class Link:
    """A value that leads to another page."""

    text: str
    href: str

    def __str__(self) -> str:
        return self.text


def _neutralise(value: Any) -> Any:
    if isinstance(value, Link):
        value = value.text
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return value
