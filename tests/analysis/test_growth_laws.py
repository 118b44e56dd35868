"""Laws of growth: recovered from points, honest about few of them, and broken where they break."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis import laws
from attnprof.analysis.laws import Law, fit_exponent, fit_law, fit_pieces

DOUBLING = [256 * 2**i for i in range(7)]


@st.composite
def spread_lengths(draw: st.DrawFn, least: int = 3) -> list[int]:
    """Return lengths that grow by half or more each time."""
    lengths = [draw(st.integers(16, 1024))]
    for _ in range(draw(st.integers(least - 1, 7))):
        lengths.append(round(lengths[-1] * draw(st.floats(1.5, 4))))
    return lengths


coefficients = st.tuples(
    st.integers(0, 10**10), st.integers(0, 10**6), st.integers(0, 10**4)
).filter(any)


def evaluate(law: tuple[int, int, int], n: int) -> int:
    return law[0] + law[1] * n + law[2] * n * n


@given(spread_lengths(), coefficients)
def test_law_is_recovered_from_noiseless_points(
    lengths: list[int], expected: tuple[int, int, int]
) -> None:
    law = fit_law(lengths, [evaluate(expected, n) for n in lengths])
    longest = lengths[-1]
    for power, (found, wanted) in enumerate(zip(law.coefficients, expected, strict=True)):
        error = abs(found - wanted) * longest**power
        assert error <= 1e-6 * evaluate(expected, longest)
    assert law.at(4 * longest) == pytest.approx(evaluate(expected, 4 * longest), rel=1e-5)


@given(spread_lengths(least=2), st.data())
def test_law_is_never_negative_and_never_falls(lengths: list[int], data: st.DataObject) -> None:
    sizes = data.draw(
        st.lists(st.integers(0, 10**12), min_size=len(lengths), max_size=len(lengths))
    )
    law = fit_law(lengths, sizes)
    assert min(law.coefficients) >= 0
    assert law.at(lengths[0]) <= law.at(lengths[-1]) <= law.at(2 * lengths[-1])


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ((-64, 320, 0), "linear"),
        ((0, -2, 2), "quadratic"),  # the pairs of a causal mask but for its diagonal
        ((48, -8, 4), "quadratic"),
    ],
)
def test_law_with_a_negative_term_is_found_where_it_goes_through_all_points(
    expected: tuple[int, int, int], words: str
) -> None:
    law = fit_law(range(17, 28), [evaluate(expected, n) for n in range(17, 28)])
    assert law.coefficients == pytest.approx(expected, rel=1e-6, abs=1e-4)
    assert law.words == words
    assert law.at(5000) == pytest.approx(evaluate(expected, 5000), rel=1e-6)
    assert law.at(0) >= 0


def test_negative_term_needs_a_point_that_confirms_it() -> None:
    assert fit_law([16, 32], [evaluate((-64, 320, 0), n) for n in (16, 32)]).constant >= 0
    assert min(fit_law([16, 32, 64], [30, 200, 300]).coefficients) >= 0


@pytest.mark.parametrize(
    ("law", "words"),
    [
        ((10**6, 0, 0), "constant"),
        ((0, 0, 0), "constant"),
        ((0, 8, 0), "linear"),
        ((10**9, 0, 4), "quadratic"),
        ((0, 4096, 4), "linear + quadratic"),
        ((10**12, 1, 0), "constant"),
    ],
)
def test_law_is_named_by_the_terms_that_grow(law: tuple[int, int, int], words: str) -> None:
    assert fit_law(DOUBLING, [evaluate(law, n) for n in DOUBLING]).words == words


@pytest.mark.parametrize(
    ("sizes", "words"),
    [([1000, 1000], "constant"), ([1000, 2000], "linear"), ([1000, 4000], "quadratic")],
)
def test_law_of_two_points_is_the_plain_one(sizes: list[int], words: str) -> None:
    law = fit_law([64, 128], sizes)
    assert law.words == words
    assert law.max_relative_error < 1e-9


def test_law_of_two_points_between_is_a_line() -> None:
    assert fit_law([100, 200], [1100, 1200]).coefficients == pytest.approx((1000, 1, 0))


def test_law_with_zeros_is_not_pulled_to_them_alone() -> None:
    law = fit_law(DOUBLING, [0, *(4 * n for n in DOUBLING[1:])])
    assert law.at(DOUBLING[-1]) == pytest.approx(4 * DOUBLING[-1], rel=0.5)


def test_exponent_of_softmax_is_two() -> None:
    sizes = [4 * 2 * 8 * n * n for n in DOUBLING]
    exponent = fit_exponent(DOUBLING, sizes, fit_law(DOUBLING, sizes))
    assert exponent is not None
    assert exponent.value == pytest.approx(2)
    assert exponent.interval == pytest.approx((2, 2))


def test_exponent_is_of_the_growth_above_the_constant() -> None:
    sizes = [10**9 + 4 * n * n for n in DOUBLING]
    plain = np.polyfit(np.log(DOUBLING), np.log(sizes), 1)[0]
    exponent = fit_exponent(DOUBLING, sizes, fit_law(DOUBLING, sizes))
    assert exponent is not None
    assert exponent.value == pytest.approx(2, abs=1e-3)
    assert plain < 1


def test_exponent_hardly_depends_on_a_constant_that_is_off() -> None:
    sizes = [10**6 + 4 * n * n for n in DOUBLING]
    law = Law(1.1 * 10**6, 0, 4, DOUBLING[0], DOUBLING[-1], 0)
    exponent = fit_exponent(DOUBLING, sizes, law)
    assert exponent is not None
    assert exponent.value == pytest.approx(2, abs=0.03)


def test_exponent_between_one_and_two_is_found() -> None:
    sizes = [round(100 * n**1.5) for n in DOUBLING]
    exponent = fit_exponent(DOUBLING, sizes, fit_law(DOUBLING, sizes))
    assert exponent is not None
    assert exponent.value == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize("constant", [0, 10**5, 10**7])
@pytest.mark.parametrize("power", [0.25, 0.5, 0.8])
def test_exponent_below_one_is_found(power: float, constant: int) -> None:
    sizes = [constant + round(10**6 * n**power) for n in DOUBLING]
    exponent = fit_exponent(DOUBLING, sizes, fit_law(DOUBLING, sizes))
    assert exponent is not None
    assert exponent.value == pytest.approx(power, abs=2e-3)
    assert exponent.interval is not None
    low, high = exponent.interval
    assert low - 1e-6 <= power <= high + 1e-6
    assert high - low < 0.02


def test_exponent_of_a_noisy_root_holds_the_truth() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        sizes = [round(10**6 * n**0.5 * (1 + random.normal(0, 0.01))) for n in DOUBLING]
        exponent = fit_exponent(DOUBLING, sizes, fit_law(DOUBLING, sizes))
        assert exponent is not None
        assert exponent.interval is not None
        assert exponent.value == pytest.approx(0.5, abs=0.1)
        held += exponent.interval[0] <= 0.5 <= exponent.interval[1]
    assert held >= 85


def test_exponent_of_a_noisy_line_is_about_one() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        sizes = [round((10**6 + 10**4 * n) * (1 + random.normal(0, 0.01))) for n in DOUBLING]
        exponent = fit_exponent(DOUBLING, sizes, fit_law(DOUBLING, sizes))
        assert exponent is not None
        assert exponent.value == pytest.approx(1, abs=0.06)


def test_exponent_interval_of_noisy_points_holds_the_truth() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        sizes = [round(1000 * n**2 * np.exp(random.normal(0, 0.05))) for n in DOUBLING]
        law = Law(0, 0, 1000, DOUBLING[0], DOUBLING[-1], 0)
        exponent = fit_exponent(DOUBLING, sizes, law)
        assert exponent is not None
        assert exponent.interval is not None
        held += exponent.interval[0] <= 2 <= exponent.interval[1]
    assert 180 <= held <= 199  # of 200, at 95 %


@pytest.mark.parametrize("lengths", [[64, 128], [64, 128, 256]])
def test_exponent_of_few_points_has_no_interval(lengths: list[int]) -> None:
    sizes = [10**6 + 4 * n * n for n in lengths]
    exponent = fit_exponent(lengths, sizes, fit_law(lengths, sizes))
    assert exponent is not None
    assert exponent.interval is None


def test_exponent_of_a_constant_is_zero() -> None:
    sizes = [1000] * len(DOUBLING)
    exponent = fit_exponent(DOUBLING, sizes, fit_law(DOUBLING, sizes))
    assert exponent is not None
    assert (exponent.value, exponent.interval) == (0, (0, 0))


def test_pieces_find_where_a_kernel_takes_over() -> None:
    sizes = [4 * n * n if n <= 2048 else 4096 * n for n in DOUBLING]
    before, after = fit_pieces(DOUBLING, sizes)
    assert (before.words, before.last) == ("quadratic", 2048)
    assert (after.words, after.first) == ("linear", 4096)


def test_pieces_find_two_changes() -> None:
    lengths = [2**i for i in range(6, 18)]
    sizes = [8 * n * n if n < 1024 else 50 * n if n < 16384 else 64 * n * n for n in lengths]
    assert [p.words for p in fit_pieces(lengths, sizes)] == ["quadratic", "linear", "quadratic"]


@given(st.lists(st.integers(1, 500), min_size=4, max_size=12, unique=True).map(sorted), st.data())
def test_pieces_change_where_two_laws_fit_best(lengths: list[int], data: st.DataObject) -> None:
    before, behind = data.draw(coefficients), data.draw(coefficients)
    at = data.draw(st.integers(0, len(lengths)))
    sizes = [evaluate(before if i < at else behind, n) for i, n in enumerate(lengths)]
    empty = data.draw(st.sets(st.sampled_from(range(len(lengths)))))
    sizes = [0 if i in empty else size for i, size in enumerate(sizes)]
    errors = {p: laws._find_split_error(lengths, sizes, p) for p in range(2, len(lengths) - 1)}
    assert min(errors, key=errors.__getitem__) in laws._list_best_splits(lengths, sizes)


def test_pieces_of_many_lengths_are_found_without_a_fit_at_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried, find_split_error = [], laws._find_split_error

    def note(seq_lens: list[int], sizes: list[int], at: int) -> float:
        tried.append(at)
        return find_split_error(seq_lens, sizes, at)

    monkeypatch.setattr(laws, "_find_split_error", note)
    lengths = list(range(16, 416))
    sizes = [4 * n * n if n < 100 else 4096 * n for n in lengths]
    assert [piece.first for piece in fit_pieces(lengths, sizes)] == [16, 100]
    assert tried == [100 - 16]


@given(spread_lengths(), coefficients)
def test_pieces_of_one_law_are_one(lengths: list[int], law: tuple[int, int, int]) -> None:
    assert len(fit_pieces(lengths, [evaluate(law, n) for n in lengths])) == 1


def test_pieces_are_not_made_of_noise() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = [round(1000 * n**2 * np.exp(random.normal(0, 0.03))) for n in DOUBLING]
        assert len(fit_pieces(DOUBLING, sizes)) == 1


def test_pieces_of_two_points_need_a_reason() -> None:
    lengths = [64, 96, 128, 192, 256]
    sizes = [96 * n * n for n in lengths[:3]] + [10**4 + 50 * n for n in lengths[3:]]
    assert len(fit_pieces(lengths, sizes)) == 1
    programs = {64: 0, 96: 0, 128: 0, 192: 1, 256: 1}
    assert [p.last for p in fit_pieces(lengths, sizes, programs=programs)] == [128, 256]


def test_pieces_leave_out_a_single_length_of_another_program() -> None:
    sizes = [96 * 64 * 64, *(10**4 + 50 * n for n in (96, 128, 192, 256))]
    programs = {64: 0, 96: 1, 128: 1, 192: 1, 256: 1}
    before, after = fit_pieces(list(programs), sizes, programs=programs)
    assert (before.words, before.at(64)) == ("unknown", pytest.approx(96 * 64 * 64))
    assert after.coefficients == pytest.approx((10**4, 50, 0))


def test_pieces_are_not_cut_by_programs_that_always_differ() -> None:
    programs = {n: i for i, n in enumerate(DOUBLING)}
    sizes = [77 * DOUBLING[0] * 13 // 10, *(77 * n for n in DOUBLING[1:])]
    assert len(fit_pieces(DOUBLING, sizes, programs=programs)) == 1
