"""What a sweep notes in its directory: whose it is, and how every length went."""

from pathlib import Path
from typing import Any

from attnprof.capture.workload import MakeStep, identify, name_of
from attnprof.errors import CaptureError
from attnprof.store.lengths import (
    DRY_RUN,
    GROWTH_FILE,
    MEASURED,
    Length,
    StoredGrowth,
    read_growth,
    run_directory,
    write_growth,
)
from attnprof.store.writer import claim_directory
from attnprof.vocabulary import Status

FINISHED = (Status.COMPLETED, Status.OUT_OF_MEMORY)
"""How a length ends that need not be run again."""


class SweepJournal:
    """The growth.json of a sweep under way, written after every length."""

    def __init__(
        self, path: Path, make_step: MakeStep, settings: dict[str, dict[str, Any]]
    ) -> None:
        """Continue the sweep in ``path``, or begin one.

        Args:
            path: The sweep's directory.
            make_step: What it runs.
            settings: Per source, how.

        Raises:
            CaptureError: The directory holds something else, or another sweep.
            RunFormatError: Its growth.json is damaged.
        """
        self._path = path
        self._identity = identify(make_step)
        self._name = name_of(make_step)
        self._settings = settings
        self.lengths: dict[tuple[str, int], Length] = {}
        if not (path / GROWTH_FILE).exists():
            claim_directory(path)
            return
        before = read_growth(path)
        self._check_same(before)
        self._settings = before.settings | self._settings
        for length in before.lengths:
            self.lengths[length.source, length.seq_len] = length

    def _check_same(self, before: StoredGrowth) -> None:
        if self._identity is None:
            raise CaptureError(
                f"{self._path} holds a sweep of {before.make_step}, and nothing tells whether "
                f"{self._name} is the same function: it is a lambda, or holds objects; give "
                "another directory, or a function at the top level of a file"
            )
        if before.make_step != self._identity:
            raise CaptureError(
                f"{self._path} holds a sweep of {before.make_step}, not of {self._identity}; give "
                "another directory, or remove that one"
            )
        for source, settings in self._settings.items():
            other = before.settings.get(source, settings)
            if other != settings:
                raise CaptureError(
                    f"{self._path} holds {_NAMES[source]} with {_describe(other, settings)}, not "
                    f"with {_describe(settings, other)}, and the two cannot be compared; give "
                    "another directory, or the same settings"
                )

    def has(self, source: str, seq_len: int) -> bool:
        """Return whether a length is finished; one that failed is to be tried again."""
        length = self.lengths.get((source, seq_len))
        return length is not None and length.status in FINISHED

    def has_any(self, source: str) -> bool:
        """Return whether some length is finished."""
        return any(self.has(source, seq_len) for _, seq_len in self.lengths)

    def find_full(self, source: str, seq_len: int) -> int | None:
        """Return a shorter length that ran out of memory, if there is one."""
        return next(
            (
                length.seq_len
                for length in self.lengths.values()
                if length.source == source
                and length.seq_len < seq_len
                and length.status == Status.OUT_OF_MEMORY
            ),
            None,
        )

    def add(self, length: Length) -> None:
        """Note how a length went."""
        self.lengths[length.source, length.seq_len] = length
        listed = tuple(self.lengths[key] for key in sorted(self.lengths))
        write_growth(self._path, StoredGrowth(self._identity or self._name, self._settings, listed))

    def directory_of(self, source: str, seq_len: int) -> Path:
        """Return where the run of a length is to be."""
        return run_directory(self._path, source, seq_len)


_NAMES = {MEASURED: "measured runs", DRY_RUN: "dry runs"}


def _describe(settings: dict[str, Any], other: dict[str, Any]) -> str:
    """Return in words what is not the same in two settings, as the first has it."""
    return ", ".join(
        f"{name} {'not given' if settings.get(name) is None else settings.get(name)}"
        for name in sorted({*settings, *other})
        if settings.get(name) != other.get(name)
    )
