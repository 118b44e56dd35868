"""The recorded runs, and what several tests ask of them."""

from collections.abc import Callable
from pathlib import Path

from attnprof.report.notes import Note
from attnprof.report.summary import summarise
from attnprof.run import Run

RECORDED = Path(__file__).with_name("recorded")
MIB = 2**20
VOCABULARY, WIDTH, LAYERS, HEADS, BATCH, LENGTH = 300, 96, 2, 4, 3, 80
SCORES = 4 * BATCH * HEADS * LENGTH * LENGTH

Load = Callable[[str], Run]


def rounded(size_bytes: int) -> int:
    return -(-size_bytes // 512) * 512


def notes_of(run: Run, subject: str) -> list[Note]:
    return [note for note in summarise(run).notes if note.subject == subject]
