"""Every kind of test that pytest runs, with a marker on it."""

import pytest
from plugin_models import Run

RUNS_COROUTINES = """
    import asyncio, inspect
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(pyfuncitem):
        if inspect.iscoroutinefunction(pyfuncitem.obj):
            arguments = pyfuncitem._fixtureinfo.argnames
            asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in arguments}))
            return True
"""


def test_async_tests_are_measured(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makeconftest(RUNS_COROUTINES)
    pytester.makepyfile(
        """
        import asyncio
        import pytest, torch

        @pytest.mark.memory_budget(400)
        @pytest.mark.parametrize("elements", [100, 101])
        async def test_one(elements):
            await asyncio.sleep(0)
            torch.ones(elements)

        @pytest.mark.memory_growth([16, 32, 64], at_most="constant")
        async def test_growth(seq_len):
            await asyncio.sleep(0)
            torch.ones(seq_len)

        @pytest.mark.memory_budget(0)
        async def test_own_failure():
            torch.ones(3)
            raise KeyError("own")
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines(
        [
            "peak was 404 B, limit 400 B: 4 B (1 %) too much [[]memory_budget]",
            "total grows as n^1.00 *, limit constant: it is linear, 4 n bytes *",
            "E       KeyError: 'own'",
        ]
    )


def test_unittest_classes_are_measured(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import unittest
        import pytest, torch

        @pytest.mark.memory_budget(400)
        class TestUnits(unittest.TestCase):
            def setUp(self):
                self.big = torch.ones(10_000)

            def test_holds(self):
                torch.ones(100)

            def test_breaks(self):
                torch.ones(101)

            @unittest.skip("why not")
            def test_skipped(self):
                torch.ones(1000)

            def test_skips_itself(self):
                torch.ones(1000)
                self.skipTest("late")

            def test_own_failure(self):
                torch.ones(1000)
                self.assertEqual(1, 2)

            @unittest.expectedFailure
            def test_expected(self):
                torch.ones(1000)
                self.fail()

            def tearDown(self):
                torch.ones(10_000)

        class TestCoroutines(unittest.IsolatedAsyncioTestCase):
            @pytest.mark.memory_budget(400)
            async def test_coroutine(self):
                torch.ones(102)
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=3, skipped=2, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "peak was 404 B, limit 400 B: *",
            "E       AssertionError: 1 != 2",
            "peak was 408 B, limit 400 B: *",
        ]
    )


def test_skip_and_xfail_mean_what_they_do(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        budget = pytest.mark.memory_budget(400)

        @budget
        @pytest.mark.skip
        def test_skipped():
            raise SystemExit("it ran")

        @budget
        def test_skips_itself():
            torch.ones(1000)
            pytest.skip("late")

        @budget
        @pytest.mark.xfail(strict=True)
        def test_expected_to_break():
            torch.ones(1000)

        @budget
        @pytest.mark.xfail(strict=True)
        def test_unexpectedly_holds():
            torch.ones(10)

        @budget
        @pytest.mark.xfail(run=False)
        def test_not_run():
            raise SystemExit("it ran")
        """
    )
    run("-q").assert_outcomes(skipped=2, xfailed=2, failed=1)


def test_own_failure_passes_as_it_was_raised(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        class Own(Exception):
            pass

        @pytest.mark.memory_budget(0)
        @pytest.mark.no_materialised_scores
        def test_raises():
            torch.ones(1000)
            raise Own("as it was")

        @pytest.mark.memory_budget(0)
        def test_fails():
            torch.ones(1000)
            pytest.fail("own failure", pytrace=False)
        """
    )
    result = run("-q", "--attnprof")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            '>       raise Own("as it was")',
            "E       test_own_failure_passes_as_it_was_raised.Own: as it was",
            "own failure",
            "no test with a memory marker was measured",
        ]
    )
    result.stdout.no_fnmatch_line("*limit*")
    result.stdout.no_fnmatch_line("*attnprof/pytest_plugin*")


def test_doctest_items_are_measured(pytester: pytest.Pytester, run: Run) -> None:
    """They take markers from hooks only, as `conftest.py` gives them here."""
    pytester.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.memory_budget(400))
        """
    )
    doctest = pytester.makefile(".txt", test_docs=">>> import torch\n>>> _ = torch.ones({})\n")
    text = doctest.read_text()
    doctest.write_text(text.format(100))
    run("-q").assert_outcomes(passed=1)
    doctest.write_text(text.format(101))
    result = run("-q")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["peak was 404 B, limit 400 B: *"])


def test_marker_that_a_fixture_adds_counts(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.fixture(autouse=True)
        def strict(request):
            request.node.add_marker(pytest.mark.memory_budget(400))

        def test_x():
            torch.ones(101)
        """
    )
    run("-q").assert_outcomes(failed=1)


def test_wrong_marker_that_a_fixture_adds_is_told_in_a_line(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        test_a="""
        import pytest

        @pytest.fixture(autouse=True)
        def marked(request):
            request.node.add_marker(pytest.mark.memory_budget("4 MX"))

        def test_x():
            pass
        """
    )
    result = run("-q")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*_ test_x _*", "test_a.py:*: memory_budget: peak: cannot read '4 MX' as a size; *"],
        consecutive=True,
    )


def test_run_is_gone_when_its_test_is_over(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even of a test that failed: its traceback is kept, and in it what still knows the run."""
    folder = pytester.mkdir("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    pytester.makeconftest(
        f"""
        import os

        def pytest_runtest_teardown():
            assert os.listdir({str(folder)!r}) == []
        """
    )
    pytester.makepyfile(
        """
        import pytest, tempfile, torch

        def make_step(seq_len, device):
            return lambda: torch.ones(seq_len)

        @pytest.mark.memory_budget(0)
        def test_breaks():
            torch.ones(1)

        @pytest.mark.memory_budget(0)
        def test_fails():
            torch.ones(1).item(1)

        @pytest.mark.memory_growth([1, 2, 4], at_most="constant", dry_run=True)
        def test_dry(seq_len):
            torch.ones(seq_len)

        @pytest.mark.memory_growth([1, 2, 4], at_most="constant", make_step=make_step)
        def test_workload():
            pass
        """
    )
    run("-q").assert_outcomes(failed=4)


def test_hypothesis_tests_are_measured_over_all_examples(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        """
        import pytest, torch
        from hypothesis import example, given, settings
        from hypothesis import strategies as st

        class TestExamples:
            @pytest.mark.memory_budget(400)
            @pytest.mark.parametrize("most", [100, 101])
            @given(n=st.integers(1, 2))
            @settings(max_examples=3, database=None)
            def test_x(self, n, most):
                torch.ones(most)
        """
    )
    run("-q").assert_outcomes(passed=1, failed=1)


def test_traced_test_is_told_why_it_cannot_be_measured(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest, torch
        import attnprof

        @pytest.fixture
        def traced():
            with attnprof.trace() as tracer:
                yield tracer

        @pytest.mark.memory_budget(400)
        def test_by_fixture(traced):
            pass

        @pytest.mark.memory_budget(400)
        def test_by_itself():
            with attnprof.trace():
                pass

        @pytest.mark.memory_budget(400)
        def test_after_them():
            torch.ones(100)
        """
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "the test cannot be measured for its markers: *",
            "E       attnprof.errors.CaptureError: *",
            "E       The body of a test with a memory marker is traced already: take the marker or "
            "the trace away",
        ]
    )


def test_interrupt_stops_the_session_and_leaves_nothing_traced(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        """
        import pytest, torch

        @pytest.mark.memory_budget(400)
        def test_before():
            torch.ones(100)

        @pytest.mark.memory_budget(400)
        def test_interrupted():
            raise KeyboardInterrupt

        def test_never_run():
            raise SystemExit("it ran")
        """
    )
    result = run("-q", "--attnprof-json", "measured.json", no_reraise_ctrlc=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["wrote *measured.json: 1 test", "*KeyboardInterrupt*"])
    assert run("-q", "-k", "before").ret == pytest.ExitCode.OK


def test_body_that_another_plugin_replaces_is_not_passed_over(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makeconftest(
        """
        import pytest

        @pytest.hookimpl(tryfirst=True)
        def pytest_pyfunc_call(pyfuncitem):
            return True
        """
    )
    pytester.makepyfile(
        "import pytest\n@pytest.mark.memory_budget(0)\ndef test_x(): pass\ndef test_y(): pass\n"
    )
    result = run("-q")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["the test's memory markers were not checked: what ran it did not call item.obj"]
    )
