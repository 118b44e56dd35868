"""Logarithmic axes, and lines between them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.report.drawing import HEIGHT, WIDTH
from attnprof.report.growth_drawing import (
    Picture,
    find_residual_ticks,
    make_length_axis,
    make_size_axis,
)

LENGTHS = st.lists(st.integers(1, 2**40), min_size=1, max_size=20)
SIZES = st.lists(st.integers(0, 2**60), min_size=1, max_size=20)


@given(LENGTHS)
def test_every_length_lies_on_the_axis(lengths: list[int]) -> None:
    axis = make_length_axis(lengths)
    assert all(0 < axis.place(n) < 1 for n in lengths)


@given(SIZES)
def test_the_largest_size_lies_on_the_axis(sizes: list[int]) -> None:
    axis = make_size_axis(sizes)
    if max(sizes):
        assert 0 < axis.place(max(sizes)) < 1
    assert axis.low < axis.high


@given(st.lists(st.integers(1, 2**30), min_size=1), st.lists(st.integers(1, 2**50), min_size=1))
def test_ticks_are_few_and_on_the_axis(lengths: list[int], sizes: list[int]) -> None:
    for axis in (make_length_axis(lengths), make_size_axis(sizes)):
        assert len(axis.ticks) <= 9
        assert all(0 <= at <= 1 for at, _ in axis.ticks)


def test_ticks_are_round_lengths() -> None:
    axis = make_length_axis([256, 4096])
    assert [label for _, label in axis.ticks] == ["256", "512", "1K", "2K", "4K"]
    assert axis.at(axis.ticks[2][0]) == pytest.approx(1024)


@given(st.floats(0.001, 0.999))
def test_a_place_leads_back_to_its_value(place: float) -> None:
    axis = make_length_axis([16, 2**20])
    assert axis.place(axis.at(place)) == pytest.approx(place)


def make_picture() -> Picture:
    return Picture(make_length_axis([256, 4096]), make_size_axis([2**10, 2**30]))


def read_path(path: str) -> list[tuple[str, float, float]]:
    """Return the commands of an SVG path with their ends."""
    return [(c, float(x), float(y)) for c, x, y in re.findall(r"([ML])(\S+) ([0-9.]+)", path)]


@pytest.mark.parametrize("power", [1, 2])
def test_a_power_of_n_is_a_straight_line(power: int) -> None:
    picture = make_picture()
    points = read_path(picture.trace(lambda n: 2**4 * n**power, 256, 4096))
    (_, x0, y0), (_, x1, y1) = points[0], points[-1]
    assert len(points) > 100
    for _, x, y in points:
        assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=HEIGHT / 200)


def test_a_square_is_twice_as_steep_as_a_linear_law() -> None:
    picture = make_picture()
    rises = []
    for power in (1, 2):
        points = read_path(picture.trace(lambda n, power=power: 2**4 * n**power, 256, 4096))
        rises.append(points[0][2] - points[-1][2])
    assert rises[1] == pytest.approx(2 * rises[0], rel=0.01)


def test_a_line_is_broken_where_it_leaves_the_picture() -> None:
    picture = make_picture()
    path = picture.connect([(256, 2**20), (512, 2**60), (1024, 0), (2048, 2**20), (4096, 2**21)])
    assert [command for command, _, _ in read_path(path)] == ["M", "M", "L"]


def test_points_are_drawn_inside_the_view_box() -> None:
    picture = make_picture()
    for _, x, y in read_path(picture.connect([(256, 2**10), (4096, 2**30)])):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


@pytest.mark.parametrize(
    ("residuals", "reach"),
    [([], 0.1), ([0.0], 0.1), ([0.15, -0.05], 0.2), ([-3.0], 5.0), ([70.0], 100.0)],
)
def test_residual_ticks_enclose_all_and_are_round(residuals: list[float], reach: float) -> None:
    assert find_residual_ticks(residuals) == pytest.approx([-reach, 0, reach])
