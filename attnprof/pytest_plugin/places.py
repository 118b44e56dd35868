"""Find the line of a marker, so that an error can say where to mend it."""

import ast
import inspect
import os
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest


def locate_marker(node: Any, mark: pytest.Mark, item: pytest.Item) -> str:
    """Return ``file:line`` of a marker, relative to the root directory.

    Markers are found on tests, classes and their bases, in ``pytestmark``, and in the arguments
    of other markers (``pytest.param``). For one that is written somewhere else, or under another
    name, the answer is where the test is.

    Args:
        node: The test, class or module that has the marker.
        mark: The marker.
        item: A test that it applies to.
    """
    owner: Any = getattr(node, "obj", None)
    for source in owner.__mro__ if inspect.isclass(owner) else (owner,):
        uses = list(_find_uses(source, mark.name))
        if uses:
            file = inspect.getsourcefile(source) or str(item.path)
            same = [line for line, call in uses if _has_arguments(call, mark)]
            line = same[0] if same else uses[0][0]
            return f"{os.path.relpath(file, item.config.rootpath)}:{line}"
    path, first, _ = item.location
    return f"{path}:{(first or 0) + 1}"


def _find_uses(source: Any, name: str) -> Iterator[tuple[int, ast.Call | None]]:
    """Yield the line of every marker of a name on a function, class or module, and its call."""
    try:
        lines, first = inspect.getsourcelines(inspect.unwrap(source))
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return  # made at run time, or written in a way that does not stand alone
    is_module = inspect.ismodule(source)
    definition: Any = tree if is_module else tree.body[0]
    places: list[ast.AST] = list(getattr(definition, "decorator_list", []))
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        places += [s for s in definition.body if _assigns_marks(s)]
    calls = {id(c.func): c for p in places for c in ast.walk(p) if isinstance(c, ast.Call)}
    for place in places:
        for use in ast.walk(place):
            if isinstance(use, ast.Attribute) and use.attr == name:
                line = (use.end_lineno or use.lineno) + (0 if is_module else first - 1)
                yield line, calls.get(id(use))


def _assigns_marks(statement: ast.stmt) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else ()
    return any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in targets)


def _has_arguments(call: ast.Call | None, mark: pytest.Mark) -> bool:
    """Return whether a call's arguments are written out and are those of a marker."""
    if call is None:
        return not mark.args and not mark.kwargs
    try:
        args = tuple(ast.literal_eval(arg) for arg in call.args)
        kwargs = {key.arg: ast.literal_eval(key.value) for key in call.keywords}
    except ValueError:  # names and expressions
        return False
    return args == mark.args and kwargs == mark.kwargs
