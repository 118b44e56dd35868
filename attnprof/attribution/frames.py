"""What a call stack says about the memory that was asked for in it.

This is how runs that were imported are explained, which have stacks and no ops. The names that
are looked for are PyTorch's own (its files, its autograd engine, its operators) and words that
functions around attention commonly have; no list of models. All of it is inference.

Known limitations:
    Python stacks have no frame for functions written in C++, ``torch.matmul`` among them: of a
    forward's matrix products nothing is known but the line that asked for them. Stacks recorded
    with ``stacks="all"`` have the operators too.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from attnprof.vocabulary import Category, Phase

OWN_FILES = {
    "attnprof/category": "category",
    "attnprof/layer": "layer",
    "attnprof/op": "op",
    "attnprof/phase": "phase",
}
"""File names of the frames in which attnprof's exports say what they know, and the columns of
`Run.allocations` that these say. A snapshot has no better place for names."""

Frame = tuple[str, str]
"""File and function."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a stack says; None where it says nothing."""

    phase: Phase | None = None
    category: Category | None = None
    op: str | None = None
    """The operator, as in ``aten::bmm``."""
    place: str = ""
    """The line of the program that asked: file, line and function."""
    is_python: bool = False
    """Whether Python ran in the thread. Autograd's threads for CUDA run without."""


_OPERATOR = re.compile(r"^at::_ops::(?:_ops::)?(\w+)::(?:call|redispatch)\b")
_PLAIN_OPERATORS = re.compile(
    r"(?:new_)?(?:empty|zeros|ones|full)(?:_|$)|resize|set_|clone|_to_copy|to_|copy_|contiguous"
)
"""Operators that only make room or copy: what they are for is said by who calls them."""

_WORKSPACE = re.compile(r"^at::(?:cuda|native)::\w*Workspace")
_OPTIMIZER_FILE = re.compile(r"/torch/optim/")
_ENGINE = re.compile(r"^torch::autograd::(?:Engine|python::PythonEngine)::")
_BACKWARD_FUNCTIONS = {"_engine_run_backward", "backward"}
_AUTOGRAD_FILE = re.compile(r"/torch/(?:autograd/|_tensor\.py)")
_CHECKPOINT_FILE = re.compile(r"/torch/utils/checkpoint\.py$")
_CHECKPOINT_FUNCTIONS = {"backward", "unpack_hook", "recompute_fn", "recompute_fn_and_replay"}
_MODULE_FILE = re.compile(r"/torch/nn/modules/module\.py$")
_CALLS = {"_call_impl", "_wrapped_call_impl", "__call__", "_slow_forward"}
_MOVES = {"_apply", "to", "cuda", "to_empty", "half", "bfloat16", "float"}
_LAYERS_FILE = re.compile(r"/torch/nn/(?:modules/\w+|parameter|init)\.py$")
_LOADER_FILE = re.compile(r"/torch/utils/data/")
_TORCH_FILE = re.compile(r"/(?:torch|torchgen|functorch)/")
_STDLIB_FILE = re.compile(r"/python3[^/]*/(?!site-packages|dist-packages)[^/]+(?:/|$)")
_CODE_FILE = re.compile(r"\.py$|^<|\.ipynb$")

_MASK = re.compile(r"(?:^|_)mask(?:_|s?$)|^(?:causal|attention|attn)_mask")
_CACHE = re.compile(r"kv_?cache|(?:^|/)(?:\w*_)?cache_?utils\.py$|paged_?attention")
_FUSED = re.compile(r"_flash_attention|_efficient_attention|_cudnn_attention|^flash_attn|_fmha")
_MATH = re.compile(r"_scaled_dot_product_attention_math")
_SOFTMAX = re.compile(r"^_?(?:safe_)?softmax(?:_|$)")
_SOFTMAX_BACKWARD = re.compile(r"softmax_backward")
_LOSS = re.compile(r"log_softmax|nll_loss|cross_entropy")


def read_stack(frames: Iterable[tuple[str, int, str]]) -> Meaning:
    """Return what a stack says.

    Args:
        frames: File, line and function, innermost first.
    """
    frames = list(frames)
    if frames and all(filename in OWN_FILES for filename, _, _ in frames):
        return _read_own({OWN_FILES[filename]: name for filename, _, name in frames})
    python: list[tuple[str, int, str]] = []
    operators: list[str] = []
    engine = accumulates = is_workspace = False
    for path, line, name in frames:
        filename = path.replace("\\", "/")  # recorded on Windows
        if _CODE_FILE.search(filename) and "::" not in name:
            python.append((filename, line, name))
        elif found := _OPERATOR.match(name):
            operators.append(found[1])
        elif _ENGINE.match(name):
            engine = True
        elif name.startswith("torch::autograd::AccumulateGrad"):
            accumulates = True
        elif not operators and not python and _WORKSPACE.match(name):
            is_workspace = True
    phase = _find_phase([(f, n) for f, _, n in python], engine)
    if is_workspace or accumulates:
        category: Category | None = Category.WORKSPACE if is_workspace else Category.GRADIENTS
    else:
        words = _Words(tuple((f, n) for f, _, n in python), tuple(operators))
        category = _find_category(words, phase)
    return Meaning(
        phase=phase,
        category=category,
        op=_name_operator(operators),
        place=_find_place(python),
        is_python=bool(python),
    )


def _read_own(words: dict[str, str]) -> Meaning:
    """Read the frames of a snapshot that attnprof wrote."""
    phase, category = words.get("phase", ""), words.get("category", "")
    return Meaning(
        phase=Phase(phase) if phase in set(Phase) else None,
        category=Category(category) if category in set(Category) else None,
        op=words.get("op"),
        place=words.get("layer", ""),
    )


@dataclass(frozen=True, slots=True)
class _Words:
    """The names in a stack, innermost first."""

    python: tuple[Frame, ...]
    operators: tuple[str, ...]

    def has_operator(self, pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(name) for name in self.operators)

    def has_function(self, pattern: re.Pattern[str]) -> bool:
        """Return whether one of the program's own functions or files has a name like that."""
        own = [(f, n) for f, n in self.python if not _TORCH_FILE.search(f)]
        return any(pattern.search(n) or pattern.search(f) for f, n in own)

    def is_in(self, file: re.Pattern[str], functions: set[str] | None = None) -> bool:
        return any(file.search(f) and (not functions or n in functions) for f, n in self.python)


def _find_phase(python: list[Frame], engine: bool) -> Phase | None:
    """Return the phase: the innermost frame that tells decides.

    A module that is called in an optimizer's step runs a forward (a closure); one that is called in
    backward is repeated by checkpointing.
    """
    is_called = False
    for filename, name in python:
        is_called |= bool(_MODULE_FILE.search(filename)) and name in _CALLS
        if _OPTIMIZER_FILE.search(filename):
            return Phase.FORWARD if is_called else Phase.OPTIMIZER
        if _CHECKPOINT_FILE.search(filename) and name in _CHECKPOINT_FUNCTIONS:
            return Phase.RECOMPUTE
        if _AUTOGRAD_FILE.search(filename) and name in _BACKWARD_FUNCTIONS:
            return Phase.BACKWARD
    if engine:
        return Phase.BACKWARD
    return Phase.FORWARD if is_called else None


def _find_category(words: _Words, phase: Phase | None) -> Category | None:
    """Return what the names say the memory is for."""
    if phase is Phase.OPTIMIZER:
        is_state = words.is_in(_OPTIMIZER_FILE, {"_init_group"})
        return Category.OPTIMIZER_STATE if is_state else None
    if attention := _find_attention(words):
        return attention
    if words.is_in(_LOADER_FILE):
        return Category.INPUTS
    if phase is None and words.is_in(_MODULE_FILE, _MOVES):
        return Category.PARAMETERS
    if phase is None and words.is_in(_LAYERS_FILE, {"__init__", "reset_parameters", "__new__"}):
        return Category.PARAMETERS
    return None


def _find_attention(words: _Words) -> Category | None:
    if words.has_operator(_LOSS) or any(_LOSS.search(name) for _, name in words.python):
        return None
    innermost = words.python[0] if words.python else ("", "")
    if words.has_operator(_SOFTMAX_BACKWARD):
        return Category.ATTENTION_SCORES  # the gradient of a softmax's input is one of scores
    if words.has_operator(_SOFTMAX) or (
        _TORCH_FILE.search(innermost[0]) and innermost[1] == "softmax"
    ):
        return Category.SOFTMAX
    if words.has_operator(_FUSED) or any(_FUSED.search(name) for _, name in words.python):
        return Category.ATTENTION_IO
    if words.has_operator(_MATH):
        return Category.ATTENTION_SCORES
    if words.has_function(_MASK):
        return Category.ATTENTION_MASK
    if words.has_function(_CACHE):
        return Category.KV_CACHE
    return None


def _name_operator(operators: list[str]) -> str | None:
    """Return the innermost operator that does more than make room."""
    named = next((op for op in operators if not _PLAIN_OPERATORS.match(op)), None)
    chosen = named or (operators[-1] if operators else None)
    return f"aten::{chosen}" if chosen else None


def _find_place(python: list[tuple[str, int, str]]) -> str:
    """Return the innermost line that is neither torch's nor Python's own."""
    own = (f for f in python if not _TORCH_FILE.search(f[0]) and not _STDLIB_FILE.search(f[0]))
    found = next(own, python[0] if python else None)
    if found is None:
        return ""
    filename, line, name = found
    return f"{filename.rpartition('/')[2]}:{line} {name}"
