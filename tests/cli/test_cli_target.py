"""``SCRIPT:FUNCTION``: the function it names, or one line on why there is none."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnprof.cli.target import Target, is_from_workload
from attnprof.errors import CommandError

WORK = """\
def make_step(seq_len, device): return lambda: (seq_len, device)
def make_other_step(seq_len, device): pass
def make_nothing(seq_len): pass
async def make_later(seq_len, device): pass
LENGTHS = [1, 2, 3]
class Makers:
    step = staticmethod(make_step)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to load scripts from; what loading changes in the process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attnprof", "sweep"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "work.py").write_text(WORK)
    yield tmp_path
    for name in sys.modules.keys() - before:
        del sys.modules[name]


def test_a_script_is_loaded_as_a_module(folder: Path) -> None:
    (folder / "sub" / "neighbour.py").write_text("here = True\n")
    (folder / "sub" / "plain.py").write_text(
        "import sys, neighbour\n"
        "def make_step(seq_len, device):\n"
        "    return lambda: (__name__, __file__, sys.argv, sys.path[0])\n"
        "if __name__ == '__main__':\n"
        "    raise SystemExit('run as a script')\n"
    )
    name, file, argv, first = Target("sub/plain.py:make_step")(8, "cpu")()
    assert (name, Path(file)) == ("plain", folder / "sub" / "plain.py")
    assert (argv, Path(first)) == (["sub/plain.py"], folder / "sub")
    assert sys.modules["plain"].neighbour.here
    assert not (folder / "sub" / "__pycache__" / "plain.cpython-311.pyc").exists()


def test_a_script_may_be_called_like_a_loaded_module(folder: Path) -> None:
    (folder / "json.py").write_text("def make_step(seq_len, device): return seq_len\n")
    json = sys.modules["json"]
    assert Target("json.py:make_step")(8, "cpu") == 8
    assert sys.modules["json"] is json


def test_a_function_is_the_same_from_whichever_folder_it_is_named(folder: Path) -> None:
    named = [Target("sub/work.py:make_step"), Target("work.py:make_step", str(folder / "sub"))]
    named.append(Target("sub.work:make_step"))
    assert {target.identity for target in named} == {f"{folder}/sub/work.py:make_step"}
    assert Target("work.py:make_step").identity == f"{folder}/work.py:make_step"


def test_a_module_and_a_dotted_name_are_found(folder: Path) -> None:
    assert callable(Target("sub.work:Makers.step").load())
    assert Target("sub.work:make_step").name == "work"


def test_a_target_is_loaded_once(folder: Path) -> None:
    (folder / "once.py").write_text(
        "from pathlib import Path\n"
        "with Path('log').open('a') as log: print('loaded', file=log)\n"
        "def make_step(seq_len, device): pass\n"
    )
    target = Target("once.py:make_step")
    assert target.load() is target.load()
    assert (folder / "log").read_text() == "loaded\n"


def test_a_target_that_was_sent_elsewhere_loads_the_same_script(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, arguments = Target("sub/work.py:make_step").__reduce__()  # what is pickled
    monkeypatch.chdir("/")
    sent = make(*arguments)
    assert sent.target == "sub/work.py:make_step"
    assert sent(8, "cpu")() == (8, "cpu")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("sub/work.py", "cannot load 'sub/work.py': expected SCRIPT:FUNCTION or MODULE:FUNCTION, "),
        ("sub/work.py", "did you mean 'sub/work.py:make_step'?"),
        ("make_step", "cannot load 'make_step': expected SCRIPT:FUNCTION"),
        ("sub/work.py:", "cannot load 'sub/work.py:': expected SCRIPT:FUNCTION"),
        ("sub/work.py:a..b", "expected SCRIPT:FUNCTION"),
        ("nope.py:make_step", "cannot load nope.py:make_step: nope.py: no such file; expected"),
        ("./sub:make_step", "./sub: it is a directory; expected SCRIPT:FUNCTION"),
        ("nope:make_step", "no module 'nope'; check the name and that this Python"),
        ("sub.nope:make_step", "no module 'sub.nope'"),
        ("sub/work.py:make_stp", "sub/work.py has no 'make_stp'; did you mean 'make_step'?"),
        ("sub/work.py:zzz", "has no 'zzz'; its functions are: make_step, make_other_step, "),
        ("sub/work.py:Makers.zzz", "sub/work.py has no 'Makers.zzz'"),
        ("sub/empty.py:make_step", "it defines no function; define make_step(seq_len, device)"),
        ("sub/work.py:LENGTHS", "sub/work.py:LENGTHS is not a function: got list; expected make_s"),
        (
            "sub/work.py:make_later",
            "sub/work.py:make_later is an 'async def', which builds nothing",
        ),
        ("sub/work.py:make_nothing", "make_nothing(seq_len) cannot be called with a length and a"),
    ],
)
def test_what_cannot_be_loaded_says_so(target: str, message: str, folder: Path) -> None:
    (folder / "sub" / "empty.py").write_text("")
    with pytest.raises(CommandError) as raised:
        Target(target).load()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("1/0\n", ZeroDivisionError),
        ("import no_such_module\n", ModuleNotFoundError),
        ("def broken(:\n", SyntaxError),
        ("raise SystemExit(3)\n", SystemExit),
    ],
)
def test_what_a_script_raises_passes_on(
    source: str, kind: type[BaseException], folder: Path
) -> None:
    (folder / "bad.py").write_text(source)
    with pytest.raises(kind) as raised:
        Target("bad.py:make_step").load()
    assert is_from_workload(raised.value)
    assert "bad" not in sys.modules


def test_a_package_that_lacks_something_is_its_own_failure(folder: Path) -> None:
    (folder / "sub" / "lacking.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Target("sub.lacking:make_step").load()
