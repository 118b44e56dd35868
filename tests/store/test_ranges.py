"""Damaged numbers in whole tables: every question is answered, or refused in one line."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attnprof
from attnprof.cli import main
from attnprof.errors import AttnprofError, RunFormatError
from attnprof.interop.exporting import FORMATS
from attnprof.report.html import render_html
from attnprof.report.json import render_json
from attnprof.report.summary import summarise
from attnprof.report.text import render_text
from attnprof.store import RunWriter, open_run
from attnprof.store.schema import TABLES
from attnprof.vocabulary import Status

Columns = dict[str, dict[str, list[Any]]]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (1, n, 8) -> (1, n, 8)
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Columns:
    """The tables of a run of two steps of training."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    model = nn.Sequential(Attention(), Attention())
    with attnprof.trace(path, samples_per_second=0) as tracer:
        for _ in range(2):
            model(torch.randn(1, 6, 8)).sum().backward()
            tracer.step()
    stored = open_run(path)
    return {name: stored.table(name).to_pydict() for name in TABLES}


def write_changed(path: Path, columns: Columns, table: str, column: str, row: int, to: Any) -> Path:
    """Write the run with another value in one place."""
    changed = [*columns[table][column]]
    changed[row] = to
    path.mkdir()
    writer = RunWriter(path, {})
    writer.commit({**columns, table: {**columns[table], column: changed}})
    writer.close(Status.COMPLETED)
    return path


@pytest.mark.parametrize(
    ("table", "column", "value", "words"),
    [
        ("storage_events", "size_bytes", -4, "size_bytes of storage_events has -4"),
        ("storage_events", "storage", -1, "storage of storage_events has -1"),
        ("storage_events", "storage", 2**31 - 1, "storage of storage_events has 2147483647"),
        ("storage_events", "kind", 9, "kind of storage_events has 9, expected from 0 to 3"),
        ("storage_events", "op", 2**40, "op of storage_events has 1099511627776"),
        ("storage_events", "device", -1, "a storage that is on no device"),
        ("storage_events", "device", 1, "device of storage_events has 1, expected from -1 to 0"),
        ("operands", "storage", 2**20, "storage of operands has 1048576"),
        ("operands", "signature", 2**20, "signature of operands has 1048576"),
        ("ops", "code", -1, "code of ops has -1"),
        ("ops", "n_out", 7, r"ops count \d+ operands, and there are \d+"),
        ("scopes", "exit_op", 2**40, "exit_op of scopes has"),
        ("scopes", "parent", 2**10, "a module call that was made in a later one"),
        ("scopes", "module", 2**10, "module of scopes has 1024"),
        ("modules", "root", 1, "a root that is no module"),
        ("identities", "storage", 2**20, "storage of identities has 1048576"),
        ("signatures", "shape", [-8], "shape of signatures has -8"),
        ("marks", "op", -3, "op of marks has -3"),
    ],
)
def test_number_that_leads_nowhere_is_refused_in_one_line(
    table: str, column: str, value: Any, words: str, columns: Columns, tmp_path: Path
) -> None:
    if (table, column) == ("modules", "root"):  # else all numbers up to the highest are modules
        columns = {**columns, "modules": {**columns["modules"], "module": [0, 2, 3, 4, 5]}}
    path = write_changed(tmp_path / "run", columns, table, column, 0, value)
    with pytest.raises(RunFormatError, match=f"tables are damaged: .*{words}.*; copy") as caught:
        attnprof.load(path).peak()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command", ["report", "kv", "what-if", *(f"export --to {name}" for name in FORMATS)]
)
def test_every_command_says_so(
    command: str, columns: Columns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_changed(tmp_path / "run", columns, "storage_events", "size_bytes", 0, -4)
    verb, *options = command.split()
    assert main([verb, str(path), *options]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith(f"attnprof: cannot read {path}: its tables are damaged: size_bytes of")


def test_program_that_goes_on_while_facts_are_written_is_no_damage(
    columns: Columns, tmp_path: Path
) -> None:
    # A thread frees a storage after more ops than the commit has, which count as those to come.
    ops = len(columns["ops"]["code"])
    path = write_changed(tmp_path / "run", columns, "storage_events", "op", -1, ops + 5)
    assert attnprof.load(path).peak().total_bytes


def ask_everything(path: Path) -> None:
    run = attnprof.load(path)
    summary = summarise(run)
    for render in (render_text, render_json, render_html):
        render(summary)
    run.kv_cache()
    run.advice()
    for chosen in FORMATS.values():
        chosen.render(run)


@given(data=st.data())
@settings(max_examples=60)
def test_any_number_is_answered_or_refused(
    data: st.DataObject, columns: Columns, tmp_path_factory: pytest.TempPathFactory
) -> None:
    numeric = [
        (name, field.name, field.type)
        for name, schema in TABLES.items()
        for field in schema
        if pa.types.is_integer(field.type) and columns[name][field.name]
    ]
    table, column, kind = data.draw(st.sampled_from(numeric))
    most = 2 ** (kind.bit_width - 1)
    row = data.draw(st.integers(0, len(columns[table][column]) - 1))
    value = data.draw(st.integers(-most, most - 1) | st.integers(-3, 40))
    path = tmp_path_factory.mktemp("changed") / "run"
    write_changed(path, columns, table, column, row, value)
    line = ""
    try:
        ask_everything(path)
    except (AttnprofError, ValueError) as error:
        line = str(error)
    assert "\n" not in line
