"""The marker memory_budget: what is counted for layers, where layers are not all alike."""

import pytest
from plugin_models import Run

from attnprof.units import format_bytes


def test_attention_of_the_model_itself_is_a_layer(pytester: pytest.Pytester, run: Run) -> None:
    """Beside one in a submodule, and both without a module's name in the other test."""
    pytester.makepyfile(
        """
        import pytest, torch
        from torch import nn

        def attend(x):
            return (x @ x.mT).softmax(-1) @ x

        class Inner(nn.Module):
            def forward(self, x):
                return attend(x)

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.mix = Inner(), nn.Linear(8, 8)

            def forward(self, x):
                x = self.mix(x)
                return attend(x).sum() + self.inner(x[:, :8]).sum()

        SIZE = 4 * 32 * 32

        @pytest.mark.memory_budget(per_layer={"softmax": SIZE - 1})
        def test_model():
            Outer()(torch.randn(1, 32, 8))

        @pytest.mark.memory_budget(per_layer={"softmax": SIZE - 1})
        def test_no_model():
            attend(torch.randn(1, 32, 8, requires_grad=True))
        """
    )
    result = run("-q")
    result.assert_outcomes(failed=2)
    broken = "softmax was 4.0 KiB outside of submodules, limit 4.0 KiB per layer: 1 B *"
    by_layer = ["    by layer:", "         4.0 KiB  outside of submodules"]
    result.stdout.fnmatch_lines([broken, *by_layer, f"           {4 * 8 * 8} B  inner"])
    result.stdout.fnmatch_lines(["*_ test_no_model _*", broken, *by_layer])


def test_saved_softmax_counts_every_call_of_a_shared_layer(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        """
        import pytest, torch
        from torch import nn

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix = nn.Linear(8, 8)

            def forward(self, x):
                x = self.mix(x)
                return (x @ x.mT).softmax(-1) @ x

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = Layer()

            def forward(self, x):
                return self.layer(self.layer(self.layer(x)))

        @pytest.mark.memory_budget(saved_softmax=3 * 4 * 32 * 32)
        def test_steps():
            model = Model()
            for _ in range(2):  # one after the other: the second keeps what the first gave back
                model(torch.randn(1, 32, 8)).sum().backward()

        @pytest.mark.memory_budget(saved_softmax=6 * 4 * 32 * 32 - 1)
        def test_two_at_once():
            model = Model()
            sum(model(torch.randn(1, 32, 8)).sum() for _ in range(2)).backward()
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=1)
    six = format_bytes(6 * 4 * 32 * 32)
    result.stdout.fnmatch_lines(
        [f"saved_softmax was {six}, limit {six}: 1 B *", "    by layer:", f"*{six}  layer"]
    )
