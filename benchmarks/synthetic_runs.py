"""Long runs without the hours: real steps of a real training, repeated in the tables.

A few steps of a tiny GPT-2 are recorded; the last of them is then written again and again, with its
op numbers, storages, module calls and times moved on, until the run has as many events (allocations
and frees) as were asked for. The result is a run directory like any other: it is attributed, not
faked.

    python benchmarks/synthetic_runs.py runs/1m --events 1M
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from attnprof.store import open_run
from attnprof.store.schema import NO_NODE, OPTIMIZER_END
from attnprof.store.writer import RunWriter, claim_directory
from attnprof.vocabulary import Status

Columns = dict[str, dict[str, np.ndarray]]

_RECORDED_STEPS = 5
_STEPS_AT_ONCE = 100
"""Steps in one commit."""
_COUNTED = ("op", "enter_op", "exit_op")
_TIMED = ("time_ns", "enter_ns", "exit_ns")


@dataclass(frozen=True)
class Period:
    """What one step adds, and where its rows lie in the recorded tables."""

    ops: int
    storages: int
    scopes: int
    sequence: int
    nanoseconds: int
    first_storage: int
    """Storages below were made before all steps alike."""
    first_scope: int
    first_sequence: int


def record(directory: Path) -> None:
    """Record a few steps of a tiny GPT-2."""
    import torch
    from workloads import make_gpt2

    import attnprof

    torch.set_num_threads(1)
    step = make_gpt2(layers=4, width=32, heads=2, seq_len=32, batch=2, vocabulary=64)
    step()  # the optimizer makes its state
    with attnprof.trace(directory, samples_per_second=0):
        for _ in range(_RECORDED_STEPS):
            step()


def repeat(source: Path, target: Path, events: int) -> int:
    """Write a run with at least so many events into a new directory; return how many it has.

    Args:
        source: What `record` wrote.
        target: A new or empty directory.
        events: How many allocations and frees it is to have.
    """
    stored = open_run(source)
    tables = {name: stored.table(name) for name in stored.good_bytes}
    ends = _find_step_ends(tables)
    before, begin, end = ends[-3], ends[-2], ends[-1]
    period = _measure(tables, before, begin, end)
    head = {name: _rows(tables, name, 0, end) for name in tables}
    step = {name: _rows(tables, name, begin, end) for name in _STEPWISE if name in tables}
    per_step = len(step["storage_events"]["op"])
    count = max(1, -(-(events - len(head["storage_events"]["op"])) // per_step))
    claim_directory(target)
    writer = RunWriter(target, {k: v for k, v in stored.info.items() if k not in _OWN_INFO})
    writer.commit(head)
    for first in range(1, count + 1, _STEPS_AT_ONCE):
        numbers = np.arange(first, min(first + _STEPS_AT_ONCE, count + 1))
        writer.commit({name: _move(name, step[name], period, numbers) for name in step})
    writer.close(Status.COMPLETED)
    return len(head["storage_events"]["op"]) + count * per_step


_STEPWISE = ("ops", "operands", "storage_events", "scopes", "marks", "identities")
"""Tables that grow with every step; the others are dictionaries."""
_OWN_INFO = ("schema_version", "status", "created", "ended", "writer")


def _find_step_ends(tables: Mapping[str, pa.Table]) -> list[int]:
    """Return the op numbers at which the optimizer's steps ended."""
    marks = tables["marks"]
    kind, op = marks["kind"].to_numpy(), marks["op"].to_numpy()
    return sorted({int(number) for number in op[kind == OPTIMIZER_END]})


def _measure(tables: Mapping[str, pa.Table], before: int, begin: int, end: int) -> Period:
    """Return what one step adds.

    Raises:
        ValueError: The last two steps are not alike, so repeating one would make no run.
    """
    if end - begin != begin - before:
        raise ValueError(f"the last steps have {begin - before} and {end - begin} ops")
    firsts = [
        [_first(tables, name, column, at) for at in (before, begin, end)]
        for name, column in (("storage_events", "storage"), ("scopes", "scope"), ("ops", "seq"))
    ]
    for numbers in firsts:
        if numbers[1] - numbers[0] != numbers[2] - numbers[1]:
            raise ValueError(f"the last steps are not alike: {numbers}")
    storages, scopes, sequence = firsts
    times = tables["ops"]["time_ns"].to_numpy()
    return Period(
        ops=end - begin,
        storages=storages[2] - storages[1],
        scopes=scopes[2] - scopes[1],
        sequence=sequence[2] - sequence[1],
        nanoseconds=int(times[end - 1] - times[begin - 1]),
        # What the step before made may still be read and freed in this one.
        first_storage=storages[0],
        first_scope=scopes[0],
        first_sequence=sequence[0],
    )


def _first(tables: Mapping[str, pa.Table], name: str, column: str, op: int) -> int:
    """Return the first number that is free once ``op`` ops have finished."""
    rows = _rows(tables, name, 0, op)[column]
    return int(rows.max()) + 1 if len(rows) else 0


def _rows(tables: Mapping[str, pa.Table], name: str, begin: int, end: int) -> dict[str, np.ndarray]:
    """Return the rows of a table that belong to the ops from ``begin`` up to ``end``."""
    table = tables[name]
    columns = {c: table[c].to_numpy(zero_copy_only=False) for c in table.column_names}
    if name == "ops":
        picked = np.arange(len(table))[begin:end]
    elif name == "operands":
        widths = tables["ops"]["n_in"].to_numpy() + tables["ops"]["n_out"].to_numpy()
        rows = np.concatenate([[0], np.cumsum(widths)])
        picked = np.arange(rows[begin], rows[end])
    elif name == "scopes":
        picked = np.flatnonzero((columns["exit_op"] > begin) & (columns["exit_op"] <= end))
    elif name in ("storage_events", "marks", "identities"):
        # What happens as the last op returns has its number; the optimizer's end closes the step.
        picked = np.flatnonzero((columns["op"] > begin) & (columns["op"] <= end))
        if not begin:
            picked = np.flatnonzero(columns["op"] <= end)
    else:
        picked = np.arange(len(table))
    return {column: values[picked] for column, values in columns.items()}


def _move(
    name: str, rows: Mapping[str, np.ndarray], period: Period, numbers: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the rows of one step, moved on by several numbers of steps, one after the other."""
    moved: dict[str, np.ndarray] = {}
    for column, values in rows.items():
        each = np.tile(values, len(numbers))
        step = np.repeat(numbers, len(values))
        for mask, amount in _list_moves(name, column, each, period):
            each = np.where(mask, each + step * amount, each)
        moved[column] = each
    return moved


def _list_moves(
    name: str, column: str, values: np.ndarray, period: Period
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield which values of a column move on with every step, and by how much."""
    everything = np.ones(len(values), np.bool_)
    if column in _TIMED:
        yield everything, period.nanoseconds
    elif column in _COUNTED:
        yield everything, period.ops
    elif column == "storage":
        yield values >= period.first_storage, period.storages
    elif column in ("scope", "parent"):
        yield values >= period.first_scope, period.scopes
    elif column == "seq":
        yield values >= period.first_sequence, period.sequence
    elif column == "node" and name == "ops":
        yield (values != NO_NODE) & (values >= period.first_sequence), period.sequence


def read_count(text: str) -> int:
    """Return a count such as ``"10M"``: thousands and millions, not powers of two."""
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    return int(text[:-1]) * factor if factor > 1 else int(text)


def make_run(target: Path, events: int) -> int:
    """Record, repeat, and return how many events the run has."""
    with tempfile.TemporaryDirectory(prefix="attnprof-synthetic-") as scratch:
        record(Path(scratch) / "run")
        return repeat(Path(scratch) / "run", target, events)


def main() -> None:
    """Write a run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="a new or empty directory")
    parser.add_argument("--events", type=read_count, default=1_000_000, metavar="N")
    options = parser.parse_args()
    events = make_run(options.directory, options.events)
    size = sum(f.stat().st_size for f in options.directory.rglob("*") if f.is_file())
    print(f"{events:,} events, {size / 2**20:,.0f} MiB in {options.directory}")


if __name__ == "__main__":
    main()
