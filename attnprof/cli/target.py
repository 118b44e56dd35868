"""``SCRIPT:FUNCTION``: a function that builds steps, found by the name a user gives it."""

import difflib
import gc
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import TracebackType
from typing import Any

import attnprof
from attnprof.cli.console import say
from attnprof.cli.program import end_program
from attnprof.errors import AttnprofError, CommandError

MakeStep = Callable[[int, str], Callable[[], Any]]

_OWN_FILES = os.path.dirname(attnprof.__file__) + os.sep
_EXPECTED = "expected SCRIPT:FUNCTION or MODULE:FUNCTION, such as 'train.py:make_step'"


class Target:
    """A function in a script or module; callable like it, and loaded when first called.

    Only its name is pickled: a process that is sent a target loads the script itself, so that
    what the script defines need not be importable.
    """

    def __init__(self, target: str, folder: str | None = None) -> None:
        """Take a target apart, loading nothing.

        Args:
            target: ``path/to/script.py:function`` or ``package.module:function``; dots in the
                function's name lead to attributes.
            folder: Where relative paths and modules are looked for; the current folder.

        Raises:
            CommandError: It does not have two parts.
        """
        self.target = target
        """As the user gave it."""
        self._folder = os.getcwd() if folder is None else folder
        self._place, _, self._function = target.rpartition(":")
        self._loaded: MakeStep | None = None
        if not self._place or not all(self._function.split(".")):
            hint = f"; did you mean '{target}:make_step'?" if target.endswith(".py") else ""
            raise CommandError(f"cannot load {target!r}: {_EXPECTED}{hint}")

    def __reduce__(self) -> tuple[type["Target"], tuple[str, str]]:
        return Target, (self.target, self._folder)

    def __call__(self, seq_len: int, device: str) -> Callable[[], Any]:
        """Call the function."""
        return self.load()(seq_len, device)

    @property
    def is_script(self) -> bool:
        """Whether the target names a file rather than a module."""
        return self._place.endswith(".py") or os.sep in self._place or self._path.is_file()

    @property
    def name(self) -> str:
        """A short name for what is recorded of it: the script's stem, the module's last part."""
        return self._path.stem if self.is_script else self._place.rpartition(".")[2]

    @property
    def identity(self) -> str:
        """What no other function has, from whichever folder it is named."""
        file = self._path if self.is_script else getattr(self._load_module(), "__file__", None)
        return f"{os.path.realpath(file) if file else self._place}:{self._function}"

    @property
    def _path(self) -> Path:
        return Path(self._folder, self._place)

    def load(self) -> MakeStep:
        """Import the script or module, once, and return the function.

        Raises:
            CommandError: There is no such file, module or function, or it cannot be called with a
                length and a device.
            BaseException: Whatever the script raises.
        """
        if self._loaded is None:
            module = self._load_script() if self.is_script else self._load_module()
            self._loaded = self._find_function(module)
        return self._loaded

    def _load_script(self) -> types.ModuleType:
        """Run the script under a module's name, its folder first among those to import from.

        It is compiled without leaving a ``__pycache__`` beside it, as python does for scripts.
        """
        path = self._path
        if not path.is_file():
            what = "it is a directory" if path.is_dir() else "no such file"
            raise CommandError(f"cannot load {self.target}: {self._place}: {what}; {_EXPECTED}")
        if not os.access(path, os.R_OK):
            raise CommandError(f"cannot load {self.target}: no permission to read {self._place}")
        _enter(self._place, str(path.resolve().parent))
        name = path.stem
        while name in sys.modules:  # a script may be called like a module that is loaded
            name += "_"
        loader = SourceFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None  # a loader was given
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            # Not by the loader, whose frames would stand in the traceback of a syntax error.
            code = compile(loader.get_data(str(path)), str(path), "exec", dont_inherit=True)
            exec(code, vars(module))
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def _load_module(self) -> types.ModuleType:
        _enter(self._place, self._folder)
        try:
            # Unlike import_module, this leaves none of importlib's frames in a traceback.
            __import__(self._place)
        except ModuleNotFoundError as error:
            if error.name is None or not (self._place + ".").startswith(error.name + "."):
                raise  # it lacks something else: its own failure
            raise CommandError(
                f"cannot load {self.target}: no module {error.name!r}; check the name and that "
                f"this Python ({sys.executable}) has it, or give a script, as in "
                f"'{self._place}.py:{self._function}'"
            ) from None
        return sys.modules[self._place]

    def _find_function(self, module: types.ModuleType) -> MakeStep:
        found: Any = module
        for part in self._function.split("."):
            if not hasattr(found, part):
                raise CommandError(
                    f"{self._place} has no {self._function!r}; {_suggest(self._function, module)}"
                )
            found = getattr(found, part)
        if not callable(found):
            raise CommandError(
                f"{self.target} is not a function: got {type(found).__name__}; expected "
                "make_step(seq_len, device), which returns a function that runs one step"
            )
        if inspect.iscoroutinefunction(found):
            raise CommandError(
                f"{self.target} is an 'async def', which builds nothing when it is called; "
                "expected a plain make_step(seq_len, device), which returns a function that runs "
                "one step"
            )
        _check_signature(self.target, found)
        function: MakeStep = found
        return function


def _enter(place: str, folder: str) -> None:
    """Give the process the arguments of a script without any, and a first folder to import from.

    The folders that are there stay: a child process that is sent a target imports attnprof too.
    """
    sys.argv[:] = [place]
    if not sys.flags.safe_path and folder not in sys.path[:1]:
        sys.path.insert(0, folder)


def _suggest(name: str, module: types.ModuleType) -> str:
    """Return what to do about a name that a module does not have."""
    own = [
        key
        for key, value in vars(module).items()
        if inspect.isroutine(value) and getattr(value, "__module__", None) == module.__name__
    ]
    close = difflib.get_close_matches(name, own, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    listed = ", ".join(own[:5]) + (", …" if len(own) > 5 else "")
    known = f"its functions are: {listed}" if own else "it defines no function"
    return f"{known}; define make_step(seq_len, device), which returns a function running one step"


def _check_signature(target: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind(1, "cpu")
    except ValueError:  # a builtin that has no signature to read
        return
    except TypeError as error:
        raise CommandError(
            f"{target}{inspect.signature(function)} cannot be called with a length and a device: "
            f"{error}; expected make_step(seq_len, device)"
        ) from None


def load_without_collecting(target: Target) -> None:
    """Load a target without looking for garbage, neither while it is imported nor in it later.

    Almost nothing that torch makes while it is imported is garbage, and there is a million of it:
    looking through it takes a second in all.
    """
    gc.disable()
    try:
        target.load()
    finally:
        gc.freeze()
        gc.enable()


def is_from_workload(error: BaseException) -> bool:
    """Return whether a user's script or workload raised an exception, and not attnprof itself."""
    if isinstance(error, AttnprofError):
        return False
    return _find_workload(error) is not None or isinstance(error, SyntaxError)


def show_failure(error: BaseException) -> None:
    """Show what a script or workload raised as python would, without attnprof's frames."""
    error.__traceback__ = _find_workload(error)
    end_program(error)
    if isinstance(error, SystemExit):  # which python shows nothing of
        say(
            f"the script ended itself, with {error!r}; it is loaded without arguments, and has to "
            "go on until its step has run"
        )


def _find_workload(error: BaseException) -> TracebackType | None:
    """Return the traceback from the first frame on that is not attnprof's."""
    traceback = error.__traceback__
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_OWN_FILES):
            break
        traceback = traceback.tb_next
    return traceback
