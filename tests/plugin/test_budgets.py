"""The marker memory_budget: what it counts, and what a broken limit says."""

import re

import pytest
from plugin_models import BATCH, HEADS, Run

import attnprof
from attnprof.units import format_bytes
from tests.versions import needs_compiled_code

N = 48
SOFTMAX = 4 * BATCH * HEADS * N * N
"""One layer's softmax result in float32; its gradient and the scores are as large."""
KV_OF_LAYER = 2 * 2 * 8 * 4
"""Per token of the Llama below: K and V of two heads of 8 in float32."""

GPT2 = f"""
    import pytest
    from plugin_models import make_gpt2, train

    N = {N}
    SOFTMAX = {SOFTMAX}

    @pytest.fixture(scope="module")
    def model():
        return make_gpt2()
"""


def test_budget_that_holds_passes(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        GPT2
        + """
    @pytest.mark.memory_budget(
        "4 MiB",
        attention_scores=2 * SOFTMAX,
        softmax=3 * SOFTMAX,
        saved_softmax=2 * SOFTMAX,
        kv_cache=0,
        per_layer={"softmax": 2 * SOFTMAX, "saved_softmax": SOFTMAX},
    )
    def test_step(model):
        train(model, N)
        model.zero_grad()
    """
    )
    run("-q").assert_outcomes(passed=1)


def test_broken_budget_says_limit_measured_excess_holders_and_command(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        GPT2
        + """
    @pytest.mark.memory_budget(softmax="36 KiB")
    def test_step(model):
        train(model, N)
    """
    )
    result = run("-q")
    result.assert_outcomes(failed=1)
    most = 3 * SOFTMAX  # both layers' results, and the gradient of one
    limit = 36 * 1024
    percent = f"{100 * (most - limit) / limit:.0f}"
    result.stdout.fnmatch_lines(
        [
            f"softmax was {format_bytes(most)}, limit 36.0 KiB: {format_bytes(most - limit)} "
            f"({percent} %) too much [[]memory_budget]",
            "    live at once, in backward of transformer.h.1.attn:",
            f"       {format_bytes(2 * SOFTMAX)}  softmax in transformer.h.[[]0-1].attn, made by "
            "aten::_softmax (2 blocks)",
            f"        {format_bytes(SOFTMAX)}  softmax in transformer.h.1.attn, made by aten::bmm",
            "To see every byte: attnprof report .pytest_cache/*",
        ],
        consecutive=True,
    )
    result.stdout.fnmatch_lines(["FAILED *::test_step - LimitBroken: softmax was *"])
    result.stdout.no_fnmatch_line("*Traceback*")
    kept = re.search(r"attnprof report (\S+)", result.stdout.str())
    assert kept is not None
    peak = attnprof.load(pytester.path / kept[1]).peak()
    assert peak.by_category()["softmax"] <= most
    assert sum(peak.by_category().values()) == peak.total_bytes


def test_every_kind_of_limit_breaks(pytester: pytest.Pytester, run: Run) -> None:
    """Each one byte under what is needed, but ``reserved``, whose unit is a segment."""
    pytester.makepyfile(
        GPT2
        + """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    KEPT = []

    @pytest.mark.memory_budget(peak=4 * 600 - 1)
    def test_peak():
        torch.ones(300) * 2

    @pytest.mark.memory_budget(attention_scores=2 * SOFTMAX - 1)
    def test_category(model):
        train(model, N)

    @pytest.mark.memory_budget(saved_softmax=2 * SOFTMAX - 1)
    def test_saved(model):
        train(model, N)

    @pytest.mark.memory_budget(per_layer={"softmax": 2 * SOFTMAX - 1})
    def test_layer(model):
        train(model, N)

    @pytest.mark.memory_budget(reserved="2 MiB")
    def test_reserved():
        torch.ones(2**19 + 1)

    @pytest.mark.memory_budget(leaked=4 * 100 - 1)
    def test_leaked():
        KEPT.append(torch.ones(100))

    @pytest.fixture
    def llama():
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=None,
        ))

    @pytest.mark.memory_budget(kv_cache_per_token=2 * 2 * 8 * 4 * 3 - 1)
    def test_cache(llama):
        llama.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=3, do_sample=False)
    """
    )
    result = run("-q")
    result.assert_outcomes(failed=7)
    one, two = format_bytes(SOFTMAX), format_bytes(2 * SOFTMAX)
    result.stdout.fnmatch_lines(
        [
            "peak was 2.3 KiB, limit 2.3 KiB: 1 B (0.042 %) too much [[]memory_budget]",
            "*1.2 KiB  temporaries, made by aten::mul.Tensor",
            f"attention_scores was {two}, limit {two}: 1 B *",
            f"saved_softmax was {two}, limit {two}: 1 B *",
            "    by layer:",
            f"*{one}  transformer.h.[[]0-1].attn, each",
            f"softmax was {two} in transformer.h.*.attn, limit {two} per layer: 1 B *",
            "reserved was 20.0 MiB (simulated), limit 2.0 MiB: 18.0 MiB (900 %) too much *",
            "    tensors had 2.0 MiB of it at most, live at once, outside of any module:",
            "leaked was 400 B, limit 399 B: 1 B (0.25 %) too much [[]memory_budget]",
            "    made by the test and live when it had ended:",
            "*400 B  temporaries, made by aten::ones",
            f"kv_cache_per_token was {3 * KV_OF_LAYER} B, limit {3 * KV_OF_LAYER - 1} B: 1 B *",
            f"*{KV_OF_LAYER} B  model.layers.[[]0-2].self_attn, each",
        ]
    )


def test_only_what_the_body_makes_or_uses_counts(pytester: pytest.Pytester, run: Run) -> None:
    """Not what earlier tests left, what fixtures of any scope made, nor cycles that are garbage."""
    pytester.makepyfile(
        """
        import pytest, torch

        LEFT = []

        class Knot:
            def __init__(self):
                self.me, self.tensor = self, torch.ones(1000) * 2

        def make(scope):
            @pytest.fixture(scope=scope, autouse=True)
            def big():
                yield torch.ones(10_000) * 2
                torch.ones(10_000) * 2
            return big

        by_session, by_package, by_module, by_class, by_function = map(
            make, ["session", "package", "module", "class", "function"]
        )

        @pytest.fixture
        def weight():
            return torch.ones(500)

        def test_leaves_behind():
            LEFT.append(torch.ones(10_000) * 2)
            Knot()

        class TestAfter:
            @pytest.mark.memory_budget(peak=8 * 100, leaked=0)
            def test_own(self):
                torch.ones(100) * 2

            @pytest.mark.memory_budget(peak=4 * 500 - 1)
            def test_uses_fixture(self, weight):
                weight.view(50, 10).sum()

            @pytest.mark.memory_budget(peak=8 * 1000, leaked=0)
            def test_knot(self):
                Knot()
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["FAILED *::test_uses_fixture - *peak was 2.0 KiB*"])


def test_closer_budget_wins_limit_by_limit(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        pytestmark = pytest.mark.memory_budget(peak="1 GiB", leaked=0)
        KEPT = []

        @pytest.mark.memory_budget(peak=10, temporaries=0)
        class TestBoth:
            @pytest.mark.memory_budget(peak=400)
            def test_body(self):
                KEPT.append(torch.ones(100))
        """
    )
    result = run("-q")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["leaked was 400 B, *", "temporaries was 400 B, limit 0 B: *"])
    result.stdout.no_fnmatch_line("peak was*")


def test_broken_budget_without_a_cache_says_how_to_see_more(
    pytester: pytest.Pytester, run: Run
) -> None:
    folder = pytester.mkdir("sub dir")
    (folder / "test_one.py").write_text(
        "import pytest, torch\n"
        "@pytest.mark.memory_budget(1)\n"
        "@pytest.mark.parametrize('x', ['a b'])\n"
        "def test_x(x): torch.ones(2)\n"
    )
    result = run("-q", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(
        ["To see every byte: pytest 'sub dir/test_one.py::test_x[[]a b]' --attnprof-html DIR"]
    )


@pytest.mark.parametrize(
    "arguments",
    [["-o", "cache_dir=file.txt/cache"], ["--attnprof-html", "pages"]],
    ids=["cache", "pages"],
)
def test_broken_budget_is_told_where_its_run_cannot_be_kept(
    pytester: pytest.Pytester, run: Run, arguments: list[str]
) -> None:
    pytester.makefile(".txt", file="")
    pytester.makepyfile(
        """
        import pathlib, pytest, torch

        @pytest.mark.memory_budget(0)
        def test_x():
            for path in pathlib.Path.cwd().glob("pages"):  # which was made when pytest began
                path.rmdir()
                path.write_text("in the way")
            torch.ones(2)
        """
    )
    result = run("-q", "-W", "ignore::pytest.PytestCacheWarning", *arguments)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "peak was 8 B, limit 0 B: 8 B too much [[]memory_budget]",
            "To see every byte: pytest *::test_x --attnprof-html DIR",
        ]
    )
    result.stdout.no_fnmatch_line("*Error*")


def test_broken_peak_says_what_most_of_it_is_and_sums_the_rest(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        """
        import pytest, torch
        from torch import nn

        @pytest.fixture
        def layer():
            return nn.Linear(64, 64, bias=False)

        @pytest.mark.memory_budget("64 KiB")
        def test_x(layer):
            a, b, c = torch.zeros(2**13), torch.ones(2**12), torch.full((2**11,), 1.0)
            d, e, f = torch.rand(2**10), torch.randn(2**9), torch.arange(2**8, dtype=torch.float32)
            g, h = torch.eye(12), torch.empty(112)
            layer(torch.empty_like(layer.weight))
        """
    )
    result = run("-q")
    total = 32 + 4 * 16 + 8 + 4 + 2 + 1 + 1  # KiB; weight, input and output are 16 each
    temporaries = total - 3 * 16
    result.stdout.fnmatch_lines(
        [
            f"peak was {total}.0 KiB, limit 64.0 KiB: *",
            f"    live at once, in forward of Linear ({100 * temporaries / total:.0f} % "
            f"temporaries, {100 * 16 / total:.0f} % activations, *):",
            "        32.0 KiB  temporaries, made by aten::zeros",
            f"         {4 + 2 + 1 + 1}.0 KiB  in 5 smaller ones",
        ]
    )


def test_excess_is_never_rounded_to_nothing(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.mark.memory_budget(2**20 - 1)
        def test_x():
            torch.ones(2**18)
        """
    )
    run("-q").stdout.fnmatch_lines(["peak was 1.0 MiB, limit 1.0 MiB: 1 B (<0.01 %) too much *"])


@needs_compiled_code
def test_compiled_module_is_doubted(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.mark.memory_budget("1 MiB")
        def test_compiled():
            torch.compile(torch.nn.Linear(4, 4), backend="eager")(torch.ones(4))
        """
    )
    result = run("-q", "-W", "default")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*test_compiled: compiled code ran, and what its kernels take inside is not all counted"]
    )
