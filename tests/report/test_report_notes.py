"""What a report says of its own limits."""

import pytest
import torch
from torch import nn

import attnprof
from attnprof.capture import ops
from attnprof.report.notes import collect_notes
from attnprof.run import Run
from attnprof.store.writer import RunWriter
from tests.versions import needs_compiled_code


def note_subjects(run: Run) -> set[str]:
    return {note.subject for note in collect_notes(run, run.peak()) if note.is_warning}


def test_notes_say_what_an_opaque_layer_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_MADE_OF_OPS", frozenset())  # on CUDA it is one op
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        layer(torch.randn(2, 8, 16))
    assert note_subjects(tracer.run) == {"opaque"}


def test_notes_say_that_recording_stopped_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def record() -> Run:
        with attnprof.trace(samples_per_second=0) as tracer:
            torch.ones(3).exp()
            tracer.step()
            monkeypatch.setattr(RunWriter, "commit", fill_disk)
            torch.ones(5).exp()
        return tracer.run

    with pytest.warns(RuntimeWarning, match="stopped recording"):
        run = record()
    notes = collect_notes(run, run.peak())
    assert "stopped early (OSError: disk full)" in next(
        note.text for note in notes if note.subject == "recording"
    )


def fill_disk(*_args: object) -> None:
    raise OSError("disk full")


@needs_compiled_code
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_notes_say_what_compiled_code_hides() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager")
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(4, 8)).sum().backward()
    assert "compiled" in note_subjects(tracer.run)
