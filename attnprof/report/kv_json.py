"""A run's KV cache for programs: plain JSON values; bytes are integers."""

import json
from dataclasses import asdict
from typing import Any

from attnprof.analysis.cache_forms import list_forms
from attnprof.report.cache_summary import CacheSummary

FORMAT_VERSION = 1
"""Raised when a key changes its meaning or goes away; new keys do not raise it."""


def render_kv_json(summary: CacheSummary | None) -> str:
    """Return the cache as JSON text: its rows, and its largest state in other forms."""
    layers = summary.layers if summary is not None else []
    values = {
        "format_version": FORMAT_VERSION,
        "rows": summary.frame.to_dicts() if summary is not None else [],
        "held_bytes": sum(layer.held_bytes for layer in layers),
        "bytes_per_token": sum(layer.bytes_per_token for layer in layers),
        **describe_peaks(summary),
        "forms": [
            {"name": f.name, "held_bytes": f.held_bytes, "bytes_per_token": f.bytes_per_token}
            for f in list_forms(layers)
        ],
    }
    return json.dumps(values, indent=2, allow_nan=False)


def describe_peaks(summary: CacheSummary | None) -> dict[str, Any]:
    """Return what caches cost for a moment, and what fixed lengths would make of the peaks."""
    frame = None if summary is None else summary.frame
    return {
        "growing_bytes": 0 if frame is None else frame["growing_bytes"].max(),
        "expanded_bytes": 0 if frame is None else frame["expanded_bytes"].max(),
        "fixed_length": [] if summary is None else [asdict(peaks) for peaks in summary.fixed],
        "times": asdict(summary.times) if summary is not None and summary.times else None,
    }
