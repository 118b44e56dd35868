"""Give a run to other tools."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from attnprof.interop.memory_viz import render_memory_viz
from attnprof.interop.perfetto import render_perfetto
from attnprof.run import Run


@dataclass(frozen=True, slots=True)
class Format:
    """A format that runs are exported to."""

    suffix: str
    """Of file names. A run is often named as the snapshot it was made of, which stays."""
    render: Callable[[Run], str | bytes]
    opens_with: str
    """What reads it, in a few words."""


def render_parquet(run: Run) -> bytes:
    """Return the table `Run.allocations` as a Parquet file."""
    buffer = io.BytesIO()
    run.allocations.write_parquet(buffer)
    return buffer.getvalue()


def render_csv(run: Run) -> str:
    """Return the table `Run.allocations` as CSV; shapes are written as ``4x12x512x512``."""
    shape = pl.col("shape").cast(pl.List(pl.String)).list.join("x")
    return run.allocations.with_columns(shape).write_csv()


FORMATS = {
    "memory_viz": Format(".memory_viz.pickle", render_memory_viz, "https://pytorch.org/memory_viz"),
    "perfetto": Format(".perfetto.json", render_perfetto, "https://ui.perfetto.dev"),
    "parquet": Format(".parquet", render_parquet, "polars, pandas or DuckDB"),
    "csv": Format(".csv", render_csv, "anything that reads tables"),
}
"""Formats by name."""
