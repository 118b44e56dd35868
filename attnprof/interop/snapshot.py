"""Read what a memory snapshot of PyTorch says into columns, after checking that it says it.

The format is that of ``torch.cuda.memory._snapshot()``:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/cuda/memory_snapshot.cpp and
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/cuda/Module.cpp. Keys that other
releases add are ignored, keys that older ones lack have defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from operator import itemgetter
from typing import Any

import numpy as np

from attnprof.errors import SnapshotError
from attnprof.store.schema import SHARED_POOL

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]

MARKER = "attnprof"
"""Key of a snapshot that attnprof exported: its events have the sizes of blocks."""
MOST_BYTES = 2**50
"""More than any device has. Sums of sizes stay within 64 bits."""
MOST_US = 2**53
"""Microseconds that are still 64 bits as nanoseconds."""
_MOST_CHARACTERS = 4096
"""Of a name; those of C++ templates are long."""
_NO_CONTEXT = ("", "N/A", None)


@dataclass(frozen=True, slots=True)
class Trace:
    """The events of one device, in order, as columns."""

    device: int
    action: list[str]
    address: Ints
    size_bytes: Ints
    stream: Ints
    time_ns: Ints
    stack: Ints
    category: list[str | None]
    metadata: list[str | None]

    @classmethod
    def empty(cls, device: int) -> "Trace":
        """Return the trace of a device that recorded nothing."""
        none = np.zeros(0, np.int64)
        return cls(device, [], none, none, none, none, none, [], [])


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a segment at the end of the trace."""

    device: int
    address: int
    size_bytes: int
    requested_bytes: int
    stream: int
    stack: int
    category: str | None


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment at the end of the trace."""

    device: int
    address: int
    size_bytes: int
    stream: int
    pool: tuple[int, int] = SHARED_POOL


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a snapshot says."""

    traces: list[Trace]
    segments: list[Segment]
    blocks: list[Block]
    """The blocks that were in use when the snapshot was taken."""
    stacks: "Stacks"
    settings: dict[str, Any]
    """``allocator_settings``, as far as they are text and numbers."""
    annotations: list[tuple[int, str, bool, int]]
    """Device, name, whether it begins there, and nanoseconds."""
    has_block_sizes: bool
    """Whether sizes of events are those of blocks, not of requests."""


@dataclass(slots=True)
class Stacks:
    """Call stacks and their frames, each once."""

    frames: list[tuple[str, int, str]] = field(default_factory=list)
    """File, line and function."""
    stacks: list[tuple[int, ...]] = field(default_factory=list)
    """Positions in `frames`, innermost first."""
    _number_of: dict[tuple[int, ...], int] = field(default_factory=dict)
    _frame_of: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _seen: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Stacks by the identities of their frames; the snapshot outlives this object's use."""
    _seen_frames: dict[int, int] = field(default_factory=dict)

    def add(self, frames: Any, where: str) -> int:
        """Return the number of a stack, -1 for none."""
        if not frames:
            return -1
        if type(frames) is not list:
            raise _wrong(f"{where}: frames", frames, "a list")
        identity = tuple(map(id, frames))
        number = self._seen.get(identity)
        if number is None:
            number = self._seen[identity] = self._add([self._add_frame(f, where) for f in frames])
        return number

    def add_all(self, lists: list[Any], where: str) -> Ints:
        """Return the number of each stack; a free often has the very list of its allocation."""
        identities = list(map(id, lists))
        number_of = {
            identity: self.add(frames, where)
            for identity, frames in dict(zip(identities, lists, strict=True)).items()
        }
        return np.array([number_of[identity] for identity in identities], np.int64)

    def _add(self, frames: list[int]) -> int:
        key = tuple(frames)
        number = self._number_of.get(key)
        if number is None:
            number = self._number_of[key] = len(self.stacks)
            self.stacks.append(key)
        return number

    def _add_frame(self, frame: Any, where: str) -> int:
        seen = self._seen_frames.get(id(frame))
        if seen is not None:
            return seen
        if type(frame) is not dict:
            raise _wrong(f"{where}: a frame", frame, "a dict")
        filename, line, name = (frame.get(key) for key in ("filename", "line", "name"))
        if type(filename) is not str or type(line) is not int or type(name) is not str:
            raise _wrong(f"{where}: a frame", frame, "a filename, a line and a name")
        content = (_to_text(filename), max(min(line, 2**31 - 1), -1), _to_text(name))
        number = self._frame_of.get(content)
        if number is None:
            number = self._frame_of[content] = len(self.frames)
            self.frames.append(content)
        self._seen_frames[id(frame)] = number
        return number


def read_snapshot(data: Any) -> Snapshot:
    """Return the content of a loaded snapshot as columns.

    Raises:
        SnapshotError: It has another form; the message says where and what was expected.
    """
    if type(data) is list:  # memory_snapshot(): segments alone
        data = {"segments": data, "device_traces": []}
    if type(data) is not dict or not {"segments", "device_traces"} & set(data):
        raise _wrong("the pickle", data, "a dict with segments and device_traces")
    stacks = Stacks()
    traces = _require(data.get("device_traces", []), list, "device_traces")
    segments, blocks = _read_segments(_require(data.get("segments", []), list, "segments"), stacks)
    settings = data.get("allocator_settings", {})
    return Snapshot(
        traces=[_read_trace(number, trace, stacks) for number, trace in enumerate(traces)],
        segments=segments,
        blocks=blocks,
        stacks=stacks,
        settings=_read_settings(settings) if type(settings) is dict else {},
        annotations=_read_annotations(data.get("external_annotations", [])),
        has_block_sizes=MARKER in data,
    )


def _read_trace(device: int, trace: Any, stacks: Stacks) -> Trace:
    where = f"device_traces[{device}]"
    entries = _require(trace, list, where)
    if not set(map(type, entries)) <= {dict}:
        raise _wrong(where, next(e for e in entries if type(e) is not dict), "dicts")
    try:
        action = list(map(itemgetter("action"), entries))
        # What ran out of memory has no address, but says how much the device had free.
        address = [e["addr"] if "addr" in e else e["device_free"] for e in entries]
        size = list(map(itemgetter("size"), entries))
    except KeyError as error:
        raise SnapshotError(
            f"the snapshot's {where} has an entry without {error}; expected action, addr and size"
        ) from None
    _require_all(action, str, f"{where}: action")
    words = {word: _to_text(word) for word in set(action)}
    times = [e.get("time_us", 0) for e in entries]
    return Trace(
        device=device,
        action=[words[word] for word in action],
        address=_to_ints(address, f"{where}: addr", least=0, most=2**62),
        size_bytes=_to_ints(size, f"{where}: size", least=0, most=MOST_BYTES),
        stream=_to_ints([e.get("stream", 0) for e in entries], f"{where}: stream"),
        time_ns=1000 * _to_ints(times, f"{where}: time_us", least=-MOST_US, most=MOST_US),
        stack=stacks.add_all([e.get("frames") for e in entries], where),
        category=_read_texts(entries, "category", where),
        metadata=_read_texts(entries, "user_metadata", where),
    )


def _read_texts(entries: Sequence[dict[str, Any]], key: str, where: str) -> list[str | None]:
    values = [e.get(key) for e in entries]
    kinds = set(map(type, values))
    if not kinds <= {str, type(None)}:
        raise _wrong(f"{where}: {key}", next(v for v in values if type(v) is not str), "text")
    words = {value: None if value in _NO_CONTEXT else _to_text(value) for value in set(values)}
    return [words[value] for value in values]


def _read_segments(segments: list[Any], stacks: Stacks) -> tuple[list[Segment], list[Block]]:
    found: list[Segment] = []
    blocks: list[Block] = []
    for number, segment in enumerate(segments):
        where = f"segments[{number}]"
        get = _getter(_require(segment, dict, where), where)
        device, stream = get("device", 0), get("stream", 0)
        address = get("address", None)
        pool = _read_pool(segment.get("segment_pool_id", SHARED_POOL), where)
        found.append(Segment(device, address, get("total_size", None), stream, pool))
        for block in _require(segment.get("blocks", []), list, f"{where}: blocks"):
            own = _getter(_require(block, dict, f"{where}: a block"), f"{where}: a block")
            size, state = own("size", None), block.get("state")
            address = own("address", address)
            if type(state) is not str:
                raise _wrong(f"{where}: state", state, "text")
            # Older releases keep the stack and the requested size in a history.
            history = block.get("history") or [{}]
            newest = history[0] if type(history) is list and type(history[0]) is dict else {}
            if state.startswith("active"):
                frames = block.get("frames", newest.get("frames"))
                requested = own("requested_size", newest.get("real_size", size))
                category = block.get("category")
                blocks.append(
                    Block(
                        device,
                        address,
                        size,
                        _require(requested, int, f"{where}: requested_size"),
                        stream,
                        stacks.add(frames, where),
                        _to_text(category) if type(category) is str else None,
                    )
                )
            address += size
    return found, blocks


def _read_pool(pool: Any, where: str) -> tuple[int, int]:
    if type(pool) not in (tuple, list) or [type(part) for part in pool] != [int, int]:
        raise _wrong(f"{where}: segment_pool_id", pool, "two whole numbers")
    first, second = pool
    return first, second


def _getter(entry: dict[str, Any], where: str) -> Callable[[str, Any], Any]:
    def get(key: str, default: Any) -> Any:
        value = entry.get(key, default)
        most = 2**15 if key == "device" else MOST_BYTES if "size" in key else 2**62
        if type(value) is not int or not 0 <= value < most:
            raise _wrong(f"{where}: {key}", value, f"a whole number below {most}")
        return value

    return get


def _read_settings(settings: dict[Any, Any]) -> dict[str, Any]:
    found = {}
    for key, value in settings.items():
        is_number = type(value) in (int, bool) or (type(value) is float and isfinite(value))
        if type(key) is str and (is_number or type(value) is str):
            found[_to_text(key)] = _to_text(value) if type(value) is str else value
    return found


def _read_annotations(entries: Any) -> list[tuple[int, str, bool, int]]:
    found = []
    for entry in entries if type(entries) is list else []:
        if type(entry) is not dict:
            continue
        device, name, time_us = (entry.get(key) for key in ("device", "name", "time_us"))
        if type(device) is not int or type(name) is not str or type(time_us) is not int:
            continue
        if 0 <= device < 2**15 and abs(time_us) < MOST_US:
            is_begin = entry.get("stage") == "START"
            found.append((device, _to_text(name), is_begin, 1000 * time_us))
    return found


def _to_text(text: str) -> str:
    """Return text as it can be stored: valid, and no longer than a name may reasonably be."""
    return text[:_MOST_CHARACTERS].encode("utf-8", "replace").decode()


def _to_ints(
    values: list[Any], where: str, *, least: int = -(2**63), most: int = 2**63 - 1
) -> Ints:
    _require_all(values, int, where)
    for extreme in (min(values, default=0), max(values, default=0)):
        if values and not least <= extreme <= most:
            raise _wrong(where, extreme, f"numbers from {least} to {most}")
    return np.array(values, np.int64)


def _require_all(values: list[Any], kind: type, where: str) -> None:
    if not set(map(type, values)) <= {kind}:
        raise _wrong(where, next(v for v in values if type(v) is not kind), kind.__name__)


def _require(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise _wrong(where, value, f"a {kind.__name__}")
    return value


def _wrong(where: str, got: Any, expected: str) -> SnapshotError:
    shown = repr(got) if type(got) in (str, int, float, bool, type(None)) else ""
    if type(got) is dict and expected.startswith("a dict"):  # with other keys, then
        shown = f"with {', '.join(map(repr, got))}" if got else "without keys"
    shown = f" {shown[:40]}" if shown else ""
    return SnapshotError(
        f"this is not a memory snapshot: {where} holds {type(got).__name__}{shown}, expected "
        f"{expected}; give a file that torch.cuda.memory._dump_snapshot() wrote"
    )
