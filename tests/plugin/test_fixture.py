"""The fixture that the plugin gives to every test."""

import pytest
from plugin_models import Run


def test_fixture_traces_a_part_of_a_test(pytester: pytest.Pytester, run: Run) -> None:
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
    run("-p", "no:cacheprovider").assert_outcomes(passed=1)
