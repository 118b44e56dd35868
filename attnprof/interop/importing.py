"""Make a run of a memory snapshot."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from attnprof.analysis.allocator.history import (
    KINDS,
    OOM,
    OTHER,
    SEGMENT_GIVEN,
    SEGMENT_TAKEN,
    find_orphans,
)
from attnprof.analysis.allocator.segments import cut
from attnprof.errors import SnapshotError
from attnprof.interop.snapshot import Block, Ints, Segment, Snapshot, Trace, read_snapshot
from attnprof.interop.unpickle import load_plain, without_garbage_collection
from attnprof.store.process import describe_process
from attnprof.store.schema import (
    ANNOTATIONS,
    FRAMES,
    JOURNAL_FILE,
    PRIVATE_SEGMENTS,
    RUN_FILE,
    SEED,
    SEGMENT_SEED,
    SHARED_POOL,
    TABLES_DIR,
)
from attnprof.store.writer import RunWriter, claim_directory
from attnprof.units import format_bytes
from attnprof.vocabulary import Status


def import_snapshot(path: Path, directory: Path) -> None:
    """Make a run of the snapshot in a file.

    Args:
        path: What ``torch.cuda.memory._dump_snapshot()`` wrote, gzipped or not.
        directory: Where the run goes; new or empty.

    Raises:
        SnapshotError: The file is no snapshot, is damaged, or would do more than hold data.
        CaptureError: The directory holds something, or cannot be written.
        OSError: The file cannot be read or the disk is full. Nothing of the run is left then.
    """
    with without_garbage_collection():
        data = load_plain(path)
        try:
            snapshot = read_snapshot(data)
        except SnapshotError as problem:
            raise SnapshotError(f"{path}: {problem}") from None
        del data
    histories = list(_list_histories(snapshot))
    if not any(len(history.action) for history in histories):
        raise SnapshotError(
            f"{path} holds no blocks and no events; call "
            "torch.cuda.memory._record_memory_history() before what you want to see, and "
            "torch.cuda.memory._dump_snapshot() after it"
        )
    ended, error = _find_ending(snapshot.traces)
    with _begin_run(directory, _describe(path, snapshot)) as writer:
        writer.commit(
            {
                "devices": {"name": [f"cuda:{history.device}" for history in histories]},
                "frames": _to_columns(FRAMES, snapshot.stacks.frames),
                "stacks": {"frames": _to_lists(snapshot.stacks.stacks)},
                "annotations": _to_columns(ANNOTATIONS, _renumber(snapshot.annotations, histories)),
            }
        )
        count = 0
        for position, history in enumerate(histories):
            count += len(history.action)
            segments = [each for each in snapshot.segments if each.device == history.device]
            private = _list_private(segments, position, count)
            writer.commit(history.make_tables(position) | private)
        writer.close(ended, **({"error": error} if error else {}))


@contextmanager
def _begin_run(directory: Path, info: dict[str, Any]) -> Iterator[RunWriter]:
    """Yield the writer of a run. If that fails, nothing is left in the way of another attempt."""
    was_there = directory.exists()
    claim_directory(directory)
    with ExitStack() as undo:
        if not was_there:
            undo.callback(_remove, directory.rmdir)
        for name in (JOURNAL_FILE, RUN_FILE, f"{RUN_FILE}.new"):
            undo.callback(_remove, (directory / name).unlink)
        undo.callback(shutil.rmtree, directory / TABLES_DIR, ignore_errors=True)
        writer = RunWriter(directory, info)
        undo.callback(writer.abandon)  # else what is still buffered would fail to be written, too
        yield writer
        undo.pop_all()


def _remove(remove: Callable[[], None]) -> None:
    with suppress(OSError):
        remove()


@dataclass(frozen=True, slots=True)
class _History:
    """The events of one device with what was there before, as columns."""

    device: int
    action: list[str]
    address: Ints
    size_bytes: Ints
    stream: Ints
    time_ns: Ints
    stack: Ints
    category: list[str | None]
    metadata: list[str | None]

    def make_tables(self, position: int) -> dict[str, dict[str, Any]]:
        """Return the columns of the tables, for the device at a row of `devices`."""
        count = len(self.action)
        actions = pa.array(self.action, pa.string())
        return {
            "allocator_events": {
                "device": np.full(count, position),
                "action": actions,
                "address": self.address,
                "size_bytes": self.size_bytes,
                "stream": self.stream,
                "time_ns": self.time_ns,
                "op": np.full(count, -1),
            },
            "allocator_contexts": {
                "stack": self.stack,
                "category": self.category,
                "metadata": self.metadata,
            },
        }


def _list_private(
    segments: list[Segment], position: int, count: int
) -> dict[str, dict[str, list[int]]]:
    """Return the table of private segments, of those at the end of a device's trace.

    Args:
        segments: The device's.
        position: Its row of `devices`.
        count: How many rows `allocator_events` has up to there.
    """
    private = [each for each in segments if each.pool != SHARED_POOL]
    number_of = {pool: n for n, pool in enumerate(dict.fromkeys(s.pool for s in private), start=1)}
    rows = [
        (count, position, each.address, each.size_bytes, number_of[each.pool]) for each in private
    ]
    return {"private_segments": _to_columns(PRIVATE_SEGMENTS, rows)} if rows else {}


def _list_histories(snapshot: Snapshot) -> Iterator[_History]:
    """Yield the history of each device that has one, seeds first."""
    traces = {trace.device: trace for trace in snapshot.traces}
    devices = {trace.device for trace in snapshot.traces if trace.action}
    devices |= {segment.device for segment in snapshot.segments}
    for device in sorted(devices):
        trace = traces.get(device) or Trace.empty(device)
        kind = np.array([KINDS.get(action, OTHER) for action in trace.action], np.int64)
        segments = _undo_segments([s for s in snapshot.segments if s.device == device], kind, trace)
        blocks = _find_seeds(trace, kind, [b for b in snapshot.blocks if b.device == device])
        yield _prepend(trace, segments, blocks)


def _undo_segments(final: list[Segment], kind: Ints, trace: Trace) -> list[Segment]:
    """Return the segments that were there before the trace began, from those at its end."""
    spans = {segment.address: segment.address + segment.size_bytes for segment in final}
    stream_of = {segment.address: segment.stream for segment in final}
    rows = np.flatnonzero((kind == SEGMENT_TAKEN) | (kind == SEGMENT_GIVEN))
    for row in reversed(rows.tolist()):
        begin, size = int(trace.address[row]), int(trace.size_bytes[row])
        if kind[row] == SEGMENT_GIVEN:
            spans[begin] = begin + size
            stream_of[begin] = int(trace.stream[row])
        else:
            cut(spans, begin, begin + size)
    return [
        Segment(trace.device, begin, end - begin, stream_of.get(begin, 0))
        for begin, end in sorted(spans.items())
    ]


def _find_seeds(trace: Trace, kind: Ints, live: list[Block]) -> list[Block]:
    """Return the blocks that were live before the trace began.

    Those are blocks that it frees and did not allocate, and those that are live at its end and that
    it never speaks of.
    """
    orphans = find_orphans(kind, trace.address)
    columns = (trace.address, trace.size_bytes, trace.stream)
    seeds = [
        Block(trace.device, address, size, size, stream, -1, trace.category[row])
        for row, address, size, stream in zip(
            orphans.tolist(), *(column[orphans].tolist() for column in columns), strict=True
        )
    ]
    spoken_of = set(trace.address[(kind > OTHER) & (kind < OOM)].tolist())
    return seeds + [block for block in live if block.address not in spoken_of]


def _prepend(trace: Trace, segments: list[Segment], blocks: list[Block]) -> _History:
    count = len(segments) + len(blocks)
    first_ns = int(trace.time_ns[0]) if len(trace.time_ns) else 0

    def join(before: list[int], column: Ints) -> Ints:
        return np.concatenate([np.array(before, np.int64), column])

    both: list[Segment | Block] = [*segments, *blocks]
    sizes = [s.size_bytes for s in segments] + [b.requested_bytes for b in blocks]
    return _History(
        device=trace.device,
        action=[SEGMENT_SEED] * len(segments) + [SEED] * len(blocks) + trace.action,
        address=join([each.address for each in both], trace.address),
        size_bytes=join(sizes, trace.size_bytes),
        stream=join([each.stream for each in both], trace.stream),
        time_ns=join([first_ns] * count, trace.time_ns),
        stack=join([-1] * len(segments) + [block.stack for block in blocks], trace.stack),
        category=[None] * len(segments) + [block.category for block in blocks] + trace.category,
        metadata=[*[None] * count, *trace.metadata],
    )


_TELLING = ("alloc", "oom")
"""Events that tell whether a program went on after it had run out of memory."""


def _find_ending(traces: list[Trace]) -> tuple[Status, dict[str, str] | None]:
    """Return how the recorded program ended, and the error if it ran out of memory.

    It did if nothing was allocated after an allocation had failed; who catches the error goes on.
    """
    for trace in traces:
        told = (row for row in reversed(range(len(trace.action))) if trace.action[row] in _TELLING)
        last = next(told, -1)
        if last >= 0 and trace.action[last] == "oom":
            wanted, free = int(trace.size_bytes[last]), int(trace.address[last])
            message = (
                f"cuda:{trace.device} had no room for {format_bytes(wanted)}; the device had "
                f"{format_bytes(free)} free"
            )
            return Status.OUT_OF_MEMORY, {"type": "OutOfMemoryError", "message": message}
    return Status.COMPLETED, None


def _describe(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("attnprof")
    except PackageNotFoundError:
        ours = None
    return {
        "environment": {"attnprof": ours},
        "writer": describe_process(),
        "snapshot": {
            "file": path.name,
            "events": sum(len(trace.action) for trace in snapshot.traces),
            "has_segments": bool(snapshot.segments),
            "has_stacks": bool(snapshot.stacks.stacks),
            "sizes_are_exact": snapshot.has_block_sizes,
            "allocator_settings": snapshot.settings,
        },
    }


def _to_columns(schema: pa.Schema, rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(schema.names)}


def _to_lists(stacks: list[tuple[int, ...]]) -> pa.Array:
    """Return rows of numbers as lists; a million small tuples one by one would take seconds."""
    offsets = np.zeros(len(stacks) + 1, np.int32)
    np.cumsum([len(stack) for stack in stacks], out=offsets[1:])
    values = np.fromiter((n for stack in stacks for n in stack), np.int64, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _renumber(
    annotations: list[tuple[int, str, bool, int]], histories: list[_History]
) -> list[tuple[Any, ...]]:
    position = {history.device: i for i, history in enumerate(histories)}
    return [(position[d], *rest) for d, *rest in annotations if d in position]
