"""Derive from a run what the pages show, once, into files that can be mapped.

A run holds facts; what they mean takes seconds for a long one, and much memory. It is therefore
worked out once, in a process of its own where the run is long, and a server only maps the result.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from attnprof.analysis.growth import find_phase_peaks
from attnprof.analysis.timeline import list_changes
from attnprof.attribution.phases import PHASES
from attnprof.growth import Growth
from attnprof.report.json import describe_summary
from attnprof.report.summary import summarise
from attnprof.run import Run, load
from attnprof.store.lengths import GROWTH_FILE
from attnprof.vocabulary import Category
from attnprof_dashboard.data.outlook import describe_outlook
from attnprof_dashboard.data.segment_map import describe_allocator
from attnprof_dashboard.data.timeline_index import Changes, write_index

FORMAT = 8
"""Raised when the derived files change; older ones are then derived anew."""

FACTS_FILE = "facts.json"
HELD = "--held"
"""Given to this module as a program: its work is worth nothing without who started it."""
_BLOCK_COLUMNS = (
    "allocation_id", "device", "address", "size_bytes", "requested_bytes", "start_ns", "end_ns",
    "step", "phase", "layer", "op", "category", "role", "shape", "dtype", "saved", "exact", "start",
    "end",
)  # fmt: skip


def derive(path: Path, out: Path) -> None:
    """Write into ``out`` what pages show of the run in ``path``.

    Args:
        path: A run directory, or a sweep's.
        out: An empty directory. `FACTS_FILE` is written last: a directory that has it is whole.

    Raises:
        AttnprofError: The run cannot be read, or makes no sense.
    """
    if (path / GROWTH_FILE).exists():
        _write_facts(out, describe_outlook(Growth.load(path)))
        return
    run = load(path)
    names = run.allocations["device"].cast(pl.String).unique().sort().to_list()
    first = run.peak().device
    devices = sorted(names, key=lambda name: (name != first, name)) or [first]
    found = [_derive_device(run, name, out / f"device-{i}") for i, name in enumerate(devices)]
    _write_frame(out / "kv_cache.arrow", run.kv_cache())
    _write_frame(out / "kv_blocks.arrow", run.kv_blocks())
    _write_table(out / "samples.arrow", run.attribution.facts.stored.table("samples"))
    facts = {
        "status": run.status.value,
        "info": run.info,
        "is_dry": run.is_dry,
        "is_imported": run.is_imported,
        "has_lost_commits": run.has_lost_commits,
        "ops": int(run.attribution.facts.count),
        "devices": found,
        "growth": _find_growth(run),
    }
    _write_facts(out, facts)


def _write_facts(out: Path, facts: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **facts}, allow_nan=False)
    new = out / (FACTS_FILE + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(out / FACTS_FILE)


def _find_growth(run: Run) -> dict[str, Any] | None:
    """Return what the steps of a run say of its growth, if their lengths differ."""
    lengths = run.steps["seq_len"].drop_nulls().n_unique() if len(run.steps) else 0
    if lengths < 2:
        return None
    try:
        return describe_outlook(Growth.from_run(run))
    except ValueError:  # no two of the lengths can be compared
        return None


def _derive_device(run: Run, device: str, folder: Path) -> dict[str, Any]:
    """Write one device's files and return what is said about it in `FACTS_FILE`."""
    folder.mkdir()
    frame = run.attribution.allocations.filter(pl.col("device").cast(pl.String) == device)
    summary = summarise(run, device=device if len(frame) else None)
    categories = sorted(frame["category"].cast(pl.String).unique().to_list())
    _write_events(folder / "index", frame, categories)
    blocks = frame.sort("start", "allocation_id").select(_BLOCK_COLUMNS)
    _write_frame(folder / "blocks.arrow", blocks)
    for name in ("start", "end"):
        np.save(folder / f"{name}.npy", blocks[name].to_numpy().astype(np.int64))
    _write_frame(folder / "spans.arrow", _find_spans(run))
    _write_frame(folder / "steps.arrow", summary.steps)
    _write_frame(folder / "peaks.arrow", find_phase_peaks(frame))
    said = describe_summary(summary)
    del said["steps"]  # many; they are in a table of their own
    return {
        "name": device,
        "categories": categories,
        "blocks": len(frame),
        "summary": said,
        "allocator": describe_allocator(run, device, frame),
        "counters": [
            {
                "counter": r.counter,
                "replayed_bytes": r.replayed_bytes,
                "counted_bytes": r.counted_bytes,
            }
            for r in run.reconciliation()
            if r.device == device
        ],
        "inferred": _sum_by(frame.filter(~pl.col("exact")), "category"),
        "unattributed": _sum_by(
            frame.filter(pl.col("category").cast(pl.String) == Category.UNATTRIBUTED.value), "op"
        ),
    }


def _write_events(folder: Path, frame: pl.DataFrame, categories: Iterable[str]) -> None:
    names = list(categories)
    changes = list_changes(frame)
    number = changes["category"].replace_strict(
        names, list(range(len(names))), return_dtype=pl.Int64
    )
    columns = (changes["order"], changes["time_ns"], changes["change"], number)
    write_index(folder, Changes(*(c.cast(pl.Int64).to_numpy() for c in columns)), names)


def _find_spans(run: Run) -> pl.DataFrame:
    """Return the stretches of one phase: columns phase, begin_ns, end_ns."""
    times = run.attribution.facts.time_ns
    codes = run.attribution.timeline.phase[: len(times)]
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    begin = times[np.maximum(first - 1, 0)]  # an op's time is when it returned
    end = np.append(begin[1:], times[-1:])
    words = [PHASES[code].value for code in codes[first].tolist()]
    return pl.DataFrame(
        {"phase": words, "begin_ns": begin, "end_ns": end[: len(begin)]},
        schema={"phase": pl.String, "begin_ns": pl.Int64, "end_ns": pl.Int64},
    )


def _sum_by(frame: pl.DataFrame, column: str) -> list[dict[str, Any]]:
    """Return blocks and bytes per word of a column, most bytes first."""
    return (
        frame.group_by(pl.col(column).cast(pl.String))
        .agg(blocks=pl.len(), size_bytes=pl.col("size_bytes").sum())
        .sort("size_bytes", column, descending=[True, False], nulls_last=True)
        .head(50)
        .to_dicts()
    )


def _write_frame(file: Path, frame: pl.DataFrame) -> None:
    _write_table(file, frame.to_arrow(compat_level=pl.CompatLevel.oldest()))


def _write_table(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _end_with_parent(out: Path) -> None:
    """Wait until the server that holds the other end of standard input is gone, then end too."""
    while os.read(0, 1):  # not through sys.stdin, whose lock an exiting interpreter needs
        pass
    shutil.rmtree(out.parent, ignore_errors=True)
    os._exit(1)


def main() -> None:
    """Derive as a program: a run directory and where to write, then perhaps `HELD`."""
    path, out = (Path(text) for text in sys.argv[1:3])
    if HELD in sys.argv[3:]:
        threading.Thread(target=_end_with_parent, args=(out,), daemon=True).start()
    derive(path, out)


if __name__ == "__main__":
    main()
