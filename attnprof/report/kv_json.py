"""A run's KV cache for programs: plain JSON values; bytes are integers."""

import json
from dataclasses import asdict
from typing import Any

from attnprof.analysis.cache_forms import list_fits, list_forms, take_growing
from attnprof.report.cache_summary import CacheSummary

FORMAT_VERSION = 1
"""Raised when a key changes its meaning or goes away; new keys do not raise it."""


def render_kv_json(summary: CacheSummary | None, *, room_bytes: int | None = None) -> str:
    """Return the cache as JSON text: its rows, and its largest state in other forms.

    Args:
        summary: The run's caches; None where it has none.
        room_bytes: What a device has for caches; none for no answer to what fits into it.
    """
    layers = [] if summary is None else summary.layers
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "rows": [] if summary is None else summary.frame.to_dicts(),
        **(describe_cache(summary) or {"held_bytes": 0, "bytes_per_token": 0}),
        "weights_bytes": None if summary is None else summary.weights_bytes,
        "forms": [
            {"name": f.name, "held_bytes": f.held_bytes, "bytes_per_token": f.bytes_per_token}
            for f in list_forms(layers)
        ],
    }
    if room_bytes is not None:
        values["fits"] = [asdict(fit) for fit in list_fits(layers, room_bytes=room_bytes)]
    return json.dumps(values, indent=2, allow_nan=False)


def describe_cache(summary: CacheSummary | None) -> dict[str, Any] | None:
    """Return what caches hold and cost for a moment, and what fixed lengths would change."""
    if summary is None:
        return None
    layers, frame = take_growing(summary.layers), summary.frame
    return {
        "held_bytes": sum(layer.held_bytes for layer in summary.layers),
        "bytes_per_token": sum(layer.bytes_per_token for layer in layers),
        "predicted_bytes_per_token": _sum_known([x.predicted_bytes_per_token for x in layers]),
        "growing_bytes": frame["growing_bytes"].max(),
        "expanded_bytes": frame["expanded_bytes"].max(),
        "growth": summary.growth.to_dicts(),
        "fixed_length": [asdict(peaks) for peaks in summary.fixed],
        "times": None if summary.times is None else asdict(summary.times),
    }


def _sum_known(sizes: list[int | None]) -> int | None:
    """Return a sum, or None where a part of it is not known."""
    return None if None in sizes else sum(size for size in sizes if size is not None)
