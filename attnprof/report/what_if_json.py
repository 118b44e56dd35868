"""What-ifs for programs: plain JSON values; bytes are integers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from attnprof.analysis.peak import Peak
from attnprof.analysis.what_if.advice import WhatIf

FORMAT_VERSION = 1
"""Raised when a key changes its meaning or goes away; new keys do not raise it."""


def render_what_ifs(what_ifs: Sequence[WhatIf], refused: Mapping[str, str], before: Peak) -> str:
    """Return what-ifs as JSON text, two spaces deep.

    Args:
        what_ifs: Each replayed by itself; one of them may be of several scenarios.
        refused: Why other scenarios do not apply, by name.
        before: The peak that was recorded.
    """
    values = {
        "format_version": FORMAT_VERSION,
        "device": before.device,
        "before": _describe_peak(before),
        "what_ifs": [_describe_what_if(what_if) for what_if in what_ifs],
        "not_applicable": dict(refused),
    }
    return json.dumps(values, indent=2, allow_nan=False)


def _describe_what_if(what_if: WhatIf) -> dict[str, Any]:
    return {
        "scenarios": list(what_if.scenarios),
        "saves_bytes": what_if.saves_bytes,
        "exact": what_if.exact,
        "after": _describe_peak(what_if.after),
        "changes": [asdict(change) for change in what_if.changes],
    }


def _describe_peak(peak: Peak) -> dict[str, Any]:
    return {
        "total_bytes": peak.total_bytes,
        "step": peak.step,
        "phase": peak.phase,
        "layer": peak.layer,
        "by_category": peak.by_category(),
    }
