"""What a trace refuses: one clear error, nothing overwritten, and the next trace works."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnprof
from attnprof import AttnprofError
from attnprof.errors import CaptureError
from tests.capture.remains import list_remains


@pytest.fixture(autouse=True)
def tracing_works_afterwards() -> Any:
    """Whatever a test here did, nothing remains and a new trace runs."""
    before = list_remains()
    yield
    assert list_remains() == before
    with attnprof.trace() as tracer:
        torch.ones(3)
    assert tracer.run.peak().total_bytes == 3 * 4


def begin(directory: Any) -> None:
    """Begin a trace that must not begin."""
    with attnprof.trace(directory):
        pytest.fail("the trace began")


def test_trace_inside_a_trace_is_refused() -> None:
    with attnprof.trace() as outer:
        torch.ones(3)
        with pytest.raises(CaptureError, match=r"already running .* do not nest.*tracer.step\(\)"):
            begin(None)
        torch.ones(5)
    assert outer.run.peak().total_bytes == 5 * 4
    assert len(outer.run.allocations) == 2


def test_trace_inside_a_trace_is_told_where_that_one_records(tmp_path: Path) -> None:
    with (
        attnprof.trace(tmp_path / "outer"),
        pytest.raises(CaptureError, match=f"in this process, into {tmp_path / 'outer'}; traces"),
    ):
        begin(None)


def test_trace_inside_itself_is_refused() -> None:
    with attnprof.trace() as tracer, pytest.raises(CaptureError, match="already running"):
        tracer.__enter__()


def test_refused_inner_trace_takes_no_directory(tmp_path: Path) -> None:
    with attnprof.trace(), pytest.raises(CaptureError):
        begin(tmp_path / "inner")
    assert not (tmp_path / "inner").exists()


def test_trace_is_no_decorator(tmp_path: Path) -> None:
    decorate: Any = attnprof.trace(tmp_path / "run")
    with pytest.raises(TypeError, match=r"is no decorator, .* inside of the function"):
        decorate(lambda: None)
    assert not (tmp_path / "run").exists()


def test_tracer_is_not_used_twice() -> None:
    with attnprof.trace() as tracer:
        torch.ones(3)
    with pytest.raises(CaptureError, match=r"has ended; make a new one"), tracer:
        pytest.fail("the trace began")
    assert tracer.run.peak().total_bytes == 3 * 4


def test_tracer_may_be_used_again_after_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    tracer = attnprof.trace(tmp_path / "run")
    with pytest.raises(CaptureError):
        tracer.__enter__()
    (tmp_path / "run").unlink()
    with tracer:
        torch.ones(3)
    assert attnprof.load(tmp_path / "run").peak().total_bytes == 3 * 4


def test_run_is_not_there_before_the_trace_begins() -> None:
    with pytest.raises(CaptureError, match="has not begun"):
        _ = attnprof.trace().run


def test_run_is_not_there_after_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    tracer = attnprof.trace(tmp_path)
    with pytest.raises(CaptureError):
        tracer.__enter__()
    with pytest.raises(CaptureError, match="has not begun"):
        _ = tracer.run


def test_run_may_be_read_while_tracing() -> None:
    with attnprof.trace() as tracer:
        torch.ones(3)
        assert tracer.run.peak().total_bytes == 3 * 4
        torch.ones(5)
    assert tracer.run.peak().total_bytes == 5 * 4


def test_step_before_the_trace_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"tracer.step\(\) was called outside of the 'with'"):
        attnprof.trace().step()


def test_step_after_the_trace_is_refused() -> None:
    with attnprof.trace() as tracer:
        pass
    with pytest.raises(CaptureError, match="outside of the 'with' block"):
        tracer.step()


def make_file(folder: Path) -> Path:
    (folder / "file").write_text("kept")
    return folder / "file"


def make_path_below_file(folder: Path) -> Path:
    return make_file(folder) / "run"


def make_full_directory(folder: Path) -> Path:
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("kept")
    return folder / "full"


def make_dangling_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link"


def make_unwritable(folder: Path) -> Path:
    return Path("/proc/attnprof-run")  # not even root may make a directory there


def make_existing_unwritable(folder: Path) -> Path:
    return Path("/proc/self/task") / str(os.getpid()) / "attr"


def make_unspeakable(folder: Path) -> Path:
    return folder / "a\0b"


def make_too_long(folder: Path) -> Path:
    return folder / ("n" * 300)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_file, "is a file; give a new directory"),
        (make_path_below_file, "is a file; give a new directory"),
        (make_full_directory, r"not empty \(it holds 'notes.txt'\) and nothing is overwritten"),
        (make_dangling_link, "is a file; give a new directory"),
        (make_unwritable, "give a directory you may write"),
        (make_existing_unwritable, "cannot record into"),
        (make_unspeakable, "embedded null byte; give a directory by a name without it"),
        (make_too_long, "File name too long; give a directory you may write"),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_directory_that_cannot_hold_a_run_is_refused(
    make: Callable[[Path], Path], words: str, as_text: bool, tmp_path: Path
) -> None:
    directory = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CaptureError, match=words) as caught:
        begin(str(directory) if as_text else directory)
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_directory_of_a_run_is_not_recorded_into_again(tmp_path: Path) -> None:
    with attnprof.trace(tmp_path):
        torch.ones(3)
    with pytest.raises(CaptureError, match="not empty"):
        begin(tmp_path)
    assert attnprof.load(tmp_path).peak().total_bytes == 3 * 4


def test_directory_that_is_empty_is_taken(tmp_path: Path) -> None:
    with attnprof.trace(tmp_path):
        torch.ones(3)
    assert attnprof.load(tmp_path).peak().total_bytes == 3 * 4


def test_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    with attnprof.trace(str(tmp_path / "a" / "b" / "c")):
        torch.ones(3)
    assert attnprof.load(tmp_path / "a" / "b" / "c").peak().total_bytes == 3 * 4


def test_directory_is_found_when_the_program_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with attnprof.trace("run") as tracer:
        monkeypatch.chdir(tmp_path / "elsewhere")
        torch.ones(3)
    assert tracer.run.peak().total_bytes == 3 * 4
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("directory", [3, b"run", ["run"], torch.ones(2), print])
def test_directory_of_another_type_is_refused(directory: Any) -> None:
    with pytest.raises(TypeError, match=r"takes the directory to write to, got \w+.*'with"):
        attnprof.trace(directory)


@pytest.mark.parametrize("path", [None, 3, b"run"])
def test_loading_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(TypeError, match=r"takes the directory of a run, got \w+; give a path"):
        attnprof.load(path)


@pytest.mark.parametrize("rate", [-1, -0.5, math.nan, math.inf])
def test_sampling_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="samples_per_second must be 0 or more and finite"):
        attnprof.trace(samples_per_second=rate)


@pytest.mark.parametrize("rate", ["10", None, [1]])
def test_sampling_rate_of_another_type_is_refused(rate: Any) -> None:
    with pytest.raises(TypeError, match=r"samples_per_second must be a number, got \w+"):
        attnprof.trace(samples_per_second=rate)


def test_tag_of_an_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown category 'cache'; expected one of .*kv_cache"):
        attnprof.tag(torch.ones(2), "cache")


def test_tag_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes a tensor, got list"):
        attnprof.tag([1.0], "kv_cache")  # type: ignore[arg-type]  # that is the point


def test_tag_of_a_layer_by_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got layer=3; expected a module path"):
        attnprof.tag(torch.ones(2), "kv_cache", layer=3)  # type: ignore[arg-type]  # the point


def test_tag_outside_of_a_trace_does_nothing() -> None:
    tensor = torch.ones(2)
    assert attnprof.tag(tensor, "kv_cache") is tensor


def test_errors_have_one_base() -> None:
    assert issubclass(CaptureError, AttnprofError)
