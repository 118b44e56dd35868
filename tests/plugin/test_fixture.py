"""The fixture that the plugin gives to every test."""

import pytest


def test_fixture_traces_a_part_of_a_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import torch

        def test_product(attnprof_trace):
            a = torch.ones(16, 8)
            with attnprof_trace() as tracer:
                b = a @ a.T
            with attnprof_trace() as second:
                pass
            assert tracer.run.peak().total_bytes == 4 * (16 * 8 + 16 * 16)
            assert second.run.peak().total_bytes == 0
            assert tracer.run.path != second.run.path
        """
    )
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_plugin_imports_no_torch_until_it_is_used(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_without_attnprof():
            assert "torch" not in sys.modules
            assert "polars" not in sys.modules
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
