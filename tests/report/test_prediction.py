"""A prediction: whether it fits, where the wall is, and what to believe of it."""

import io
import json
from dataclasses import replace

import pytest
from report_runs import MIB, make_peak
from rich.console import Console

from attnprof.analysis.laws import Law
from attnprof.analysis.wall import Wall
from attnprof.report.machine import Machine
from attnprof.report.prediction import (
    Horizon,
    Prediction,
    collect_prediction_notes,
    write_horizon,
    write_prediction_verdict,
)
from attnprof.report.prediction_json import render_prediction_json
from attnprof.report.prediction_text import render_prediction_text
from attnprof.report.summary import find_holders

WALL = Wall(
    seq_len=700, peak_bytes=511 * MIB, next_seq_len=701, next_bytes=513 * MIB,
    capacity_bytes=512 * MIB, by="fit", counts="reserved",
)  # fmt: skip


@pytest.fixture
def prediction() -> Prediction:
    """Two layers at n = 1024 that need 640 MiB of 512."""
    peak = make_peak(
        [("embed", "parameters", 88)] + [(f"h.{n}.attn", "softmax", 256) for n in range(2)]
    )
    law = Law(88 * MIB, 0.0, 512.0, 512, 1024, 0.0)
    return Prediction(
        name="train.py:make_step",
        seq_len=1024,
        machine=Machine("512 MiB", 512 * MIB, "cuda"),
        peak=peak,
        needed_bytes=640 * MIB,
        wanted_bytes=640 * MIB,
        holders=tuple(find_holders(peak)),
        horizon=Horizon(law, WALL),
        advice=(),
        about=("torch 2.13.0",),
        assumptions=("kernels were chosen as on compute capability 9.0",),
    )


def show(prediction: Prediction, width: int = 110) -> str:
    """Return the report as plain text."""
    file = io.StringIO()
    Console(file=file, width=width, markup=False, highlight=False).print(
        render_prediction_text(prediction)
    )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def test_verdict_says_how_much_is_missing(prediction: Prediction) -> None:
    assert not prediction.fits
    assert write_prediction_verdict(prediction) == (
        "n = 1,024 does not fit on 512 MiB: it needs 640.0 MiB and 512.0 MiB are available, "
        "128.0 MiB too few."
    )


@pytest.mark.parametrize("needed", [512 * MIB, 511 * MIB])
def test_what_is_not_more_than_there_is_fits(needed: int, prediction: Prediction) -> None:
    fitting = replace(prediction, needed_bytes=needed)
    assert fitting.fits
    assert " fits on 512 MiB" in write_prediction_verdict(fitting)
    assert "to spare." in write_prediction_verdict(fitting)


def test_tight_fit_says_what_the_allocator_would_rather_have(prediction: Prediction) -> None:
    tight = replace(prediction, needed_bytes=500 * MIB)
    notes = {note.subject: note.text for note in collect_prediction_notes(tight)}
    assert notes["tight"].endswith("it would rather have 640.0 MiB")
    assert "tight" not in {note.subject for note in collect_prediction_notes(prediction)}


def test_horizon_says_law_and_wall(prediction: Prediction) -> None:
    assert write_horizon(prediction) == (
        "Around n = 1,024 the peak is 512 n² bytes + 88.0 MiB; "
        "the longest sequence that fits is n = 700."
    )


def test_horizon_says_why_there_is_no_wall(prediction: Prediction) -> None:
    unknown = replace(prediction, horizon=Horizon(None, None, "other ops run at n = 512"))
    assert write_horizon(unknown) == "No wall is known: other ops run at n = 512."


def test_horizon_says_when_nothing_fits(prediction: Prediction) -> None:
    law = prediction.horizon.law
    nothing = replace(prediction, horizon=Horizon(law, replace(WALL, seq_len=0)))
    assert write_horizon(nothing).endswith("; no length fits.")


def test_notes_name_evidence_and_assumptions(prediction: Prediction) -> None:
    notes = {note.subject: note.text for note in collect_prediction_notes(prediction)}
    assert notes["wall"] == WALL.sentence
    assert notes["assumed"] == "kernels were chosen as on compute capability 9.0"
    assert "kernels take inside" in notes["dry run"]


@pytest.mark.parametrize("width", [60, 80, 110])
def test_text_has_verdict_holders_and_wall(width: int, prediction: Prediction) -> None:
    text = show(prediction, width)
    whole = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    assert write_prediction_verdict(prediction) in whole
    assert write_horizon(prediction) in whole
    assert "h.[0-1].attn ×2" in text
    assert "nothing that attnprof knows of would lower it" in whole


def test_json_agrees_with_itself(prediction: Prediction) -> None:
    report = json.loads(render_prediction_json(prediction))
    assert report["margin_bytes"] == -128 * MIB
    assert report["horizon"]["coefficients"] == [88 * MIB, 0, 512]
    assert report["horizon"]["wall"]["seq_len"] == 700
    assert sum(report["peak"]["by_category"].values()) == report["peak"]["total_bytes"]
    assert sum(h["size_bytes"] for h in report["holders"]) == report["peak"]["total_bytes"]
