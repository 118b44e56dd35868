"""Wrong markers are found when tests are collected, with the file and the line to mend."""

import re

import pytest
from plugin_models import Run

from attnprof.pytest_plugin.marks import Budget, GrowthLaw, Lengths, read_checks

WRONG = {
    "memory_budget()": "limits nothing; give a limit, such as peak='1.5 GiB'",
    "memory_budget(1, 2)": "takes one limit without a name, the peak",
    "memory_budget(1, peak=2)": "got the peak twice",
    "memory_budget(sofmax=0)": "there is no 'sofmax' to limit; there are peak, reserved, ",
    "memory_budget(peak=-1)": "peak: a size in bytes must not be negative, got -1",
    "memory_budget('-1 MiB')": "peak: cannot read '-1 MiB' as a size; expected a number with one",
    "memory_budget(softmax='4 MX')": "softmax: cannot read '4 MX' as a size",
    "memory_budget(peak=1.5e9)": "peak: a size in bytes must be an int or text .*, got 15000",
    "memory_budget(peak=True)": "peak: a size in bytes must be an int or text .*, got True",
    "memory_budget(per_layer=4)": "per_layer must be a dict such as {'softmax': '4 MiB'}, got 4",
    "memory_budget(per_layer={'peak': 4})": "there is no 'peak' to limit; there are saved_softmax",
    "memory_budget(per_layer={3: 4})": "there is no 3 to limit",
    "no_materialised_scores(1)": "takes no arguments",
    "memory_growth()": "missing a required argument: 'seq_lens'; write seq_lens=",
    "memory_growth([1, 2, 4])": "give either at_most, such as 'linear', or exponent",
    "memory_growth([1, 2, 4], at_most='linear', exponent=1)": "give either at_most",
    "memory_growth([1, 2, 4], at_most='cubic')": "at_most must be one of constant, linear, quad",
    "memory_growth([1, 2, 4], exponent='1')": "exponent must be a number, got '1'",
    "memory_growth([1, 2, 4], exponent=-1)": "exponent must be between 0 and 10, got -1",
    "memory_growth([1, 2, 4], exponent=float('nan'))": "exponent must be between 0 and 10",
    "memory_growth([1, 2], at_most='linear')": "must have three lengths or more, got .1, 2.: two",
    "memory_growth([2, 1, 2], at_most='linear')": "seq_lens has a length twice: .1, 2, 2.",
    "memory_growth([1, 2, 'x'], at_most='linear')": "cannot read 'x' as a sequence length",
    "memory_growth('1,2,4', at_most='linear')": "seq_lens must be a list such as",
    "memory_growth(8, at_most='linear')": "seq_lens must be a list such as .*, got 8",
    "memory_growth([1, 2, 4], at_most='linear', category='sofmax')": "no category 'sofmax'",
    "memory_growth([1, 2, 4], at_most='linear', make_step=3)": "make_step must be a function",
    "memory_growth([1, 2, 4], at_most='linear', make_step=len)": (
        "make_step cannot be called as make_step.seq_len, device.: too many positional arguments"
    ),
    "memory_growth([1, 2, 4], at_most='linear', make_step=print)": (
        "test_[0-9]+ takes seq_len, but make_step is what is run at every length"
    ),
    "memory_growth([1, 2, 4], at_most='linear', dry_run=1)": "dry_run must be True or False",
    "memory_growth([1, 2, 4], at_most='linear', device=1)": "unexpected keyword argument 'device'",
}

GROWTH = "memory_growth([1, 2, 4], at_most='linear')"
WRONG_TESTS = {
    "def test_x(): pass": "test_x must take seq_len as an argument without a default, or the ",
    "def test_x(seq_len=1): pass": "test_x must take seq_len as an argument without a default",
    "@pytest.mark.parametrize('a, seq_len', [(0, 1)])\ndef test_x(a, seq_len): pass": (
        "seq_len of test_x.0-1. is also set elsewhere"
    ),
    "def test_x(fixed, seq_len): pass": "the fixture 'fixed' takes seq_len, but is set up once",
    "@pytest.mark.memory_growth([1, 2, 8], exponent=1)\ndef test_x(seq_len): pass": (
        "the laws of one test must agree on seq_lens, make_step and dry_run"
    ),
}


def explain(items: list[pytest.Item]) -> dict[str, str]:
    """Return by the name of a test what is said to be wrong with its markers."""
    found = {}
    for item in items:
        with pytest.raises(pytest.UsageError) as raised:
            read_checks(item)
        found[item.name] = str(raised.value)
    return found


def test_wrong_arguments_say_what_is_expected(pytester: pytest.Pytester, options: None) -> None:
    source = "import pytest\n"
    for number, mark in enumerate(WRONG):
        arguments = "seq_len" if mark.startswith("memory_growth(") else ""
        source += f"@pytest.mark.{mark}\ndef test_{number}({arguments}): pass\n"
    found = explain(pytester.getitems(source))
    assert len(found) == len(WRONG)
    for number, (mark, text) in enumerate(WRONG.items()):
        name = mark.partition("(")[0]
        place = f"test_wrong_arguments_say_what_is_expected.py:{2 + 2 * number}"
        told = next(said for test, said in found.items() if test.split("[")[0] == f"test_{number}")
        assert re.match(f"{place}: {name}: .*{text.replace('(', '[(]')}", told), told


def test_growth_asks_for_a_test_that_takes_the_length(
    pytester: pytest.Pytester, options: None
) -> None:
    source = "import pytest\n@pytest.fixture\ndef fixed(seq_len): pass\n"
    for number, test in enumerate(WRONG_TESTS):
        source += f"@pytest.mark.{GROWTH}\n{test}\n".replace("test_x", f"test_{number}")
    found = explain(pytester.getitems(source))
    for (test, said), text in zip(found.items(), WRONG_TESTS.values(), strict=True):
        assert re.search(text.replace("test_x", test.split("[")[0]), said), said


def test_length_of_its_own_goes_with_make_step(pytester: pytest.Pytester, options: None) -> None:
    (item,) = pytester.getitems(
        """
        import pytest

        @pytest.mark.memory_growth([1, 2, 4], at_most="linear", make_step=print)
        @pytest.mark.parametrize("seq_len", [8])
        def test_x(seq_len):
            pass
        """
    )
    checks = read_checks(item)
    assert checks is not None
    assert not checks.runs_test_by_length


def test_dry_growth_refuses_a_coroutine(pytester: pytest.Pytester, options: None) -> None:
    marker = GROWTH.replace(")", ", dry_run=True)")
    source = f"import pytest\n@pytest.mark.{marker}\nasync def test_x(seq_len): pass\n"
    (item,) = pytester.getitems(source)
    with pytest.raises(pytest.UsageError, match="dry_run=True cannot run an async test"):
        read_checks(item)


def test_read_checks_joins_all_markers(pytester: pytest.Pytester, options: None) -> None:
    (item,) = pytester.getitems(
        """
        import pytest

        @pytest.mark.memory_budget("1.5 GiB", per_layer={"softmax": "4 MiB"})
        @pytest.mark.memory_growth(["1K", 512, "2048"], category="softmax", exponent=1.1)
        @pytest.mark.memory_growth([512, 1024, 2048], at_most="linear")
        @pytest.mark.no_materialised_scores
        def test_x(seq_len): pass
        """
    )
    checks = read_checks(item)
    assert checks is not None
    assert checks.budget == Budget({"peak": 3 * 2**29}, {"softmax": 4 * 2**20})
    assert set(checks.laws) == {
        GrowthLaw("softmax", None, 1.1),
        GrowthLaw("total", "linear", None),
    }
    assert checks.lengths == Lengths((512, 1024, 2048), None, False)
    assert checks.forbids_scores


PLACES = """
import pytest
from pytest import param

quoted = pytest.mark.memory_budget(sofmax=8)

class Base:
    @pytest.mark.memory_budget(  # 1
        sofmax=1,
    )
    def test_inherited(self): pass

@pytest.mark.memory_budget(sofmax=2)  # 2
class TestClass:
    def test_method(self): pass

class TestListed:
    pytestmark = [
        pytest.mark.filterwarnings('error'),
        pytest.mark.memory_budget(sofmax=3),  # 3
    ]
    def test_listed(self): pass

class TestDerived(Base): pass

@pytest.mark.memory_budget(1)
@pytest.mark.memory_budget(sofmax=4)  # 4
@pytest.mark.memory_budget(
    2
)
def test_stacked(): pass

@pytest.mark.parametrize("x", [
    param(1, marks=pytest.mark.memory_budget(sofmax=5)),  # 5
])
def test_param(x): pass

@quoted  # no line of its own can be told
def test_named(): pass
"""


def test_error_names_the_line_of_the_marker(pytester: pytest.Pytester, options: None) -> None:
    source = PLACES.strip("\n")
    lines = source.splitlines()
    found = {}
    for test, said in explain(pytester.getitems(source)).items():
        file, line, _ = said.split(":", 2)
        assert file == "test_error_names_the_line_of_the_marker.py"
        found[test] = int(line)
    numbers = {n: 1 + [x.split("#")[-1].strip() for x in lines].index(n) for n in "12345"}
    assert found == {
        "test_inherited": numbers["1"],
        "test_method": numbers["2"],
        "test_listed": numbers["3"],
        "test_stacked": numbers["4"],
        "test_param[1]": numbers["5"],
        "test_named": 1 + lines.index("@quoted  # no line of its own can be told"),
    }


def test_module_marker_is_found(pytester: pytest.Pytester, options: None) -> None:
    (item,) = pytester.getitems(
        "import pytest\n\npytestmark = pytest.mark.memory_budget(sofmax=0)\ndef test_x(): pass\n"
    )
    with pytest.raises(pytest.UsageError, match=r"module_marker_is_found\.py:3: memory_budget: "):
        read_checks(item)


def test_wrong_marker_is_a_usage_error_before_anything_runs(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        test_good="def test_runs(): raise SystemExit('it ran')",
        test_wrong="import pytest\n@pytest.mark.memory_budget(peak='4 MX')\ndef test_x(): pass\n",
    )
    result = run("-q")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: test_wrong.py:2: memory_budget: peak: cannot read '4 MX' as a size; expected *"]
    )
    deselected = run("-q", "-k", "not wrong", "--collect-only")
    assert deselected.ret == pytest.ExitCode.OK


def test_wrong_marker_is_a_usage_error_under_xdist(
    pytester: pytest.Pytester, run_apart: Run
) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile("import pytest\n@pytest.mark.memory_budget(sofmax=0)\ndef test_x(): pass\n")
    result = run_apart("-q", "-n", "1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    place = "test_wrong_marker_is_a_usage_error_under_xdist.py:2"
    result.stderr.fnmatch_lines([f"ERROR: {place}: memory_budget: there is no 'sofmax' to limit*"])
