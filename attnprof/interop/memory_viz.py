"""A run as a memory snapshot that https://pytorch.org/memory_viz opens, with our names in it.

Where a call stack would be, each block says its category, layer, op and phase. Addresses and
segments are not the run's: they are those that CUDA's caching allocator would choose on an empty
device, so that a run on the CPU or a dry run can be shown too.
"""

import pickle
from collections.abc import Iterator
from functools import cache
from typing import Any

import polars as pl

from attnprof.attribution.frames import OWN_FILES
from attnprof.interop.builder import SnapshotBuilder
from attnprof.interop.snapshot import MARKER
from attnprof.run import Run

PROTOCOL = 4
"""The newest pickle protocol that the page reads (``unpickle`` in torch/utils/viz/MemoryViz.js)."""
_ACCELERATOR = "cuda:"


def render_memory_viz(run: Run) -> bytes:
    """Return the run as a pickled snapshot."""
    return pickle.dumps(make_snapshot(run), protocol=PROTOCOL)


def make_snapshot(run: Run) -> dict[str, Any]:
    """Return the run in the form of ``torch.cuda.memory._snapshot()``.

    GPUs keep their numbers; the CPU and others come after them. Sizes of events are sizes of
    blocks, which `MARKER` says to `import_snapshot`.
    """
    builder = SnapshotBuilder()
    allocations = run.attribution.allocations
    names = sorted(allocations["device"].cast(pl.String).unique().to_list())
    for number, name in _number_devices(names).items():
        _replay(builder, number, allocations.filter(pl.col("device").cast(pl.String) == name))
    snapshot = builder.build()
    # The page colours by category and then needs the category "unknown" in a trace: without it, it
    # fails (``snapshot.categores`` in annotate_snapshot, torch 2.13).
    for trace in snapshot["device_traces"]:
        trace.insert(0, _make_mark(trace))
    return {**snapshot, MARKER: {"run": run.path.name}}


def _number_devices(names: list[str]) -> dict[int, str]:
    numbered = {int(n.removeprefix(_ACCELERATOR)): n for n in names if n.startswith(_ACCELERATOR)}
    for name in names:
        if not name.startswith(_ACCELERATOR):
            numbered[max(numbered, default=-1) + 1] = name
    return numbered


def _replay(builder: SnapshotBuilder, device: int, frame: pl.DataFrame) -> None:
    """Record the blocks of one device in the order of events."""

    @cache
    def make_stack(*words: str | None) -> list[dict[str, Any]]:
        pairs = zip(OWN_FILES, words, strict=True)
        return [{"filename": file, "line": 0, "name": word} for file, word in pairs if word]

    frame = frame.filter(pl.col("size_bytes") > 0).sort("start", "allocation_id")
    words = [frame[name].cast(pl.String).to_list() for name in OWN_FILES.values()]
    sizes = frame["size_bytes"].to_list()
    begins, ends = frame["start_ns"].to_list(), frame["end_ns"].to_list()
    addresses = [0] * len(frame)
    for row, is_born in _list_events(frame):
        if is_born:
            stack = make_stack(*(column[row] for column in words))
            addresses[row] = builder.allocate(
                sizes[row],
                device=device,
                time_us=begins[row] // 1000,
                frames=stack,
                category=words[0][row],
            )
        else:
            builder.free(addresses[row], device=device, time_us=ends[row] // 1000)


def _list_events(frame: pl.DataFrame) -> Iterator[tuple[int, bool]]:
    """Yield rows and whether they begin there, in order; at one position frees come first."""
    rows = frame.select(row=pl.int_range(pl.len()), start="start", end="end", ended="end_ns")
    born = rows.select("row", at="start", born=pl.lit(True))
    freed = rows.filter(pl.col("ended").is_not_null()).select("row", at="end", born=pl.lit(False))
    return pl.concat([freed, born]).sort("at", "born").select("row", "born").iter_rows()


def _make_mark(trace: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "action": "snapshot",
        "addr": 0,
        "size": 0,
        "stream": 0,
        "time_us": trace[0]["time_us"] if trace else 0,
        "frames": [],
        "category": "unknown",
    }
