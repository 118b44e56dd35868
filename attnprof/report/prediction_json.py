"""A prediction for programs: the numbers of the text, as plain JSON values."""

import json
from dataclasses import asdict
from typing import Any

from attnprof.report.growth_json import describe_wall
from attnprof.report.prediction import (
    Prediction,
    collect_prediction_notes,
    write_horizon,
    write_prediction_verdict,
)

FORMAT_VERSION = 1
"""Raised when a key changes its meaning or goes away; new keys do not raise it."""


def render_prediction_json(prediction: Prediction) -> str:
    """Return the prediction as JSON text, two spaces deep; bytes are integers."""
    return json.dumps(describe_prediction(prediction), indent=2, allow_nan=False)


def describe_prediction(prediction: Prediction) -> dict[str, Any]:
    """Return the prediction as values that JSON knows.

    ``peak.by_category`` sums to ``peak.total_bytes``, and so do the ``size_bytes`` of ``holders``.
    """
    peak, machine, horizon = prediction.peak, prediction.machine, prediction.horizon
    return {
        "format_version": FORMAT_VERSION,
        "name": prediction.name,
        "seq_len": prediction.seq_len,
        "verdict": write_prediction_verdict(prediction),
        "fits": prediction.fits,
        "device": machine.name,
        "capacity_bytes": machine.capacity_bytes,
        "reserved_bytes": prediction.needed_bytes,
        "margin_bytes": machine.capacity_bytes - prediction.needed_bytes,
        "peak": {
            "step": peak.step,
            "phase": peak.phase,
            "layer": peak.layer,
            "op": peak.op,
            "total_bytes": peak.total_bytes,
            "by_category": peak.by_category(),
        },
        "holders": [asdict(holder) for holder in prediction.holders],
        "horizon": {
            "sentence": write_horizon(prediction),
            "coefficients": None if horizon.law is None else list(horizon.law.coefficients),
            "wall": None if horizon.wall is None else describe_wall(horizon.wall),
            "why_no_wall": horizon.why_no_wall,
            "limit": None if horizon.limit is None else asdict(horizon.limit),
        },
        "advice": [asdict(advice) for advice in prediction.advice],
        "assumptions": list(prediction.assumptions),
        "notes": [asdict(note) for note in collect_prediction_notes(prediction)],
    }
