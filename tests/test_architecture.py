"""The shape of the code: which way imports point, what an import costs, how long a file is."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnprof"
SOURCE_FOLDERS = ("attnprof", "benchmarks", "dashboard", "docs", "examples", "tests")
MAX_LINES = 400

# Calls that run whatever code their input says, by full name.
PICKLE_CALLS = {"pickle.load", "pickle.loads", "pickle.Unpickler"}
# The one file that may build on pickle's unpickler: it looks up no class, and its opcodes are
# checked before.
UNPICKLING_FILE = Path("attnprof/interop/unpickle.py")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in an interpreter of its own, from the root of the repository."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def find_loaded(module: str, candidates: set[str]) -> set[str]:
    """Return which of ``candidates`` a fresh interpreter holds after importing ``module``."""
    finished = run_python(
        f"import json, sys, {module}; "
        f"print(json.dumps([name for name in {sorted(candidates)} if name in sys.modules]))"
    )
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stdout))


def find_full_name(node: ast.expr, full_names: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return full_names.get(first, first) + dot + rest


def find_unsafe_loads(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each call, or base class, in ``source`` that unpickles.

    Names are followed through ``import a as b`` and ``from a import b``, not through assignments.
    """
    tree = ast.parse(source)
    full_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            full_names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (
                (node.lineno, name)
                for base in node.bases
                if (name := find_full_name(base, full_names)) in PICKLE_CALLS
            )
        if not isinstance(node, ast.Call):
            continue
        name = find_full_name(node.func, full_names)
        full_load = any(
            keyword.arg == "weights_only" and ast.unparse(keyword.value) != "True"
            for keyword in node.keywords
        )
        if name in PICKLE_CALLS or (name == "torch.load" and full_load):
            yield node.lineno, name


def test_import_contracts_hold() -> None:
    # No cache: it is a folder in the repository, and `make check` may be writing to it.
    finished = run_python(
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    "module",
    [
        "attnprof",
        "attnprof.analysis",
        "attnprof.attribution",
        "attnprof.growth",
        "attnprof.interop.exporting",
        "attnprof.interop.importing",
        "attnprof.report",
        "attnprof.run",
        "attnprof.store",
        "attnprof.theory",
    ],
)
def test_import_leaves_torch_out(module: str) -> None:
    assert find_loaded(module, {"torch"}) == set()


def test_import_attnprof_loads_nothing_heavy() -> None:
    assert find_loaded("attnprof", {"numpy", "polars", "pyarrow", "torch"}) == set()


def test_import_check_sees_what_is_loaded() -> None:
    assert find_loaded("json", {"json", "torch"}) == {"json"}


def test_package_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert lengths, f"no Python file found under {PACKAGE}"
    too_long = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not too_long, f"over {MAX_LINES} lines, to be split by idea: {too_long}"


def test_nothing_unpickles() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for folder in SOURCE_FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.relative_to(ROOT) != UNPICKLING_FILE
        for line, name in find_unsafe_loads(path.read_text("utf-8"))
    ]
    assert not found, "a file that is loaded must not be able to run code:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import pickle\npickle.load(f)", ["pickle.load"]),
        ("import pickle as p\np.loads(b)", ["pickle.loads"]),
        ("from pickle import load as read\nread(f)", ["pickle.load"]),
        ("import pickle\nclass Mine(pickle.Unpickler): ...", ["pickle.Unpickler"]),
        ("import torch\ntorch.load(f, weights_only=False)", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=flag)", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=True)", []),
        ("import torch\ntorch.load(f)", []),  # restricted unless told otherwise, since 2.6
        ("import json\njson.load(f)", []),
    ],
)
def test_unpickling_is_recognised(source: str, names: list[str]) -> None:
    assert [name for _, name in find_unsafe_loads(source)] == names
