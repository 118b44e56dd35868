"""Beside other plugins, in worker processes, and where there is no torch."""

import json
import xml.etree.ElementTree as ET

import pytest
from plugin_models import Run

PROGRAM = """
    import pytest, torch

    @pytest.mark.memory_budget(400)
    @pytest.mark.parametrize("elements", [100, 101, 102])
    def test_one(elements):
        torch.ones(elements)

    @pytest.mark.memory_growth([16, 32, 64], at_most="constant")
    def test_growth(seq_len):
        torch.ones(seq_len)
"""
PEAKS = {
    "test_a.py::test_one[100]": 400,
    "test_a.py::test_one[101]": 404,
    "test_a.py::test_one[102]": 408,
    "test_a.py::test_growth[growth]": 256,
}


def test_two_workers_report_what_one_process_would(
    pytester: pytest.Pytester, run: Run, run_apart: Run
) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(test_a=PROGRAM)
    run("-q", "--attnprof-save", "main").assert_outcomes(passed=1, failed=3)
    saved = pytester.path / "attnprof-baselines/main.json"
    saved.write_text(saved.read_text().replace('"peak": 400', '"peak": 396'))
    result = run_apart(
        "-n", "2", "--attnprof", "--attnprof-json", "out.json", "--attnprof-html", "pages",
        "--attnprof-compare", "main", "--attnprof-compare-fail", "peak:0", "--junitxml", "j.xml",
    )  # fmt: skip
    result.assert_outcomes(failed=4)
    result.stdout.fnmatch_lines_random(
        [
            "peak was 404 B, limit 400 B: 4 B (1 %) too much [[]memory_budget]",
            "total grows as n^1.00 *, limit constant: it is linear, 4 n bytes [[]memory_growth]",
            "peak was 400 B, baseline 396 B and 0 B more: 4 B (1 %) too much *compare-fail]",
            "test_a.py::test_one[[]102] *408 B *",
            "1 value differs from the baseline *main.json",
            "To see every byte: attnprof report pages/runs/test_a.py-test_one-101-*",
        ]
    )
    tests = json.loads((pytester.path / "out.json").read_text())["tests"]
    assert {name: test["bytes"]["peak"] for name, test in tests.items()} == PEAKS
    properties = ET.parse(pytester.path / "j.xml").getroot().iter("property")
    peaks = [int(p.get("value", "")) for p in properties if p.get("name") == "attnprof_peak_bytes"]
    assert sorted(peaks) == sorted(PEAKS.values())
    assert len(list((pytester.path / "pages").glob("*.html"))) == len(PEAKS)


def test_group_of_xdist_is_not_part_of_a_test_in_baselines(
    pytester: pytest.Pytester, run: Run
) -> None:
    """With ``--dist=loadgroup`` workers append the group to the id, as the hook does here."""
    pytester.makeconftest(
        """
        def pytest_collection_modifyitems(items):
            for item in items:
                item._nodeid = f"{item.nodeid}@a_b"
        """
    )
    pytester.makepyfile(
        test_a="""
        import pytest, torch

        @pytest.mark.xdist_group("b")
        @pytest.mark.xdist_group(name="a")
        @pytest.mark.memory_budget(400)
        def test_one():
            torch.ones(100)
        """
    )
    run("-q", "--attnprof-json", "out.json").assert_outcomes(passed=1)
    assert [*json.loads((pytester.path / "out.json").read_text())["tests"]] == [
        "test_a.py::test_one"
    ]


def test_reruns_are_measured_anew(pytester: pytest.Pytester, run: Run) -> None:
    pytest.importorskip("pytest_rerunfailures")
    pytester.makepyfile(
        test_a="""
        import pytest, torch

        SIZES = [103, 102, 100]

        @pytest.mark.memory_budget(400)
        def test_one():
            torch.ones(SIZES.pop(0))
        """
    )
    result = run("--reruns", "2", "--attnprof-json", "out.json")
    result.stdout.fnmatch_lines(["*1 passed, 2 rerun*"])
    (test,) = json.loads((pytester.path / "out.json").read_text())["tests"].values()
    assert test["bytes"]["peak"] == 400


def test_without_the_plugin_markers_do_nothing(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    memory_budget: of attnprof\n")
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.mark.memory_budget(0, sofmax=0)
        def test_one():
            torch.ones(101)
        """
    )
    run("-q", "--strict-markers", "-p", "no:attnprof").assert_outcomes(passed=1)


def test_collecting_needs_no_torch(pytester: pytest.Pytester, run_apart: Run) -> None:
    """Nor what reads a run: all of it is imported when the first marked test runs."""
    pytester.makeconftest(
        """
        import sys

        for name in ("torch", "polars", "pyarrow", "numpy", "scipy"):
            sys.modules[name] = None  # importing it is an ImportError
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.memory_budget(peak="1 GiB")
        @pytest.mark.no_materialised_scores
        def test_marked():
            pass

        @pytest.mark.memory_growth([16, 32, 64], at_most="linear")
        def test_growth(seq_len):
            pass

        def test_unmarked():
            pass
        """
    )
    result = run_apart("-p", "no:hypothesispytest", "--strict-markers", "--attnprof")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["E *ModuleNotFoundError: import of *"])
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
