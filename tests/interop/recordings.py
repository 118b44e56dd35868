"""Snapshots to import: recorded ones (``record.py`` says how), and pickles of any content."""

import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("recorded.json")
ENTRY = ("action", "addr", "size", "stream", "time_us", "frames")


@cache
def read_recordings() -> dict[str, dict[str, Any]]:
    """Return per case what was recorded, as it stands in the file."""
    recordings: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text())
    return recordings


def make_recorded(case: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a recorded snapshot in torch's form, and torch's own counters."""
    recording = read_recordings()[case]
    compact = recording["snapshot"]
    keys = ("filename", "line", "name")
    frames = [dict(zip(keys, frame, strict=True)) for frame in compact["frames"]]
    stacks = [[frames[number] for number in stack] for stack in compact["stacks"]]

    def expand(entry: list[Any]) -> dict[str, Any]:
        whole = dict(zip(ENTRY, entry, strict=True)) | {"frames": stacks[entry[-1]]}
        if whole["action"] == "oom":
            whole["device_free"] = whole.pop("addr")
        return whole | {"compile_context": "N/A", "user_metadata": "", "pool_id": (0, 0)}

    segments = [
        segment
        | {
            "frames": stacks[segment["frames"]],
            "segment_pool_id": tuple(segment["segment_pool_id"]),
            "blocks": [b | {"frames": stacks[b["frames"]]} for b in segment["blocks"]],
        }
        for segment in compact["segments"]
    ]
    snapshot = {
        "segments": segments,
        "device_traces": [list(map(expand, trace)) for trace in compact["device_traces"]],
        "allocator_settings": compact["allocator_settings"],
        "external_annotations": compact["external_annotations"],
    }
    return snapshot, recording["stats"]


def write_pickle(path: Path, value: object, *, protocol: int = 4) -> Path:
    """Write a pickle as ``torch.cuda.memory._dump_snapshot`` does, and return its path."""
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path
