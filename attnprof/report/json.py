"""The report for programs: the numbers of the text, as plain JSON values; bytes are integers."""

import json
from dataclasses import asdict
from typing import Any

from attnprof.report.allocator_summary import describe_allocator
from attnprof.report.kv_json import describe_cache
from attnprof.report.summary import Summary

FORMAT_VERSION = 1
"""Raised when a key changes its meaning or goes away; new keys do not raise it."""


def render_json(summary: Summary) -> str:
    """Return the report as JSON text, two spaces deep."""
    return json.dumps(describe_summary(summary), indent=2, allow_nan=False)


def describe_summary(summary: Summary) -> dict[str, Any]:
    """Return the report as values that JSON knows.

    ``peak.by_category`` sums to ``peak.total_bytes``, and so do the ``size_bytes`` of ``holders``.
    """
    run, peak = summary.run, summary.peak
    return {
        "format_version": FORMAT_VERSION,
        "run": {
            "path": str(run.path),
            "status": str(run.status),
            **{key: run.info.get(key) for key in ("created", "ended", "error", "environment")},
            "snapshot": run.info.get("snapshot"),
        },
        "verdict": summary.verdict,
        "peak": {
            "device": peak.device,
            "step": peak.step,
            "phase": peak.phase,
            "layer": peak.layer,
            "op": peak.op,
            "time_ns": peak.time_ns,
            "total_bytes": peak.total_bytes,
            "by_category": summary.categories,
            "quadratic_bytes": sum(summary.quadratic.values()),
            "unattributed_bytes": summary.categories.get("unattributed", 0),
        },
        "holders": [asdict(holder) for holder in summary.holders],
        "advice": [asdict(advice) for advice in summary.advice],
        "layers": run.layers().to_dicts(),
        "kv_cache": describe_cache(summary.cache),
        **describe_allocator(summary.allocator),
        # Reports have no table of steps where nothing was allocated; a program can tell.
        "steps": (summary.run.steps if summary.steps.is_empty() else summary.steps).to_dicts(),
        "notes": [asdict(note) for note in summary.notes],
    }
