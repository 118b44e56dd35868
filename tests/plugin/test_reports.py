"""What a session writes: table, JSON, HTML and JUnit."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from plugin_models import BATCH, HEADS, LAYERS, Run

import attnprof

N = 32
SOFTMAX = 4 * BATCH * HEADS * N * N
PROGRAM = f"""
    import pytest
    from plugin_models import make_gpt2, train

    @pytest.mark.memory_budget("1 GiB")
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_step(attention, request):
        request.node.user_properties.append(("own", 1))
        train(make_gpt2(attention), {N})

    @pytest.mark.memory_growth([16, 32, 64], category="softmax", at_most="linear")
    def test_growth(seq_len):
        train(make_gpt2(), seq_len)

    def test_unmarked():
        pass

    @pytest.mark.memory_budget("1 GiB")
    def test_fails():
        raise RuntimeError
"""


def test_session_writes_table_json_pages_and_junit(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_a=PROGRAM)
    result = run(
        "-q", "--attnprof", "--attnprof-json", "out/measured.json", "--attnprof-html", "pages",
        "--junitxml", "junit.xml",
    )  # fmt: skip
    result.assert_outcomes(passed=3, failed=2)
    check_table(result)
    check_json(pytester)
    check_pages(pytester, result)
    check_junit(pytester)


def check_table(result: pytest.RunResult) -> None:
    result.stdout.fnmatch_lines(
        [
            "*= memory (attnprof) =*",
            " * peak  attention scores * softmax  saved softmax  kv cache  leaked  growth",
            "test_a.py::test_growth[[]growth]  * softmax n^2.00",
            f"test_a.py::test_step[[]eager]  * KiB * {LAYERS * SOFTMAX // 1024}.0 KiB * -",
            "test_a.py::test_step[[]sdpa] * KiB * - * - * - * - * -",
            "wrote */out/measured.json: 3 tests",
            "wrote */pages: 3 pages, and the runs they show",
        ]
    )
    result.stdout.no_fnmatch_line("test_a.py::test_unmarked*")


def check_json(pytester: pytest.Pytester) -> None:
    tests = json.loads((pytester.path / "out/measured.json").read_text())["tests"]
    assert tests["test_a.py::test_growth[growth]"]["laws"] == {"softmax": "n^2.00"}
    eager, sdpa = (tests[f"test_a.py::test_step[{a}]"]["bytes"] for a in ("eager", "sdpa"))
    assert eager["saved_softmax"] == LAYERS * SOFTMAX
    assert "saved_softmax" not in sdpa


def check_pages(pytester: pytest.Pytester, result: pytest.RunResult) -> None:
    pages = sorted(path.name for path in (pytester.path / "pages").glob("*.html"))
    stems = [re.sub(r"-[0-9a-f]{8}\.html$", "", page) for page in pages]
    assert stems == [
        "test_a.py-test_growth-growth", "test_a.py-test_step-eager", "test_a.py-test_step-sdpa",
    ]  # fmt: skip
    assert "softmax" in (pytester.path / "pages" / pages[1]).read_text()
    result.stdout.fnmatch_lines([f"To see every byte: attnprof report pages/runs/{pages[0][:-5]}"])
    run = attnprof.load(pytester.path / "pages" / "runs" / pages[1][:-5])
    assert run.peak().total_bytes > LAYERS * SOFTMAX


def check_junit(pytester: pytest.Pytester) -> None:
    cases = ET.parse(pytester.path / "junit.xml").getroot().iter("testcase")
    found = {
        case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in cases
    }
    assert found["test_step[eager]"].items() >= {
        ("own", "1"),
        ("attnprof_saved_softmax_bytes", str(LAYERS * SOFTMAX)),
    }
    assert found["test_growth[growth]"]["attnprof_softmax_growth"] == "n^2.00"
    assert found["test_unmarked"] == found["test_fails"] == {}


def test_nothing_is_printed_or_written_without_options(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_a=PROGRAM)
    result = run("-q", "-k", "sdpa", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*attnprof*")
    left = {path.name for path in pytester.path.iterdir()} - {"__pycache__"}
    assert left == {"test_a.py"}


def test_table_says_when_nothing_was_measured(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile("def test_x(): pass")
    result = run("-q", "--attnprof")
    result.stdout.fnmatch_lines(["no test with a memory marker was measured"])
    result = run("-q", "--attnprof", "--collect-only")
    result.stdout.no_fnmatch_line("no test with*")
