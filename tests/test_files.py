"""Files are written whole or not at all, and as readable as files are here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnprof.errors import CommandError
from attnprof.files import replace_file


@pytest.fixture(params=[0o022, 0o077], ids=["shared", "private"])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_new_file_is_as_readable_as_the_process_has_its_files(tmp_path: Path, mask: int) -> None:
    replace_file(tmp_path / "report.html", "é")
    assert (tmp_path / "report.html").read_bytes() == "é".encode()
    assert mode_of(tmp_path / "report.html") == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_file_that_is_replaced_stays_as_readable_as_it_was(
    tmp_path: Path, mask: int, mode: int
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    path.chmod(mode)
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert mode_of(path) == mode


def test_mask_that_all_threads_share_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[int] = []
    monkeypatch.setattr(os, "umask", changed.append)
    replace_file(tmp_path / "report.html", "new")
    assert changed == []


def test_what_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CommandError, match="No space left on device"):
        replace_file(tmp_path / "report.html", "new")
    assert list(tmp_path.iterdir()) == []
