"""Rows for every table of a run, and runs made of them; no torch."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from attnprof.store import RunWriter
from attnprof.store.schema import TABLES
from attnprof.vocabulary import Status

Columns = dict[str, dict[str, list[Any]]]


def make_rows(name: str, count: int, *, start: int = 0) -> dict[str, list[Any]]:
    """Return ``count`` rows of a table, every value different from its neighbours."""
    makers: dict[str, Any] = {
        "string": lambda i: f"word {i} é",
        "bool": lambda i: i % 2 == 0,
        "list<item: int64>": lambda i: list(range(i % 4)),
    }
    return {
        field.name: [
            makers.get(str(field.type), lambda i: i % 100)(i) for i in range(start, start + count)
        ]
        for field in TABLES[name]
    }


def make_commits(count: int, *, rows: int = 5) -> list[Columns]:
    """Return commits that add ``rows`` rows to every table."""
    return [
        {name: make_rows(name, rows, start=rows * number) for name in TABLES}
        for number in range(count)
    ]


def write_run(
    path: Path, commits: list[Columns], *, status: Status = Status.COMPLETED, **info: Any
) -> Path:
    """Write a run of ``commits`` and close it."""
    path.mkdir(parents=True, exist_ok=True)
    writer = RunWriter(path, info)
    for columns in commits:
        writer.commit(columns)
    writer.close(status)
    return path


def as_table(name: str, commits: list[Columns]) -> pa.Table:
    """Return what a table should hold after ``commits``."""
    schema = TABLES[name]
    parts = [pa.table(columns[name], schema=schema) for columns in commits if name in columns]
    return pa.concat_tables(parts) if parts else schema.empty_table()
