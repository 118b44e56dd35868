"""Run a script or module the way ``python`` does: as ``__main__``, unmodified."""

import importlib.util
import io
import os
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from pkgutil import read_code
from types import CodeType, TracebackType
from typing import Any

from attnprof.errors import CommandError

_OWN_FOLDER = os.path.dirname(__file__)


@dataclass(frozen=True)
class Program:
    """A program that is ready to run."""

    name: str
    """A short name for its run: the script's stem, the module's name."""
    arguments: list[str]
    """What it will see as ``sys.argv``."""
    search_path: str
    """What it will see as ``sys.path[0]``."""
    spec: ModuleSpec | None
    """Of a module; None for a script."""
    file: str | None
    """What it will see as ``__file__``."""
    load: Callable[[], CodeType]
    """Read and compile it."""


def find_script(script: str, arguments: Sequence[str]) -> Program:
    """Return the program in a file, or in a directory or archive with a ``__main__.py``.

    Raises:
        CommandError: There is no such file, or it cannot be read.
    """
    path = Path(script)
    if path.is_dir() or (path.is_file() and zipfile.is_zipfile(path)):
        return _find_bundle(script, arguments)
    if not path.exists():
        raise CommandError(
            f"cannot run {script}: no such file; give a Python script, or a module with -m"
        )
    if not os.access(path, os.R_OK):
        raise CommandError(f"cannot run {script}: no permission to read it")
    # As python has it: __file__ is absolute, argv[0] as typed, and links lead to the folder.
    file = os.path.abspath(script)
    return Program(
        name=path.stem,
        arguments=[script, *arguments],
        search_path=str(path.resolve().parent),
        spec=None,
        file=file,
        load=lambda: _read_script(file),
    )


def _read_script(file: str) -> CodeType:
    with io.open_code(file) as source:
        compiled: CodeType | None = read_code(source)
    if compiled is None:
        with io.open_code(file) as source:
            compiled = compile(source.read(), file, "exec", dont_inherit=True)
    return compiled


def _find_bundle(script: str, arguments: Sequence[str]) -> Program:
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("__main__", [script])
    if spec is None:
        raise CommandError(
            f"cannot run {script}: it has no __main__.py; give a script, or a module with -m"
        )
    return Program(
        name=Path(script).resolve().stem,
        arguments=[script, *arguments],
        search_path=os.path.abspath(script),
        spec=spec,
        file=spec.origin,
        load=lambda: _code_of(spec, script),
    )


def find_module(module: str, arguments: Sequence[str]) -> Program:
    """Return the program that ``python -m module`` runs.

    The packages above it are imported here, as python does before it runs it.

    Raises:
        CommandError: There is no such module, or it cannot be run.
    """
    # Python shows "-m" as argv[0] until the module has been found.
    enter_process(["-m", *arguments], os.getcwd())
    spec = _find_spec(module)
    if spec.submodule_search_locations is not None:
        spec = _find_spec(f"{module}.__main__", package=module)
    code = _code_of(spec, module)
    return Program(
        name=module,
        arguments=[spec.origin or module, *arguments],
        search_path=os.getcwd(),
        spec=spec,
        file=spec.origin,
        load=lambda: code,
    )


def _find_spec(module: str, *, package: str | None = None) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # a package above it lacks something else: the program's own failure
        spec = None
    except ValueError:  # "module.__spec__ is None", or an empty name
        spec = None
    if spec is not None:
        return spec
    if package is not None:
        raise CommandError(f"cannot run -m {package}: it is a package without a __main__.py")
    raise CommandError(
        f"cannot run -m {module}: no such module; check the name and that this Python "
        f"({sys.executable}) has it"
    )


def _code_of(spec: ModuleSpec, name: str) -> CodeType:
    loader: Any = spec.loader
    code = loader.get_code(spec.name) if hasattr(loader, "get_code") else None
    if not isinstance(code, CodeType):
        raise CommandError(f"cannot run {name}: it is not written in Python")
    return code


def enter_process(arguments: Sequence[str], search_path: str) -> None:
    """Give the process the arguments and the first import folder that ``python`` would."""
    sys.argv[:] = arguments
    if not sys.flags.safe_path:  # with -P or PYTHONSAFEPATH there is no such folder
        sys.path[0] = search_path


def run_program(program: Program) -> None:
    """Run ``program`` as ``__main__`` and wait for the threads it leaves, as python does.

    ``sys.modules["__main__"]`` stays the program's, so that what runs at exit finds it.
    """
    module = types.ModuleType("__main__")
    spec = program.spec
    vars(module).update(
        __file__=program.file,
        __cached__=spec.cached if spec else None,
        __loader__=spec.loader if spec else _loader_of(program.file),
        __package__=spec.parent if spec else None,
        __spec__=spec,
        __builtins__=sys.modules["builtins"],
    )
    sys.modules["__main__"] = module
    enter_process(program.arguments, program.search_path)
    exec(program.load(), vars(module))
    _join_threads()


def _loader_of(file: str | None) -> object:
    from importlib.machinery import SourceFileLoader

    return SourceFileLoader("__main__", file) if file else None


def _join_threads() -> None:
    """Wait for the program's threads: what they do belongs to the run."""
    while True:
        others = [
            thread
            for thread in threading.enumerate()
            if not thread.daemon and thread is not threading.current_thread()
        ]
        if not others:
            return
        for thread in others:
            thread.join()


def end_program(error: BaseException) -> int:
    """Do what python does with an exception that leaves a program; return its exit code.

    The traceback is the one python would print: the frames of attnprof that started the program
    are taken off it.
    """
    if isinstance(error, SystemExit):
        return _exit_code(error)
    error.__traceback__ = _from_program(error.__traceback__)
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except Exception:  # the program's own hook failed; python would show both, one will do
        sys.__excepthook__(type(error), error, error.__traceback__)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _exit_code(ended: SystemExit) -> int:
    if ended.code is None:
        return 0
    if isinstance(ended.code, int):
        return ended.code & 0xFF
    print(ended.code, file=sys.stderr)
    return 1


def _from_program(traceback: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the program's first frame on."""
    while traceback is not None:
        if os.path.dirname(traceback.tb_frame.f_code.co_filename) != _OWN_FOLDER:
            break
        traceback = traceback.tb_next
    return traceback


def load_own_script(name: str) -> Any:
    """Return one of the scripts in ``attnprof/cli/scripts`` as a module.

    They are programs like a user's, which import torch: attnprof itself does so in
    `attnprof.capture` only.
    """
    path = Path(_OWN_FOLDER) / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"attnprof_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
