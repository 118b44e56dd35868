"""Which module is running: global forward hooks, and the names of modules, parameters, buffers."""

import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from attnprof.capture.detail import DetailSwitch
from attnprof.capture.dynamo import RUNS_COMPILED, is_forced_eager
from attnprof.capture.ledger import PLAIN_CLASSES, Ledger, plain_tensors
from attnprof.capture.ops import OpMode
from attnprof.capture.recorder import Recorder
from attnprof.capture.threads import ThreadModes
from attnprof.store.schema import COMPILED, GRAD_ENABLED, OUTERMOST, RECOMPUTE, UNCOMPILED
from attnprof.vocabulary import Role

_in_backward = torch._C._current_graph_task_id  # -1 outside backward


class ModuleNames:
    """Numbers for modules, and whose parameter or buffer a storage is."""

    def __init__(self, recorder: Recorder, ledger: Ledger) -> None:
        """Enter modules and identities into ``recorder``."""
        self._recorder = recorder
        self._ledger = ledger
        self._numbers: dict[int, int] = {}
        self._guards: dict[int, weakref.ref[nn.Module]] = {}
        self._count = 0
        self._only_live = False
        self._lock = threading.RLock()
        """Several threads may run the same model, and meet it at the same time."""
        self._families: dict[int, list[tuple[weakref.ref[nn.Module], int, str]]] = {}
        """Root number -> every module below it, its number, and the prefix of its tensors' names.
        Weak: a model that the program drops must be freed when it would have been."""
        self._roles: dict[int, Role] = {}
        """Storage number -> the identity already written for it."""
        self._roles_limit = 1000

    def number(self, module: nn.Module) -> int:
        """Return the module's number, entering it as a root of its own if it is new."""
        number = self._numbers.get(id(module))
        return self.enter_root(module) if number is None else number

    def enter_root(self, root: nn.Module) -> int:
        """Enter ``root`` and all its descendants by their paths from it."""
        with self._lock:
            return self._enter_root(root)

    def _enter_root(self, root: nn.Module) -> int:
        root_number = self._enter(root)
        family = []
        for path, module in root.named_modules():
            number = self._enter(module)
            self._recorder.modules.append((number, root_number, path, type(module).__name__))
            family.append((self._guards[id(module)], number, path + "." if path else ""))
        self._families[root_number] = family
        self.identify(root_number)
        return root_number

    def has_root(self, module: nn.Module) -> bool:
        """Return whether the module was entered as a root."""
        return self._numbers.get(id(module), -1) in self._families

    def identify(self, root_number: int) -> None:
        """Write down whose the storages of a root's parameters, gradients and buffers are.

        Cheap when nothing changed, so it can run at every outermost forward: parameters are
        given new storages by ``.to()``, sharding, quantisation and the like.
        """
        with self._lock:
            self._identify(root_number)

    def identify_late(self) -> None:
        """Identify what has become of the models, once more at the end.

        A parameter that its first forward makes, or that is given another storage after the last,
        has not been met by then. Storages that no op ever saw stay out: nobody knows since when
        they were there.
        """
        with self._lock:
            self._only_live = True
            for root_number in list(self._families):
                self._identify(root_number)

    def _identify(self, root_number: int) -> None:
        for guard, number, prefix in self._families[root_number]:
            module = guard()
            if module is None:
                continue
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    self._identify_parameter(parameter, prefix + name, number)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    self.write_identity(buffer, Role.BUFFER, prefix + name, number)

    def _identify_parameter(self, parameter: nn.Parameter, name: str, number: int) -> None:
        storage = self.write_identity(parameter, Role.PARAMETER, name, number)
        # A functional call puts tensors that are not leaves in a parameter's place; asking them
        # for a gradient warns.
        if storage >= 0 and parameter.is_leaf and parameter.grad is not None:
            self.write_identity(parameter.grad, Role.GRADIENT, name, number, owner=storage)

    def write_identity(
        self, tensor: torch.Tensor, role: Role, name: str, module: int, owner: int = -1
    ) -> int:
        """Record what a tensor's storage is, once; return its number if that was news, else -1."""
        news = -1
        is_plain = tensor.__class__ in PLAIN_CLASSES
        for plain in (tensor,) if is_plain else plain_tensors(tensor):
            storage = self._ledger.find(plain, only_live=self._only_live)
            if storage >= 0 and self._roles.get(storage) is not role:
                self._remember(storage, role)
                op = self._recorder.count_ops()
                self._recorder.identities.append(
                    (storage, role.value, name, module, owner, op, "", "")
                )
                news = storage
        return news

    def _remember(self, storage: int, role: Role) -> None:
        self._roles[storage] = role
        if len(self._roles) > self._roles_limit:  # batches come and go, one or more every step
            live = {ref.storage for ref in list(self._ledger.live.values())}
            self._roles = {number: role for number, role in self._roles.items() if number in live}
            self._roles_limit = 2 * len(self._roles) + 1000

    def _enter(self, module: nn.Module) -> int:
        key = id(module)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self._count
            self._count += 1
            # An id is free for reuse once its module is gone.
            self._guards[key] = weakref.ref(module, lambda _: self._leave(key))
        return number

    def _leave(self, key: int) -> None:
        self._guards.pop(key, None)
        self._families.pop(self._numbers.pop(key, -1), None)


class ModuleWatch:
    """Opens a scope when a module's forward begins and closes it when it ends, however it ends."""

    def __init__(
        self, modes: ThreadModes, names: ModuleNames, recorder: Recorder, detail: DetailSwitch
    ) -> None:
        """Record scopes into ``recorder`` while ``detail`` is on."""
        self._detail = detail
        self._modes = modes
        self._names = names
        self._recorder = recorder
        self._scopes = count()
        self._has_said_uncompiled = False

    def before(self, module: nn.Module, args: Any) -> None:
        """Open a scope; the global forward pre-hook."""
        if torch.compiler.is_compiling():
            return  # Dynamo folds this away: nothing of ours ends up in compiled code
        if self._detail.awaits_forward:
            self._detail.begin_step()
        if not self._detail.is_on:
            return
        entered = False
        mode = self._modes.find()
        if mode is None:
            mode, entered = self._modes.enter(), True
        flags = GRAD_ENABLED if torch.is_grad_enabled() else 0
        if _in_backward() != -1:
            flags |= RECOMPUTE
        elif not mode.open_scopes:
            flags |= OUTERMOST
            self._begin_outermost(module)
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            flags |= self._flag_compiled()
        recorder = self._recorder
        scope = next(self._scopes)
        mode.open_scopes.append(
            (
                module,
                entered,
                (
                    scope,
                    mode.scope,
                    self._names.number(module),
                    mode.thread,
                    flags,
                    recorder.committed_ops + len(recorder.ops),
                ),
                time.perf_counter_ns(),
            )
        )
        mode.scope = scope

    def after(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """Close the module's scope; the global forward hook, called after exceptions too.

        Args:
            module: Whose forward ended.
            args: Its positional arguments.
            rest: Its keyword arguments and its output; after an exception torch leaves out the
                former, whatever was asked for.
        """
        if torch.compiler.is_compiling():
            return
        mode = self._modes.find()
        if mode is None or not _has_opened(mode, module):
            return  # steps are only counted now, or another hook raised before ours could open it
        if mode.open_scopes[0][0] is module:
            self._identify_inputs((*args, *(rest[0].values() if len(rest) == 2 else ())))
        while self._close_innermost(mode) is not module:
            pass  # scopes inside it that were left without a word

    def _flag_compiled(self) -> int:
        """Return how a module that was compiled runs, and warn where that is not as it would."""
        if is_forced_eager():
            return 0
        if RUNS_COMPILED:
            return COMPILED
        if not self._has_said_uncompiled:
            self._has_said_uncompiled = True
            warnings.warn(
                "torch before 2.10 runs compiled code op by op while it is traced, so the memory "
                "is that of the model without torch.compile",
                RuntimeWarning,
                stacklevel=3,
            )
        return UNCOMPILED

    def _identify_inputs(self, values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                self._names.write_identity(value, Role.INPUT, "", -1)
            elif isinstance(value, list | tuple):
                self._identify_inputs(value)
            elif isinstance(value, dict):
                self._identify_inputs(value.values())

    def _close_innermost(self, mode: OpMode) -> nn.Module:
        module, entered, row, enter_ns = mode.open_scopes.pop()
        mode.scope = row[1]
        recorder = self._recorder
        recorder.scopes.append(
            (
                *row,
                recorder.committed_ops + len(recorder.ops),
                enter_ns,
                time.perf_counter_ns(),
            )
        )
        if entered:
            self._modes.leave()
        return module  # type: ignore[no-any-return]  # open_scopes holds tuples of mixed things

    def _begin_outermost(self, module: nn.Module) -> None:
        """A forward from outside begins: the natural place to put the past on disk."""
        if self._recorder.ops:
            self._recorder.commit()
        if self._names.has_root(module):
            self._names.identify(self._names.number(module))
        else:
            self._names.enter_root(module)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the hooks installed for the time being."""
        with _without_warning_of_hooks():
            yield from self._hooking()

    def _hooking(self) -> Iterator[None]:
        first = module_hooks.register_module_forward_pre_hook(self.before)
        try:
            last = module_hooks.register_module_forward_hook(
                self.after, with_kwargs=True, always_call=True
            )
            try:
                yield
            finally:
                last.remove()
                # torch 2.13 forgets this entry, one for every trace.
                module_hooks._global_forward_hooks_with_kwargs.pop(last.id, None)
        finally:
            first.remove()


@contextmanager
def _without_warning_of_hooks() -> Iterator[None]:
    """Keep torch from warning the user that *our* hooks also fire for a compiled module.

    One filter is added and that one is taken away again; ``warnings.catch_warnings`` would also
    undo what the program itself does to the filters meanwhile.
    """
    before = list(warnings.filters)
    warnings.filterwarnings(
        "ignore", message=r"Using `torch.compile\(module\)` when there are global"
    )
    added = next((f for f in warnings.filters if f not in before), None)
    try:
        yield
    finally:
        if added in warnings.filters:
            cast(list[Any], warnings.filters).remove(added)


def _has_opened(mode: OpMode, module: nn.Module) -> bool:
    return any(opened[0] is module for opened in reversed(mode.open_scopes))
