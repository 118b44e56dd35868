"""The sentence about growth: the law in plain terms, and no more than the points say."""

from dataclasses import replace

import pytest
from growth_summaries import (
    LAWS,
    LAYERS,
    PARAMETERS,
    Law,
    fit_category,
    make_fits,
    make_points,
    make_summary,
)

from attnprof.analysis.fits import TOTAL
from attnprof.analysis.wall import Wall
from attnprof.report.growth_summary import Capacity, GrowthSummary, Point
from attnprof.report.growth_verdict import format_exponent, format_law, write_growth_verdict
from attnprof.units import format_bytes


def summarise(points: list[Point], **changes: object) -> GrowthSummary:
    """Return a summary of nothing but points and their fits."""
    fits = make_fits(points) if len([p for p in points if p.is_done]) > 1 else {}
    summary = GrowthSummary("make_step", None, tuple(points), fits=fits)
    return replace(summary, **changes)  # type: ignore[arg-type]  # the fields of a summary


def test_verdict_names_law_holder_and_wall() -> None:
    assert write_growth_verdict(make_summary()) == (
        f"Peak memory grows with n²: 768 n² + 786,432 n bytes + {format_bytes(PARAMETERS)}; "
        f"at n = 2,048, 65 % of it is softmax in {LAYERS} layers; "
        "the wall on A100 80GB is n = 8,730."
    )


@pytest.mark.parametrize(
    ("law", "said"),
    [
        (lambda n: 7 * 2**20, "does not grow with n: it stays at 7.0 MiB."),
        (lambda n: 4096 * n, "grows with n: 4,096 n bytes."),
        (lambda n: 8 * n * n, "grows with n²: 8 n² bytes."),
        (lambda n: 4096 * n + n * n, "grows with n, from n = 4,096 on mostly with n²: 1 n² + "),
    ],
)
def test_verdict_says_which_power(law: Law, said: str) -> None:
    points = make_points((256, 512, 1024, 2048), laws={"softmax": law})
    assert f"Peak memory {said}" in write_growth_verdict(summarise(points))


def test_verdict_of_a_workload_without_tensors_does_not_call_it_unfinished() -> None:
    summary = GrowthSummary("make_step", None, (Point(4, "measured", "completed"),))
    assert write_growth_verdict(summary).startswith("Nothing was recorded: the workload makes no")


def test_verdict_of_dry_runs_says_so() -> None:
    points = make_points((256, 512, 1024), source="dry_run")
    assert write_growth_verdict(summarise(points)).startswith("By dry runs, peak memory grows")


def test_verdict_of_steps_says_so() -> None:
    points = make_points((256, 512, 1024), source="steps")
    verdict = write_growth_verdict(summarise(points))
    assert verdict.startswith("Over the steps of this run, peak memory grows")


def test_verdict_of_two_lengths_is_modest() -> None:
    points = make_points((256, 512), laws={"softmax": lambda n: n * n})
    assert ", as far as two lengths can tell" in write_growth_verdict(summarise(points))


def test_verdict_of_one_length_names_no_law() -> None:
    points = make_points((256,), laws={"softmax": lambda n: 2**20})
    assert write_growth_verdict(summarise(points)) == (
        "Memory is known at one length only, 1.0 MiB at n = 256, so how it grows cannot be told."
    )


def test_verdict_without_completed_lengths_says_why() -> None:
    failed = Point(64, "measured", "failed", "ValueError: no such length")
    assert write_growth_verdict(summarise([failed])) == (
        "No length was completed: n = 64 ended failed (ValueError: no such length)."
    )
    assert "No length was run" in write_growth_verdict(summarise([]))


def test_verdict_of_a_change_of_law_says_where() -> None:
    def law(n: int) -> int:
        return 4096 * n if n <= 512 else 64 * n * n

    points = make_points((64, 128, 256, 512, 1024, 2048, 4096, 8192), laws={"softmax": law})
    verdict = write_growth_verdict(summarise(points))
    assert "grows with n²: 64 n² bytes from n = 1,024 on (linear before)" in verdict


def test_verdict_of_lawless_points_claims_no_law() -> None:
    sizes = {256: 2**20, 512: 2**28, 1024: 2**21, 2048: 2**29}
    points = make_points(tuple(sizes), laws={"softmax": sizes.__getitem__})
    assert "by no law c0 + c1·n + c2·n²" in write_growth_verdict(summarise(points))


def test_verdict_of_a_category_speaks_of_it() -> None:
    verdict = write_growth_verdict(replace(make_summary(), focus="activations"))
    assert verdict.startswith(
        "The memory of activations grows with n: 786,432 n bytes; at n = 2,048 it is 32 % of the "
    )


def test_verdict_of_running_out_of_memory_names_both_lengths() -> None:
    wall = Wall(
        seq_len=2048, peak_bytes=1, next_seq_len=4096, next_bytes=None, capacity_bytes=None,
        by="measured", counts="live",
    )  # fmt: skip
    summary = replace(make_summary(), capacities=(Capacity("memory", None, wall),))
    assert write_growth_verdict(summary).endswith(
        "; n = 2,048 fits and n = 4,096 ran out of memory."
    )


def test_verdict_says_when_nothing_fits() -> None:
    wall = Wall(
        seq_len=0, peak_bytes=0, next_seq_len=1, next_bytes=PARAMETERS, capacity_bytes=10**6,
        by="fit", counts="live",
    )  # fmt: skip
    summary = replace(make_summary(), capacities=(Capacity("1 MB", 10**6, wall),))
    assert write_growth_verdict(summary).endswith("; no length fits into 1 MB.")


def test_law_leaves_out_a_constant_that_does_not_matter() -> None:
    points = make_points((256, 512, 1024), laws={"softmax": lambda n: 100 * n * n + 5})
    fit = fit_category(points, "softmax")
    assert format_law(fit.pieces[fit.phase][-1]) == "100 n² bytes"


def test_exponent_has_an_interval_only_where_it_has_a_width() -> None:
    exact = fit_category(make_points((256, 512, 1024, 2048)), "softmax")
    assert format_exponent(exact) == "n^2.00"
    mixed = fit_category(make_points((256, 512, 1024, 2048)), TOTAL)
    low, high = mixed.exponent_interval or (0, 0)
    assert format_exponent(mixed) == f"n^{mixed.exponent:.2f} ({low:.2f}–{high:.2f})"
    assert low < high


def test_categories_of_the_example_sum_to_its_total() -> None:
    (point,) = make_points((512,))
    assert sum(point.sizes[name] for name in LAWS) == point.sizes[TOTAL]
