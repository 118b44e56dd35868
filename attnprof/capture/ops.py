"""Record every operator: which storages went in, which came out, where and when.

Known limitations:
    A mode sees the ops of the thread that entered it; `attnprof.capture.threads` enters one in
    every thread that runs a module or a backward pass.
    Inside a compiled region only calls to extern kernels are visible.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnprof.capture.imitate import IMITATED, InPlaceForms
from attnprof.capture.ledger import Ledger, plain_tensors, storage_address
from attnprof.capture.recorder import COMMIT_OPS, Recorder
from attnprof.store.schema import NO_NODE

_current_node = torch._C._current_autograd_node
_sequence_number = torch._C._autograd._get_sequence_nr  # type: ignore[attr-defined]  # not in the stubs
_ACCUMULATE = 2**63
"""At or above: the sequence number of an AccumulateGrad node, which is UINT64_MAX."""

_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
"""What a class has that takes no part in dispatch, such as a subclass of Parameter; such classes
are among ``types`` all the same when ``.data`` is read."""


class Operator:
    """What is known of an operator before it runs."""

    __slots__ = ("code", "decomposes", "lifts", "resizes", "written")

    def __init__(self, func: Any, recorder: Recorder) -> None:
        """Read the operator's schema and enter it into the run's vocabulary."""
        schema = getattr(func, "_schema", None)
        arguments = schema.arguments if schema else ()
        written = [
            i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        out_only = bool(written) and all(arguments[i].is_out for i in written)
        name = schema.name if schema else f"higher_order::{getattr(func, '__name__', func)}"
        overload = (schema.overload_name or "default") if schema else "default"
        self.code = recorder.add_code(
            f"{name}.{overload}", mutates=bool(written), reads_self=bool(written) and not out_only
        )
        self.written = tuple(written) if written and not schema.returns else ()
        """Positions of operands it writes without returning them."""
        self.resizes = out_only or name.split("::")[-1] in _RESIZING
        self.lifts = name == "aten::lift_fresh"
        """Its operand was made just now, by `torch.tensor`, where no mode can see."""
        self.decomposes = schema is not None and _is_composite(func.name())
        """It is nothing but other ops. Autograd takes it apart before a mode sees it; under
        inference_mode nobody does, so the mode has to."""


_RESIZING = frozenset({"resize_", "resize_as_", "set_", "resize_storage_bytes_", "resize_output_"})


def _is_composite(name: str) -> bool:
    """Return whether an operator has no kernel of its own on any device, only a decomposition."""
    if name.startswith("prim::"):
        return False  # reads a tensor's device or layout, and "decomposes" into itself
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(name, "CompositeImplicitAutograd") and not any(
        has_kernel(name, key) for key in ("CPU", "CUDA", "CompositeExplicitAutograd")
    )


def _are_plain(values: Any) -> bool:
    """Return whether no tensor among ``values`` is of a kind that has kernels of its own."""
    return all(
        value.layout is torch.strided and not value.is_nested and not value.is_quantized
        if isinstance(value, torch.Tensor)
        else value.__class__ not in (list, tuple) or _are_plain(value)
        for value in values
    )


class OpMode(TorchDispatchMode):
    """A dispatch mode for one thread that only writes down facts."""

    supports_higher_order_operators = True

    def __init__(
        self,
        recorder: Recorder,
        ledger: Ledger,
        thread: int,
        in_place_forms: InPlaceForms,
        tag_allocations: Callable[[str], None] | None,
    ) -> None:
        """Record the ops of the thread numbered ``thread``."""
        super().__init__()
        self.scope = -1
        """The innermost module call of this thread; set by the module hooks."""
        self.open_scopes: list[Any] = []
        """The module calls this thread is in, outermost first; kept by the module hooks."""
        self.thread = thread
        self.recorder = recorder
        self._ledger = ledger
        self._in_place_forms = in_place_forms
        self._tag_allocations = tag_allocations
        self._live = ledger.live
        self._signatures = recorder.signatures
        self._ops = recorder.ops
        self._operators: dict[Any, Operator] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell Dynamo that compiled code may run as it is; without this it would run eagerly."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` unchanged and record it."""
        if types and self._is_for_subclass(types):
            return NotImplemented  # the subclass takes it apart, and its pieces come back here
        if func in IMITATED and not kwargs:
            in_place = self._in_place_forms.find(func, args)
            if in_place is not None:
                func, args = in_place
        kwargs = kwargs or {}
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = Operator(func, self.recorder)
        if operator.decomposes and _are_plain(args):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        facts: list[int] = []
        self._describe(args, facts, operator.lifts)
        if kwargs:
            self._describe(kwargs.values(), facts, False)
        n_in = len(facts) >> 1
        if self._tag_allocations is not None:
            self._tag_allocations(str(self.recorder.count_ops()))
        result = func(*args, **kwargs)
        if result.__class__ is tuple or result.__class__ is list:
            self._describe(result, facts, True)
        elif isinstance(result, torch.Tensor):
            self._describe((result,), facts, True)
        if operator.written:
            self._describe([args[i] for i in operator.written if i < len(args)], facts, True)
        if operator.resizes:
            self._check_sizes(args, kwargs)
        node = _current_node()
        ops = self._ops
        ops.append(
            (
                time.perf_counter_ns(),
                operator.code,
                self.scope,
                self.thread,
                _sequence_number() - 1,
                NO_NODE if node is None else self._number_of(node),
                n_in,
                facts,
            )
        )
        if len(ops) >= COMMIT_OPS:
            self.recorder.commit()
        return result

    def _describe(self, values: Any, facts: list[int], born: bool) -> None:
        """Append storage and signature of every tensor among ``values`` to ``facts``."""
        for value in values:
            if isinstance(value, torch.Tensor):
                try:
                    ref = self._live.get(storage_address(value))
                    key = (value.shape, value.stride(), value.dtype)
                    signature = self._signatures.get(key)
                    if signature is None:
                        signature = self.recorder.find_signature(key)
                    if ref is None:
                        facts.append(self._ledger.add(value, signature, born=born))
                    else:
                        facts.append(ref.storage)
                    facts.append(signature)
                except (RuntimeError, NotImplementedError):
                    if value.layout is not torch.strided or value.is_nested:
                        self._describe(tuple(plain_tensors(value)), facts, born)
            elif value.__class__ is list or value.__class__ is tuple:
                self._describe(value, facts, born)

    def _number_of(self, node: Any) -> int:
        number: int = node._sequence_nr()
        if number < _ACCUMULATE:
            return number
        variable = getattr(node, "variable", None)
        return NO_NODE if variable is None else -2 - self._ledger.find(variable)

    def _check_sizes(self, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                self._ledger.check_size(value.untyped_storage())

    @staticmethod
    def _is_for_subclass(types: Any) -> bool:
        from torch._subclasses.fake_tensor import FakeTensor
        from torch._subclasses.functional_tensor import FunctionalTensor

        return any(
            t.__torch_dispatch__ is not _NO_DISPATCH
            and not issubclass(t, FakeTensor | FunctionalTensor)
            for t in types
        )
