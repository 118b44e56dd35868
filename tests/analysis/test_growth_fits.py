"""Fits of points per phase: the maximum over them, and what they say in a sentence."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis.fits import Fit, fit_points

LENGTHS = [128, 256, 512, 1024, 2048]


def make_fit(
    series: dict[str, list[int]],
    lengths: list[int] = LENGTHS,
    *,
    category: str = "softmax",
    programs: dict[int, int] | None = None,
) -> Fit:
    rows = [(n, p, s) for p, sizes in series.items() for n, s in zip(lengths, sizes, strict=True)]
    columns = {"seq_len": pl.Int64, "phase": pl.String, "peak_bytes": pl.Int64}
    return fit_points(
        pl.DataFrame(rows, schema=columns, orient="row"),
        dict.fromkeys(series or ["forward"], lengths),
        category=category,
        source="measured",
        programs=programs,
    )


def test_fit_gives_coefficients_per_phase() -> None:
    fit = make_fit(
        {"forward": [4 * n * n for n in LENGTHS], "backward": [100 + 8 * n for n in LENGTHS]}
    )
    assert fit.coefficients["forward"] == pytest.approx((0, 0, 4))
    assert fit.coefficients["backward"] == pytest.approx((100, 8, 0))
    assert (fit.phase, fit.law, fit.r2) == ("forward", "quadratic", pytest.approx(1))


def test_fit_predicts_the_maximum_over_phases() -> None:
    fit = make_fit(
        {"forward": [10**6 + 8 * n for n in LENGTHS], "backward": [2 * n * n for n in LENGTHS]}
    )
    assert fit.predict(256) == 10**6 + 8 * 256
    assert fit.predict(10_000) == 2 * 10_000**2


phases = st.dictionaries(
    st.sampled_from(["forward", "backward", "optimizer"]),
    st.lists(st.integers(0, 10**12), min_size=5, max_size=5),
    min_size=1,
)


@given(phases, st.integers(1, 10**6))
def test_fit_predicts_no_less_than_any_phase(series: dict[str, list[int]], n: int) -> None:
    fit = make_fit(series)
    assert fit.predict(n) == max(fit.predict_phases(n).values())


@given(phases, st.integers(2048, 10**6), st.integers(1, 10**6))
def test_fit_predicts_more_for_longer(series: dict[str, list[int]], n: int, more: int) -> None:
    fit = make_fit(series)
    assert fit.predict(n) <= fit.predict(n + more)


def test_fit_counts_missing_points_as_nothing_held() -> None:
    rows = {"seq_len": [1024, 2048], "phase": ["forward"] * 2, "peak_bytes": [8 * 1024, 8 * 2048]}
    fit = fit_points(
        pl.DataFrame(rows), {"forward": LENGTHS}, category="softmax", source="measured"
    )
    assert fit.points["peak_bytes"].to_list() == [0, 0, 0, 8 * 1024, 8 * 2048]


def test_fit_leaves_out_phases_seen_at_one_length() -> None:
    rows = {"seq_len": [16, 17, 18], "phase": ["prefill", "decode", "decode"]}
    points = pl.DataFrame({**rows, "peak_bytes": [10**6, 17 * 64, 18 * 64]})
    fit = fit_points(
        points, {"prefill": [16], "decode": [17, 18]}, category="kv_cache", source="steps"
    )
    assert list(fit.coefficients) == ["decode"]


def test_fit_of_nothing_is_constant_zero() -> None:
    fit = make_fit({})
    assert (fit.law, fit.predict(10**6), fit.r2, fit.exponent) == ("constant", 0, 1, 0)
    assert fit.sentence == "softmax does not grow with n: 0 B"


def test_fit_of_one_length_says_how_many_it_needs() -> None:
    with pytest.raises(
        ValueError,
        match=r"softmax grows: .* one length \(128\).* at least two lengths, and three to tell",
    ):
        make_fit({"forward": [1]}, [128])


def test_fit_sentence_names_law_and_exponent() -> None:
    fit = make_fit({"forward": [4 * n * n for n in LENGTHS]})
    assert fit.sentence == "softmax grows as n^2.00 (2.00–2.00): quadratic; 4 n² bytes"


def test_fit_sentence_mentions_a_constant() -> None:
    fit = make_fit({"forward": [2**20 + 2000 * n for n in LENGTHS]}, category="activations")
    assert fit.sentence == (
        "activations grow as n^1.00 (1.00–1.00): linear; 2,000 n bytes above 1.0 MiB"
    )


@pytest.mark.parametrize(
    ("programs", "cause"),
    [
        ({}, ""),
        ({n: 0 for n in LENGTHS}, "the peak moved to another instant"),
        ({n: int(n > 256) for n in LENGTHS}, "other ops run"),
    ],
    ids=["unknown", "same", "other"],
)
def test_fit_says_where_the_law_changes_and_why(programs: dict[int, int], cause: str) -> None:
    fit = make_fit({"forward": [8192, 8192, *(9 * n * n for n in LENGTHS[2:])]}, programs=programs)
    assert fit.change is not None
    assert (fit.change.below, fit.change.above, fit.change.cause) == (256, 512, cause)
    assert (fit.change.before.words, fit.law) == ("constant", "quadratic")
    assert "the law changes between n = 256 and 512" in fit.sentence
    assert (fit.predict(100), fit.predict(4096)) == (8192, 9 * 4096**2)
    assert fit.points["fitted_bytes"].equals(fit.points["peak_bytes"])


def test_fit_sentence_admits_that_no_law_holds() -> None:
    fit = make_fit({"forward": [100, 900, 200, 5000, 300]})
    assert "no such law explains all lengths (off by up to" in fit.sentence
