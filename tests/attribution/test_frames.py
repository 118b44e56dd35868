"""What call stacks say, on stacks made by hand; innermost frames first."""

import pytest

from attnprof.attribution.frames import read_stack
from attnprof.vocabulary import Category, Phase

Stack = list[tuple[str, int, str]]

SITE = "/opt/lib/python3.12/site-packages/"
TORCH = SITE + "torch/"
CALL: Stack = [
    (TORCH + "nn/modules/module.py", 1789, "_call_impl"),
    (TORCH + "nn/modules/module.py", 1778, "_wrapped_call_impl"),
]
MAIN: Stack = [("/home/me/train.py", 40, "<module>")]
FORWARD: Stack = [("/home/me/model.py", 12, "forward"), *CALL, *MAIN]
ENGINE: Stack = [
    ("??", 0, "torch::autograd::Engine::evaluate_function(std::shared_ptr<torch::autograd::Node>)"),
    ("??", 0, "torch::autograd::Engine::thread_main(std::shared_ptr<torch::autograd::GraphTask>)"),
]


def op(name: str, how: str = "call") -> tuple[str, int, str]:
    return ("??", 0, f"at::_ops::{name}::{how}(at::Tensor const&)")


@pytest.mark.parametrize(
    ("stack", "phase"),
    [
        (FORWARD, Phase.FORWARD),
        (MAIN, None),
        ([], None),
        (ENGINE, Phase.BACKWARD),
        ([op("mm"), *ENGINE], Phase.BACKWARD),
        ([(TORCH + "autograd/graph.py", 800, "_engine_run_backward"), *MAIN], Phase.BACKWARD),
        ([(TORCH + "optim/adamw.py", 300, "_multi_tensor_adamw"), *MAIN], Phase.OPTIMIZER),
        (
            [
                *FORWARD[:-1],
                (TORCH + "utils/checkpoint.py", 1100, "unpack_hook"),
                (TORCH + "autograd/graph.py", 800, "_engine_run_backward"),
                *MAIN,
            ],
            Phase.RECOMPUTE,
        ),
        # An optimizer that evaluates the loss again: a forward, inside of its step.
        ([*FORWARD[:-1], (TORCH + "optim/lbfgs.py", 300, "step"), *MAIN], Phase.FORWARD),
        # A user's own function that is called backward is not autograd's.
        ([("/home/me/model.py", 3, "backward"), *MAIN], None),
    ],
)
def test_phase_is_read_from_torchs_own_frames(stack: Stack, phase: Phase | None) -> None:
    assert read_stack(stack).phase is phase


@pytest.mark.parametrize(
    ("stack", "category"),
    [
        ([op("_softmax"), *FORWARD], Category.SOFTMAX),
        ([op("_safe_softmax"), *FORWARD], Category.SOFTMAX),
        ([(TORCH + "nn/functional.py", 2100, "softmax"), *FORWARD], Category.SOFTMAX),
        ([op("_log_softmax"), *FORWARD], None),
        ([(TORCH + "nn/functional.py", 3000, "cross_entropy"), *MAIN], None),
        ([op("_softmax_backward_data"), *ENGINE], Category.ATTENTION_SCORES),
        ([op("_scaled_dot_product_flash_attention"), *FORWARD], Category.ATTENTION_IO),
        ([op("_softmax"), op("_scaled_dot_product_attention_math"), *FORWARD], Category.SOFTMAX),
        ([op("bmm"), op("_scaled_dot_product_attention_math")], Category.ATTENTION_SCORES),
        ([("/home/me/flash.py", 9, "_flash_attention_forward"), *FORWARD], Category.ATTENTION_IO),
        ([("/home/me/masks.py", 9, "create_causal_mask"), *FORWARD], Category.ATTENTION_MASK),
        ([("/home/me/m.py", 9, "masked_linear"), *FORWARD], None),
        ([(SITE + "models/cache_utils.py", 99, "update"), *FORWARD], Category.KV_CACHE),
        ([("/home/me/e.py", 9, "allocate_kv_cache"), *MAIN], Category.KV_CACHE),
        ([(TORCH + "nn/modules/module.py", 930, "_apply"), *MAIN], Category.PARAMETERS),
        ([(TORCH + "nn/modules/linear.py", 106, "__init__"), *MAIN], Category.PARAMETERS),
        ([(TORCH + "utils/data/_utils/pin_memory.py", 60, "pin_memory")], Category.INPUTS),
        ([(TORCH + "optim/adamw.py", 120, "_init_group"), *MAIN], Category.OPTIMIZER_STATE),
        ([(TORCH + "optim/adamw.py", 600, "_multi_tensor_adamw"), *MAIN], None),
        ([("??", 0, "torch::autograd::AccumulateGrad::apply()"), *ENGINE], Category.GRADIENTS),
        (
            [("??", 0, "at::cuda::getCUDABlasLtWorkspace()"), op("addmm"), *FORWARD],
            Category.WORKSPACE,
        ),
        ([op("mm"), *FORWARD], None),
        (FORWARD, None),
    ],
)
def test_category_is_read_from_names(stack: Stack, category: Category | None) -> None:
    assert read_stack(stack).category is category


def test_operator_is_the_innermost_that_does_more_than_make_room() -> None:
    stack = [op("empty_memory_format"), op("native_layer_norm", "redispatch"), op("layer_norm")]
    assert read_stack([*stack, *FORWARD]).op == "aten::native_layer_norm"
    assert read_stack([op("empty_like"), op("zeros_like"), *MAIN]).op == "aten::zeros_like"
    assert read_stack(FORWARD).op is None


def test_place_is_the_innermost_line_of_the_program() -> None:
    inside = [(TORCH + "nn/functional.py", 2987, "layer_norm"), *CALL]
    assert read_stack([*inside, *FORWARD]).place == "model.py:12 forward"
    assert read_stack(inside).place == "functional.py:2987 layer_norm"
    assert read_stack(ENGINE).place == ""


def test_windows_paths_are_read() -> None:
    stack = [
        (r"C:\py\Lib\site-packages\torch\optim\sgd.py", 1, "step"),
        (r"C:\me\t.py", 2, "<module>"),
    ]
    assert read_stack(stack).phase is Phase.OPTIMIZER
    assert read_stack(stack).place == "t.py:2 <module>"


def test_thread_without_python_is_told() -> None:
    assert read_stack(FORWARD).is_python
    assert not read_stack(ENGINE).is_python


def test_own_frames_say_what_they_say() -> None:
    words = {"category": "softmax", "layer": "h.0.attn", "op": "aten::_softmax", "phase": "forward"}
    meaning = read_stack([(f"attnprof/{key}", 0, word) for key, word in words.items()])
    assert meaning.category is Category.SOFTMAX
    assert meaning.phase is Phase.FORWARD
    assert (meaning.place, meaning.op) == ("h.0.attn", "aten::_softmax")
    assert read_stack([("attnprof/category", 0, "nonsense")]).category is None
