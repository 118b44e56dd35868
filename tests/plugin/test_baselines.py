"""Baselines: files to commit, and what fails or is told when measurements differ from them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_models import Run

from attnprof.pytest_plugin.baselines import Baseline, Result, compare, read_thresholds
from attnprof.pytest_plugin.marks import LIMITS

NAMES = st.sampled_from(LIMITS)
TESTS = st.text(st.characters(codec="utf-8"), max_size=20)
SIZES = st.dictionaries(NAMES, st.integers(0, 2**50))
RESULTS = st.builds(Result, SIZES, st.dictionaries(NAMES, st.text(max_size=5)))
BASELINES = st.builds(
    Baseline,
    st.dictionaries(st.text(max_size=5), st.text(max_size=5)),
    st.dictionaries(TESTS, RESULTS),
)

PROGRAM = """
    import os
    import pytest, torch

    SIZE = int(os.environ.get("SIZE", 1000))

    @pytest.mark.memory_budget("1 MiB")
    def test_one():
        torch.ones(SIZE)

    @pytest.mark.memory_budget("1 MiB")
    def test_two():
        torch.ones(1000).softmax(0)

    def test_unmarked():
        torch.ones(1000)
"""
FOLDER = "attnprof-baselines"


@pytest.fixture
def saved(pytester: pytest.Pytester, run: Run) -> Path:
    """The file of a baseline named main."""
    pytester.makepyfile(PROGRAM)
    result = run("-q", "--attnprof-save", "main")
    result.assert_outcomes(passed=3)
    path = pytester.path / FOLDER / "main.json"
    result.stdout.fnmatch_lines(["*= memory (attnprof) =*", f"wrote {path}: 2 tests"])
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_saved_file_is_the_same_again_and_sorted(saved: Path, run: Run) -> None:
    text = saved.read_text()
    content = json.loads(text)
    assert [*content["environment"]] == [
        "attnprof", "device", "machine", "python", "torch", "transformers",
    ]  # fmt: skip
    one = "test_saved_file_is_the_same_again_and_sorted.py::test_one"
    assert content["tests"][one]["bytes"]["peak"] == 4 * 1000
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    run("-q", "--attnprof-save", "main")
    assert saved.read_text() == text


def test_save_of_some_tests_keeps_the_others(saved: Path, run: Run) -> None:
    before = saved.read_text()
    edit(saved, '"peak": 4000,', '"peak": 3000,')
    result = run("-q", "-k", "one", "--attnprof-save", "main")
    result.stdout.fnmatch_lines(
        [
            f"kept in {saved}: 1 test (*::test_two) that did not run now; to forget what is gone, "
            "delete the file and save again",
            f"wrote {saved}: 2 tests",
        ]
    )
    assert saved.read_text() == before


def test_save_does_not_mix_environments(saved: Path, run: Run) -> None:
    edit(saved, '"machine": "', '"machine": "other-')
    before = saved.read_text()
    result = run("-q", "-k", "one", "--attnprof-save", "main")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            f"not saved: {saved} was made elsewhere (machine other-* -> *), and 1 test (*test_two) "
            "in it did not run now, so it would mix the two; run all, or delete the file first"
        ]
    )
    assert saved.read_text() == before
    run("-q", "--attnprof-save", "main").stdout.fnmatch_lines([f"wrote {saved}: 2 tests"])
    assert saved.read_text() != before


def test_save_of_nothing_writes_nothing(saved: Path, run: Run) -> None:
    text = saved.read_text()
    for name in ("main", "other"):
        result = run("-q", "-k", "unmarked", "--attnprof-save", name)
        assert result.ret == pytest.ExitCode.OK
        result.stdout.fnmatch_lines(
            [f"*{FOLDER}/{name}.json was left as it is: no test with a memory marker was measured"]
        )
    assert saved.read_text() == text
    assert [*saved.parent.iterdir()] == [saved]


def test_compare_says_that_nothing_changed(saved: Path, run: Run) -> None:
    result = run("-q", "--attnprof-compare", "main", "--attnprof-compare-fail", "peak:0,leaked:0")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines([f"0 values differ from the baseline {saved}"])


def test_compare_fails_above_a_threshold(
    saved: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIZE", "1100")
    args = ["-q", "--attnprof-compare", "main", "--attnprof-compare-fail"]
    run(*args, "peak:10%,softmax:0").assert_outcomes(passed=3)
    result = run(*args, "peak:9.9%,softmax:0")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "peak was 4.3 KiB, baseline 3.9 KiB and 9.9 % more: 4 B (0.091 %) too much "
            "[[]--attnprof-compare-fail]",
            "*4.3 KiB  temporaries, made by aten::ones",
            "To see every byte: attnprof report *",
            f"2 values differ from the baseline {saved}",
            "  *::test_one: peak 3.9 KiB -> 4.3 KiB (+400 B, +10.0 %)",
        ]
    )
    run(*args, "temporaries: 399 B").assert_outcomes(passed=2, failed=1)
    run(*args, "temporaries: 400 B").assert_outcomes(passed=3)


def test_compare_says_where_environments_differ(
    saved: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(saved, '"torch": "', '"torch": "1.')
    monkeypatch.setenv("SIZE", "1001")
    result = run("-q", "--attnprof-compare", "main", "--attnprof-compare-fail", "peak:0")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "    the baseline was made elsewhere: torch 1.* -> *",
            "the baseline was made elsewhere, and bytes may differ for that alone: torch 1.* -> *",
        ]
    )


def test_compare_shows_a_law_that_changed(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        test_a="""
        import os, pytest, torch

        @pytest.mark.memory_growth([16, 32, 64], at_most="quadratic")
        def test_x(seq_len):
            torch.ones(seq_len ** int(os.environ["POWER"]))
        """
    )
    monkeypatch.setenv("POWER", "1")
    run("-q", "--attnprof-save", "main").assert_outcomes(passed=1)
    monkeypatch.setenv("POWER", "2")
    run("-q", "--attnprof-compare", "main").stdout.fnmatch_lines(
        [
            "3 values differ from the baseline *",
            "  test_a.py::test_x[[]growth]: total grew as n^1.00, and now as n^2.00",
            "  test_a.py::test_x[[]growth]: peak 256 B -> 16.0 KiB *",
        ]
    )


def test_compare_names_tests_that_only_one_side_has(
    saved: Path, run: Run, pytester: pytest.Pytester
) -> None:
    edit(saved, "::test_one", "::test_gone")
    result = run("-q", "--attnprof-compare", f"{FOLDER}/main.json")
    result.stdout.fnmatch_lines(
        [
            "not in the baseline: 1 test (*::test_one); add with --attnprof-save",
            "in the baseline, but not measured now: 1 test (*::test_gone)",
        ]
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--attnprof-compare", "gone"], "there is no baseline *gone.json; make one with "),
        (["--attnprof-compare", " "], "--attnprof-compare needs a name, such as main"),
        (["--attnprof-compare-fail", "peak:0"], "needs --attnprof-compare NAME, the baseline"),
        (["--attnprof-save", "broken"], "--attnprof-save: cannot read the baseline *broken.json"),
        (["--attnprof-compare", "broken"], "cannot read *; restore it, or delete it and make it "),
        (["--attnprof-compare", "newer"], "--attnprof-compare: *newer.json*"),
        (["--attnprof-save", "/dev/zero"], "the baseline /dev/zero is no file; give the name of"),
        (["--attnprof-json", ""], "--attnprof-json needs a file"),
        (["--attnprof-html", " "], "--attnprof-html needs a directory"),
        (["--attnprof-html", "a.json/b"], "--attnprof-html: cannot make the directory *a.json/b: "),
        (["--attnprof-compare", "a", "--attnprof-compare-fail", "x:1"], "cannot read 'x:1' as a "),
        (["--attnprof-compare", "a", "--attnprof-compare-fail", "peak:1 X"], "cannot read '1 X' "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_used_are_usage_errors(
    pytester: pytest.Pytester, run: Run, args: list[str], message: str
) -> None:
    folder = pytester.mkdir(FOLDER)
    pytester.makefile(".json", a="")
    (folder / "broken.json").write_text("{")
    (folder / "newer.json").write_text('{"attnprof_baseline": 2, "environment": {}, "tests": {}}')
    pytester.makepyfile("def test_x(): raise SystemExit('it ran')")
    result = run("-q", *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *{message}*"])


def test_file_that_cannot_be_written_fails_the_session(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(PROGRAM)
    pytester.makefile(".txt", file="")
    result = run("-q", "--attnprof-json", "file.txt/out.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["cannot write *file.txt/out.json: File exists"])


def test_what_is_no_plain_file_is_written_through(pytester: pytest.Pytester, run: Run) -> None:
    """A link stays one, and a pipe stays a pipe."""
    pytester.makepyfile(PROGRAM)
    target, link = pytester.path / "target.json", pytester.path / "link.json"
    target.write_text("")
    link.symlink_to(target)
    run("-q", "--attnprof-json", "link.json").assert_outcomes(passed=3)
    assert link.is_symlink()
    assert len(Baseline.read(target).tests) == 2
    result = run("-q", "--attnprof-json", "/dev/full")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["cannot write /dev/full: No space left on device*"])
    assert Path("/dev/full").is_char_device()


@given(BASELINES)
def test_baseline_reads_what_it_wrote(
    tmp_path_factory: pytest.TempPathFactory, b: Baseline
) -> None:
    path = tmp_path_factory.getbasetemp() / "baseline.json"
    path.write_text(b.to_json(), encoding="utf-8")
    assert Baseline.read(path) == b


@given(BASELINES, BASELINES)
def test_compare_finds_every_value_that_differs(a: Baseline, b: Baseline) -> None:
    def differing() -> Iterator[tuple[str, str]]:
        for test in a.tests.keys() & b.tests.keys():
            old, new = a.tests[test].sizes, b.tests[test].sizes
            yield from ((test, n) for n in LIMITS if old.get(n, 0) != new.get(n, 0))

    found = compare(a, b)
    assert {(d.test, d.name) for d in found} == set(differing())
    assert len(found) == len({(d.test, d.name) for d in found})
    growths = [d.now - d.before for d in found]
    assert growths == sorted(growths, reverse=True)


@given(st.integers(0, 2**50), st.decimals(0, 300, places=2))
def test_percentage_is_exact(before: int, percent: object) -> None:
    (threshold,) = read_thresholds(f"peak:{percent}%", LIMITS)
    hundredths = int(percent * 100)  # type: ignore[operator]  # a Decimal
    assert threshold.limit(before) == before + before * hundredths // 10_000


def test_thresholds_are_read_in_any_spacing() -> None:
    thresholds = read_thresholds(" peak : 5 % , softmax:0,kv_cache:1 KiB", LIMITS)
    assert [(t.name, t.limit(1000)) for t in thresholds] == [
        ("peak", 1050), ("softmax", 1000), ("kv_cache", 2024),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "peak", "peak:", "peak:5%,", "peak:-1", "Peak:1", "per_layer:1"]
)
def test_thresholds_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        read_thresholds(text, LIMITS)


def test_thresholds_refuse_a_name_twice() -> None:
    with pytest.raises(ValueError, match="peak has two thresholds; give one"):
        read_thresholds("peak:1,peak:2", LIMITS)
