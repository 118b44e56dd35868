"""The example of a project with budgets: what its README says happens."""

import shutil
from pathlib import Path

import pytest
from plugin_models import Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "budgets"


def test_example_holds_but_for_the_test_that_fails_on_purpose(
    pytester: pytest.Pytester, run: Run
) -> None:
    shutil.copytree(EXAMPLE, pytester.path, dirs_exist_ok=True)
    result = run("-q", "--attnprof-compare", "main", "--attnprof-compare-fail", "peak:5%")
    result.assert_outcomes(passed=3, failed=1)
    readme = (EXAMPLE / "README.md").read_text()
    failure = [line[4:] for line in readme.splitlines() if "score matrix" in line or "MiB" in line]
    assert len(failure) == 2
    result.stdout.fnmatch_lines([line.replace("[", "[[]") for line in failure], consecutive=True)
    result.stdout.fnmatch_lines(
        ["*differ* from the baseline *main.json", "FAILED test_memory.py::test_dropout - *"]
    )
