"""Record every operator: which storages went in, which came out, where and when.

Known limitations:
    A mode sees the ops of the thread that entered it; `attnprof.capture.threads` enters one in
    every thread that runs a module or a backward pass.
    Inside a compiled region only calls to extern kernels are visible.
"""

import sys
import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import Parameter

from attnprof.capture.cuda import OP_PREFIX
from attnprof.capture.dynamo import SKIPPING, PassiveMode, leave_alone
from attnprof.capture.imitate import IMITATED, InPlaceForms
from attnprof.capture.ledger import Ledger, plain_tensors, storage_address
from attnprof.capture.recorder import COMMIT_OPS, PACKERS, Recorder, make_packer
from attnprof.store.schema import NO_NODE

_current_node: Callable[[], Any] = torch._C._current_autograd_node  # None outside backward
_sequence_number = torch._C._autograd._get_sequence_nr
_ACCUMULATE = 2**63
"""At or above: the sequence number of an AccumulateGrad node, which is UINT64_MAX."""

_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
"""What a class has that takes no part in dispatch, such as a subclass of Parameter; such classes
are among ``types`` all the same when ``.data`` is read."""


class Operator:
    """What is known of an operator before it runs."""

    __slots__ = (
        "call", "code", "decomposes", "func", "imitated", "is_higher_order", "is_plain",
        "made_of_ops", "resizes", "tensors_end", "written",
    )  # fmt: skip

    def __init__(self, func: Any, recorder: Recorder) -> None:
        """Read the operator's schema and enter it into the run's vocabulary."""
        self.func = func
        """Held, so that no other operator gets its id, by which `Operators` know it."""
        self.call = func._op if type(func) is OpOverload else func
        """What `OpOverload.__call__` calls: one Python frame less."""
        schema: Any = getattr(func, "_schema", None)  # a higher-order operator has none
        self.is_higher_order = schema is None
        arguments = schema.arguments if schema else ()
        written = [
            i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        out_only = bool(written) and all(arguments[i].is_out for i in written)
        name = schema.name if schema else f"higher_order::{getattr(func, '__name__', func)}"
        mutates = bool(written) and name.split("::")[-1] not in _VIEWS_IN_PLACE
        overload = (schema.overload_name or "default") if schema else "default"
        self.code = recorder.add_code(
            f"{name}.{overload}", mutates=mutates, reads_self=mutates and not out_only
        )
        self.written = tuple(written) if written and not schema.returns else ()
        """Positions of operands it writes without returning them."""
        self.resizes = out_only or name.split("::")[-1] in _RESIZING
        self.decomposes = schema is not None and _is_composite(func.name())
        """It is nothing but other ops. Autograd takes it apart before a mode sees it; under
        inference_mode nobody does, so the mode has to."""
        self.imitated = func in IMITATED
        self.made_of_ops = _MADE_OF_OPS[name](func) if name in _MADE_OF_OPS else None
        """Its kernel, if that calls ops for all it does: a mode that stays on sees them."""
        self.is_plain = not (self.decomposes or self.imitated or self.made_of_ops)
        """It is run and written down; nothing else is to be considered."""
        holders = [i + 1 for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
        self.tensors_end = max(holders, default=0) if schema else sys.maxsize
        """No argument from this position on can hold a tensor that counts."""
        if name == "aten::lift_fresh":
            # Its operand was made just now, by `torch.tensor`, where no mode can see; it becomes
            # the result, or under fake tensors is dropped for one.
            self.tensors_end = 0


class Operators:
    """The operators that a trace has met, in whichever thread."""

    def __init__(self, recorder: Recorder) -> None:
        """Enter them into ``recorder``'s vocabulary."""
        self.known: dict[int, Operator] = {}
        """By the id of the function: hashing one calls Python."""
        self._recorder = recorder
        self._lock = threading.RLock()  # a signal's handler may run an op in the middle of this

    def meet(self, func: Any) -> Operator:
        """Return what is known of an operator, entering it if it is new."""
        with self._lock:
            operator = self.known.get(id(func))
            if operator is None:
                operator = self.known[id(func)] = Operator(func, self._recorder)
            return operator


def _find_cpu_kernel(func: Any) -> Callable[..., Any]:
    return partial(func._op_dk, torch._C.DispatchKey.CPU)


def _find_eager_kernel(func: Any) -> Callable[..., Any]:
    kernel: Callable[..., Any] = func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
    return kernel


_MADE_OF_OPS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    # What `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run in evaluation.
    "aten::_native_multi_head_attention": _find_cpu_kernel,
    "aten::_transformer_encoder_layer_fwd": _find_cpu_kernel,
    # What is not compiled runs as products around a softmax.
    "higher_order::flex_attention": _find_eager_kernel,
    "higher_order::flex_attention_backward": _find_eager_kernel,
}
"""Whole layers as one op, whose kernel calls other ops, those of scores and softmax among them; the
first two do so on the CPU only."""

_DEVICE_QUESTION = torch.ops.prim.device.default

_RESIZING = frozenset({"resize_", "resize_as_", "set_", "resize_storage_bytes_", "resize_output_"})

_VIEWS_IN_PLACE = frozenset({
    "as_strided_", "detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_",
    "unsqueeze_",
})  # fmt: skip
"""They change how memory is read, as nn.GRU does where the batch is first, and write nothing."""


def _is_composite(name: str) -> bool:
    """Return whether an operator has no kernel of its own on any device, only a decomposition."""
    if name.startswith("prim::"):
        return False  # reads a tensor's layout, say, and "decomposes" into itself
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


def _has_own_dispatch(types: tuple[type, ...]) -> bool:
    """Return whether one of these kinds of tensor takes ops apart by itself."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return any(
        t.__torch_dispatch__ is not _NO_DISPATCH  # type: ignore[attr-defined]  # tensors have it
        and not issubclass(t, FakeTensor | FunctionalTensor)
        for t in types
    )


class OpMode(PassiveMode):  # type: ignore[no-untyped-call]  # not annotated
    """A dispatch mode for one thread that only writes down facts."""

    def __init__(
        self,
        recorder: Recorder,
        ledger: Ledger,
        thread: int,
        operators: Operators,
        in_place_forms: InPlaceForms,
    ) -> None:
        """Record the ops of the thread numbered ``thread``; other threads share ``operators``."""
        super().__init__()
        self.scope = -1
        """The innermost module call of this thread; set by the module hooks."""
        self.open_scopes: list[Any] = []
        """The module calls this thread is in, outermost first; kept by the module hooks."""
        self.thread = thread
        self.recorder = recorder
        self._ledger = ledger
        self._in_place_forms = in_place_forms
        self.set_tag: Callable[[str], None] | None = None
        """Sets what the CUDA allocator notes with each block that this thread takes."""
        self.get_tag: Callable[[], str] | None = None
        """Returns what it notes now, where that may be the program's own."""
        self._live = ledger.live
        self._twins = ledger.twins
        self._signatures = recorder.signatures
        self._ops = recorder.ops
        self._operators = operators.known
        self._meet = operators.meet
        self._subclasses: dict[tuple[type, ...], bool] = {}
        """Kinds of tensor among an op's operands -> whether the op is theirs to take apart."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` unchanged and record it."""
        if func is _DEVICE_QUESTION:
            return func(*args)  # fake tensors are asked many times; it is no fact
        if types:
            is_for_subclass = self._subclasses.get(types)
            if is_for_subclass is None:
                is_for_subclass = self._subclasses[types] = _has_own_dispatch(types)
            if is_for_subclass:
                return NotImplemented  # the subclass takes it apart; its pieces come back here
        operator = self._operators.get(id(func)) or self._meet(func)
        if self._twins is not None and operator.tensors_end:
            args, kwargs = self._twins.replace(args, kwargs)
        if not operator.is_plain:
            if operator.imitated and not kwargs:
                in_place = self._in_place_forms.find(func, args)
                if in_place is not None:
                    func, args = in_place
                    operator = self._operators.get(id(func)) or self._meet(func)
            if operator.decomposes and _are_plain(args):
                with self:
                    result = func.decompose(*args, **(kwargs or {}))
                if result is not NotImplemented:
                    return result
            kernel = operator.made_of_ops
            if kernel is not None and (operator.is_higher_order or args[0].device.type == "cpu"):
                with self:
                    return kernel(*args, **(kwargs or {}))
        fact = [operator.code, self.scope, self.thread]
        self._describe(args[: operator.tensors_end], fact, False)
        if kwargs and operator.tensors_end:
            self._describe(kwargs.values(), fact, False)
        inputs_end = len(fact)
        if self.set_tag is None:
            result = operator.call(*args, **kwargs) if kwargs else operator.call(*args)
        else:
            result = self._call_tagged(operator, args, kwargs or {}, fact)
        if result.__class__ is Tensor or isinstance(result, Tensor):
            self._describe((result,), fact, True)
        elif result.__class__ is tuple or result.__class__ is list:
            self._describe(result, fact, True)
        if operator.written:
            self._describe([args[i] for i in operator.written if i < len(args)], fact, True)
        if operator.resizes:
            self._check_sizes(args, kwargs or {})
        node = _current_node()
        fact += (
            perf_counter_ns(),
            _sequence_number() - 1,
            NO_NODE if node is None else self._number_of(node),
            inputs_end,
        )
        ops = self._ops
        ops.append((PACKERS.get(len(fact)) or make_packer(len(fact)))(*fact))
        if len(ops) >= COMMIT_OPS:
            self.recorder.commit()
        return result

    def _call_tagged(self, operator: Operator, args: Any, kwargs: Any, fact: list[int]) -> Any:
        """Run an op while the allocator notes its number with every block.

        An op that the device has no room for is written down too, without results.
        """
        set_tag = self.set_tag
        assert set_tag is not None
        users_own = self.get_tag() if self.get_tag is not None else ""
        set_tag(f"{OP_PREFIX}{self.recorder.count_ops()}")
        try:
            return operator.call(*args, **kwargs)
        except torch.OutOfMemoryError:
            node = _current_node()
            number = NO_NODE if node is None else self._number_of(node)
            fact += (perf_counter_ns(), _sequence_number() - 1, number, len(fact))
            self._ops.append((PACKERS.get(len(fact)) or make_packer(len(fact)))(*fact))
            raise
        finally:
            set_tag(users_own)

    def _describe(self, values: Any, fact: list[int], born: bool) -> None:
        """Append storage and signature of every tensor among ``values`` to ``fact``."""
        for value in values:
            kind = value.__class__
            # isinstance() alone would do; for anything but a tensor it is slow.
            if kind is Tensor or kind is Parameter or isinstance(value, Tensor):
                try:
                    ref = self._live.get(storage_address(value))
                    key = (value.shape, value.stride(), value.dtype)
                    signature = self._signatures.get(key)
                    if signature is None:
                        signature = self.recorder.find_signature(key)
                    if ref is None:
                        fact += (self._ledger.add(value, signature, born=born), signature)
                    else:
                        fact += (ref.storage, signature)
                except (RuntimeError, NotImplementedError, TypeError):
                    # No storage of its own, or a symbolic shape: then it has no memory at all.
                    if value.layout is not torch.strided or value.is_nested:
                        self._describe(tuple(plain_tensors(value)), fact, born)
            elif kind is list or kind is tuple:
                self._describe(value, fact, born)

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


if SKIPPING is not None:  # else torch wraps it, see `PassiveMode`
    leave_alone(OpMode.__torch_dispatch__)
