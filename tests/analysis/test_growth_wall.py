"""The wall: found exactly, with few trials, and said how."""

from collections.abc import Callable
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis.positions import PositionLimit, find_position_limit, limit_probe
from attnprof.analysis.wall import (
    Probe,
    Wall,
    count_needed_bytes,
    find_wall,
    read_capacity,
    search_wall,
)
from attnprof.errors import CaptureError, DryRunError, LengthError
from attnprof.theory.devices import find_device

Measure = Callable[[int], int]


def quadratic(n: int) -> int:
    return 10**6 + 500 * n + 4 * n * n


FIT = Probe(lambda n, _: quadratic(n), "live")


class Counted:
    """Counts how often a measure is asked."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.asked: list[int] = []

    def probe(self, n: int, capacity_bytes: int) -> int:
        self.asked.append(n)
        return self.measure(n)


@pytest.mark.parametrize("multiple_of", [1, 64, 1000])
@pytest.mark.parametrize(
    ("need", "trials"),
    [
        (quadratic, 2),
        (lambda n: round(1.07 * quadratic(n)), 4),
        (lambda n: quadratic(n) + 10**8, 5),
        (lambda n: -(-quadratic(n) // 2**21) * 2**21, 12),
        (lambda n: 300 * n, 30),
    ],
    ids=["right", "7 % off", "more overhead", "rounded up", "wrong"],
)
def test_wall_is_where_one_more_does_not_fit(need: Measure, trials: int, multiple_of: int) -> None:
    counted = Counted(need)
    wall = find_wall(
        10**9, quadratic, fit=FIT, dry_run=Probe(counted.probe, "live"), multiple_of=multiple_of
    )
    assert need(wall.seq_len) <= 10**9 < need(wall.seq_len + multiple_of)
    assert (wall.peak_bytes, wall.next_bytes) == (need(wall.seq_len), need(wall.next_seq_len))
    assert wall.next_seq_len == wall.seq_len + multiple_of
    assert (wall.by, wall.dry_runs) == ("dry run", len(counted.asked))
    assert wall.dry_runs <= trials


def test_wall_search_does_not_leap() -> None:
    counted = Counted(lambda n: 10**6 + n)
    find_wall(10**9, quadratic, fit=FIT, dry_run=Probe(counted.probe, "live"))
    fitting = [n for n in counted.asked if n < 10**9]
    assert all(n <= 8 * before for before, n in pairwise(fitting))


laws = st.tuples(st.integers(0, 10**9), st.integers(1, 10**6), st.integers(0, 1000))


@given(laws, laws, st.integers(0, 10**11), st.integers(1, 1024))
def test_search_brackets_the_wall_whatever_the_law(
    law: tuple[int, int, int], need: tuple[int, int, int], capacity: int, multiple_of: int
) -> None:
    def at(coefficients: tuple[int, int, int], n: int) -> int:
        return coefficients[0] + coefficients[1] * n + coefficients[2] * n * n

    trials = search_wall(
        capacity, lambda n: at(law, n), lambda n: at(need, n), multiple_of=multiple_of
    )
    assert all(n % multiple_of == 0 for n in trials)
    fits = max((n for n, size in trials.items() if size <= capacity), default=0)
    assert trials[fits + multiple_of] > capacity
    assert len(trials) < 60


def test_wall_by_fit_says_so() -> None:
    wall = find_wall(10**9, quadratic, fit=FIT)
    assert (wall.by, wall.dry_runs, wall.counts, wall.reason) == ("fit", 0, "live", "")
    assert quadratic(wall.seq_len) <= 10**9 < quadratic(wall.seq_len + 1)
    assert wall.sentence == (
        "n = 15,741 fits into 953.7 MiB with 953.7 MiB, n = 15,742 needs 953.8 MiB "
        "(live bytes, by fit)"
    )


@pytest.mark.parametrize(("trials", "said"), [(1, "1 dry run)"), (2, "2 dry runs)")])
def test_wall_counts_its_dry_runs(trials: int, said: str) -> None:
    wall = Wall(8, 100, 9, 120, 110, "dry run", "live", dry_runs=trials)
    assert wall.sentence.endswith(f"needs 120 B (live bytes, {said}")


def test_wall_shows_that_the_next_length_needs_more() -> None:
    wall = Wall(
        seq_len=13_688, peak_bytes=23 * 2**30 - 2**20, next_seq_len=13_689,
        next_bytes=23 * 2**30 + 2**20, capacity_bytes=23 * 2**30, by="fit", counts="live",
    )  # fmt: skip
    assert wall.sentence.startswith(
        "n = 13,688 fits into 23.000 GiB with 22.999 GiB, n = 13,689 needs 23.001 GiB"
    )


def test_wall_is_zero_if_nothing_fits() -> None:
    wall = find_wall(1000, quadratic, fit=FIT, dry_run=FIT)
    assert (wall.seq_len, wall.peak_bytes, wall.next_seq_len) == (0, 0, 1)
    assert wall.sentence.startswith("no length fits into 1000 B, n = 1 needs ")


def test_wall_of_what_does_not_grow_is_refused() -> None:
    flat = Probe(lambda n, _: 1000, "live")
    with pytest.raises(
        ValueError, match=r"there is no wall: .* sweep lengths at which memory grows"
    ):
        find_wall(10**9, lambda n: 1000, fit=flat)


def test_wall_of_a_dry_run_that_does_not_grow_is_refused() -> None:
    flat = Probe(lambda n, _: 1000, "live")
    with pytest.raises(ValueError, match="there is no wall"):
        find_wall(10**9, quadratic, fit=FIT, dry_run=flat)


def refuse(error: Exception, accepted: int = 2**62) -> Probe:
    def measure(n: int, capacity_bytes: int) -> int:
        if n % accepted:
            raise error
        return quadratic(n)

    return Probe(measure, "live")


def test_wall_falls_back_to_the_fit_where_dry_runs_cannot() -> None:
    wall = find_wall(10**9, quadratic, fit=FIT, dry_run=refuse(DryRunError("model.py:3: .item()")))
    assert wall.by == "fit"
    assert wall.seq_len == find_wall(10**9, quadratic, fit=FIT).seq_len
    assert wall.reason == "no dry run says so: model.py:3: .item()"


def test_wall_keeps_to_lengths_that_the_model_takes() -> None:
    dry = refuse(ValueError("not whole windows"), accepted=64)
    wall = find_wall(10**9, quadratic, fit=FIT, dry_run=dry, known=[512, 1024, 1088])
    assert (wall.by, wall.seq_len % 64, wall.next_seq_len - wall.seq_len) == ("dry run", 0, 64)
    assert quadratic(wall.seq_len) <= 10**9 < quadratic(wall.next_seq_len)
    assert wall.reason.startswith("only multiples of 64 were tried: at n = 15741 the workload")


def test_wall_by_fit_says_what_the_model_raised() -> None:
    dry = refuse(ValueError("too long"))
    wall = find_wall(10**9, quadratic, fit=FIT, dry_run=dry, known=[512, 1024])
    assert (wall.by, wall.reason.endswith("ValueError: too long")) == ("fit", True)


def test_wall_search_lets_a_running_trace_be_known() -> None:
    with pytest.raises(CaptureError, match="already running"):
        find_wall(10**9, quadratic, fit=FIT, dry_run=refuse(CaptureError("already running")))


def test_capacity_is_bytes_text_or_a_device() -> None:
    assert read_capacity(1024) == 1024
    assert read_capacity("80 GB") == 80 * 10**9
    assert read_capacity("1.5GiB") == 3 * 2**29
    assert read_capacity("H200") == find_device("H200").available_bytes


@pytest.mark.parametrize(
    ("capacity", "error", "message"),
    [
        ("no such card", ValueError, "no device named 'no such card'"),
        ("80 apples", ValueError, "cannot read '80 apples' as a size"),
        (float("nan"), TypeError, "a size in bytes must be an int or text"),
        (-1, ValueError, "must not be negative"),
        ("", ValueError, "no device named ''"),
    ],
)
def test_capacity_that_cannot_be_read_is_refused(
    capacity: int | str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_capacity(capacity)


def test_full_device_gives_back_what_it_only_caches() -> None:
    small, large = 12 * 2**20, 100 * 2**20
    # Small blocks leave segments behind that the large one cannot use.
    frame = pl.DataFrame(
        [("cuda:0", at, at + 1, small) for at in range(0, 8, 2)] + [("cuda:0", 8, 9, large)],
        schema=["device", "start", "end", "size_bytes"],
        orient="row",
    )
    wanted = count_needed_bytes(frame)
    assert wanted > large
    assert count_needed_bytes(frame, wanted) == wanted
    assert count_needed_bytes(frame, large) == large
    assert count_needed_bytes(frame, large - 1) == wanted  # it cannot do with less


def test_more_than_any_device_has_can_be_needed() -> None:
    """Scores of three million tokens take a pebibyte, and the answer is that they do not fit."""
    large = 2**60
    frame = pl.DataFrame(
        [("cuda:0", 0, 1, large)],
        schema=["device", "start", "end", "size_bytes"],
        orient="row",
    )
    assert count_needed_bytes(frame, 80 * 10**9) == large


def test_table_of_positions_ends_the_search() -> None:
    tried = []

    def measure(seq_len: int, capacity_bytes: int) -> int:
        tried.append(seq_len)
        if seq_len > 1024:
            error = LengthError("a table of 1024 rows")
            error.rows = 1024
            raise error
        return seq_len

    wall = find_wall(10**9, lambda n: n, fit=Probe(measure, "live"))
    assert (wall.seq_len, wall.next_seq_len, wall.next_bytes) == (1024, 1025, None)
    assert wall.sentence.endswith("n = 1,025 cannot run (live bytes, by fit); a table of 1024 rows")
    assert len(tried) <= 3


@pytest.mark.parametrize("rows", [100, 5000, 0])
def test_table_whose_rows_are_no_lengths_ends_the_search_too(rows: int) -> None:
    def measure(seq_len: int, capacity_bytes: int) -> int:
        if seq_len > 777:
            error = LengthError("too long")
            error.rows = rows
            raise error
        return seq_len

    assert find_wall(10**9, lambda n: n, fit=Probe(measure, "live")).seq_len == 777


def test_limit_is_told_from_two_lengths() -> None:
    tables = {
        64: [{"at": "m.py:1", "rows": 1024, "used": 66}, {"at": "m.py:2", "rows": 99, "used": 9}],
        96: [{"at": "m.py:1", "rows": 1024, "used": 98}, {"at": "m.py:2", "rows": 99, "used": 9}],
    }
    limit = find_position_limit(tables)
    assert limit == PositionLimit(1022, 1024, "m.py:1")
    probe = limit_probe(Probe(lambda n, _: n, "live"), limit)
    assert probe.measure(1022, 0) == 1022
    with pytest.raises(LengthError, match=r"1024 rows at m.py:1 has no positions beyond n = 1022"):
        probe.measure(1023, 0)
    assert find_position_limit({64: tables[64]}) is None
    assert find_position_limit({64: tables[64], 96: tables[64]}) is None
