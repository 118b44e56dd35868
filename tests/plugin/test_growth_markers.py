"""The marker memory_growth: the test itself at every length, or the marker's ``make_step``."""

import re

import pytest
from plugin_models import BATCH, HEADS, LAYERS, Run

import attnprof


def test_growth_of_the_test_itself(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from plugin_models import make_gpt2, train

        @pytest.fixture(scope="module", params=["sdpa", "eager"])
        def model(request):
            return make_gpt2(request.param)

        @pytest.mark.memory_growth(seq_lens=[32, 64, 128, 256], at_most="linear")
        def test_linear(model, seq_len):
            train(model, seq_len)
            model.zero_grad()
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*_ test_linear[[]eager-growth] _*",
            "total grows as n^1.?? (95 %: ?.??–?.??) in backward, limit linear: it is * + "
            "quadratic, * n² * bytes* [[]memory_growth]",
            "*  at seq_len 32",
            "*  at seq_len 64",
            "*  at seq_len 128",
            "*  at seq_len 256",
            "    what grows so, live at once, in backward of *, at seq_len 256:",
            "*softmax in transformer.h.*",
            "To see every byte: attnprof report .pytest_cache/*",
        ]
    )
    kept = re.search(r"attnprof report (\S+)", result.stdout.str())
    assert kept is not None
    growth = attnprof.Growth.load(pytester.path / kept[1])
    assert [length.seq_len for length in growth.lengths] == [32, 64, 128, 256]


def test_growth_by_category_and_exponent(pytester: pytest.Pytester, run: Run) -> None:
    """Saved results of all layers and the gradient of one: the law of them is known."""
    pytester.makepyfile(
        """
        import pytest
        from plugin_models import make_gpt2, train

        growth = pytest.mark.memory_growth
        lengths = [16, 32, 64, 128]

        @pytest.fixture(scope="module")
        def model():
            return make_gpt2()

        @growth(lengths, category="softmax", exponent=1.5)
        @growth(lengths, category="activations", at_most="linear")
        @growth(lengths, category="recurrent_state", at_most="constant")
        def test_three_laws(model, seq_len):
            train(model, seq_len)

        @growth(lengths, category="softmax", at_most="quadratic")
        @growth(lengths, category="softmax", exponent=2)
        def test_squares_allowed(model, seq_len):
            train(model, seq_len)
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=1)
    quadratic = 4 * BATCH * HEADS * (LAYERS + 1)
    result.stdout.fnmatch_lines(
        [
            "softmax grows as n^2.00 (95 %: 2.00–2.00) in backward, limit n^1.5: it is quadratic, "
            f"{quadratic} n² bytes [[]memory_growth]"
        ]
    )
    result.stdout.no_fnmatch_line("activations grows*")


def test_growth_of_make_step(pytester: pytest.Pytester, run: Run) -> None:
    """The body runs once beside it, and a budget holds for all of them."""
    pytester.makepyfile(
        """
        import pytest, torch
        from plugin_models import make_gpt2, make_step

        def make_training_model(seq_len, device):
            model = make_gpt2("sdpa", positions=seq_len)
            return lambda: model(torch.zeros(1, seq_len, dtype=torch.int64)).logits

        @pytest.mark.memory_growth([16, 32, 64], make_step=make_training_model, at_most="linear")
        def test_linear():
            pass

        @pytest.mark.memory_growth([16, 32, 64], make_step=make_step, exponent=1.1, dry_run=True)
        @pytest.mark.memory_budget(softmax=0)
        def test_materialised():
            torch.ones(3).softmax(0)
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "at seq_len 16, softmax was * KiB, limit 0 B: * KiB too much [[]memory_budget]",
            "total grows as n^1.?? (four lengths would give an interval) in *, limit n^1.1: *",
            "To see every byte: attnprof report .pytest_cache/*/dry_run-000000016",
            "To see every byte: attnprof report .pytest_cache/*",
        ]
    )


def test_dry_growth_takes_no_memory(pytester: pytest.Pytester, run: Run) -> None:
    """At a million tokens the scores are terabytes; without attention it is linear."""
    pytester.makepyfile(
        """
        import pytest, torch
        from torch import nn

        def attend(seq_len, heads):
            q, k, v = (torch.randn(1, heads, seq_len, 8, requires_grad=True) for _ in range(3))
            ((q @ k.mT).softmax(-1) @ v).sum().backward()

        @pytest.mark.memory_growth(["256K", "512K", "1M"], at_most="linear", dry_run=True)
        @pytest.mark.memory_budget(softmax="80 GB")
        @pytest.mark.parametrize("heads", [2])
        def test_attention(seq_len, heads):
            attend(seq_len, heads)

        class TestLinear:
            @pytest.mark.memory_growth(["256K", "512K", "1M"], at_most="linear", dry_run=True)
            def test_linear(self, seq_len):
                nn.Linear(8, 8)(torch.randn(seq_len, 8)).relu().sum().backward()

        @pytest.fixture
        def model():
            return nn.Linear(8, 8)

        @pytest.mark.memory_growth([16, 32, 64], at_most="linear", dry_run=True)
        def test_model_from_outside(model, seq_len):
            model(torch.randn(seq_len, 8))
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=2)
    once = 4 * 2 * 2**36  # bytes of one result of two heads at 256K tokens
    result.stdout.fnmatch_lines(
        [
            f"at seq_len 262,144, softmax was {2 * once / 2**40:.2f} TiB, limit 74.51 GiB: *",
            "total grows as n^2.00 *, limit linear: it is quadratic, 24 n² bytes *",
            "memory_growth: no dry run of the test at seq_len 16: *test_dry_growth*; build the "
            "model in the body of the test, so that the dry run can build one without memory and *",
        ]
    )
    result.stdout.no_fnmatch_line("*another exception occurred*")


def test_dry_growth_says_where_a_value_was_guessed(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        test_a="""
        import pytest, torch

        @pytest.mark.memory_growth([16, 32, 64], at_most="linear", dry_run=True)
        def test_branch(seq_len):
            if torch.randn(seq_len).sum().item() < 0:
                torch.ones(seq_len, seq_len)
        """
    )
    result = run("-q", "-W", "default")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*this is a dry run, in which a value that a dry run cannot know was read as 1.0 at *"]
    )


def test_growth_beyond_the_square(pytester: pytest.Pytester, run: Run) -> None:
    """Pairs of n tokens are bent more than n² at short lengths, and are quadratic all the same."""
    pytester.makepyfile(
        """
        import pytest, torch

        growth = pytest.mark.memory_growth

        @growth([16, 32, 64, 128], at_most="quadratic")
        def test_cube(seq_len):
            torch.ones(seq_len, seq_len, seq_len // 16)

        @growth([8, 16, 32, 64], at_most="quadratic")
        def test_pairs(seq_len):
            torch.ones(seq_len * (seq_len - 1) // 2)

        @growth([8, 16, 32], at_most="quadratic")
        def test_pairs_at_few_lengths(seq_len):
            torch.ones(seq_len * (seq_len - 1) // 2)

        @growth([16, 32, 64, 128], category="softmax", at_most="linear")
        def test_only_at_the_longest(seq_len):
            x = torch.randn(seq_len, 4, requires_grad=True)
            if seq_len == 128:
                (x @ x.mT).softmax(-1) @ x
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "total grows as n^3.00 (95 %: 3.00–3.00) outside of any module, limit quadratic: it is "
            "faster than quadratic; the closest law, * n² bytes, misses by up to * % *",
            "softmax grows (these lengths do not tell by what power of n) outside of any module, "
            "limit linear: it is quadratic, * n² bytes; the law misses by up to * %*",
        ]
    )


def test_growth_that_cannot_be_told(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.mark.memory_growth([16, 32, 64], at_most="linear")
        def test_empty(seq_len):
            pass

        @pytest.mark.memory_growth([16, 32, 64], at_most="linear")
        def test_breaks_at_one_length(seq_len):
            assert torch.ones(seq_len).sum() < 30

        @pytest.mark.memory_growth([16, 32, 64], at_most="linear")
        def test_skips_at_one_length(seq_len):
            if seq_len > 30:
                pytest.skip("too long")

        def make_step(seq_len, device):
            return lambda: torch.ones(20)[seq_len]

        @pytest.mark.memory_growth([16, 32, 64], at_most="linear", make_step=make_step)
        def test_workload_breaks():
            pass

        @pytest.mark.memory_growth([16, 32, 64], at_most="linear", dry_run=True)
        def test_breaks_when_dry(seq_len):
            torch.ones(20)[seq_len]
        """
    )
    result = run("-q")
    result.assert_outcomes(failed=4, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "memory_growth: no tensor was used at any length",
            "E       assert tensor(32.) < 30",
            "E       memory_growth ran the test with seq_len = 32",
            "E * memory_growth ran make_step with seq_len = 32",
            "E * memory_growth ran the test with seq_len = 32",
        ]
    )
