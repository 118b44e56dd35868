"""Programs replayed at lengths they never ran at."""

from collections.abc import Callable, Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.analysis.allocator import simulate_allocator
from attnprof.analysis.extrapolate import extrapolate, find_programs, keep_blocks

Block = tuple[int, int, Callable[[int], int], str, str]
"""Start, end, bytes at a length, phase, category."""

END = 10**6


def make_run(
    n: int, program: Sequence[Block], *, device: str = "cpu", rounding: int = 1
) -> pl.DataFrame:
    rows = [
        {
            "allocation_id": i,
            "device": device,
            "op": f"op{i}",
            "layer": f"h.{i % 2}",
            "phase": phase,
            "step": 0,
            "category": category,
            "size_bytes": -(-size(n) // rounding) * rounding,
            "requested_bytes": size(n),
            "start": start,
            "end": end,
        }
        for i, (start, end, size, phase, category) in enumerate(program)
    ]
    return keep_blocks(pl.DataFrame(rows))


# A loss over a vocabulary of 1000 outweighs attention with 2 heads up to n = 500.
MOVING: list[Block] = [
    (0, END, lambda _: 10_000, "outside", "parameters"),
    (1, 2, lambda n: 4 * 2 * n * n, "forward", "softmax"),
    (3, 4, lambda n: 4 * 1000 * n, "forward", "temporaries"),
    (5, 6, lambda n: 16 * n, "backward", "activations"),
]


def test_extrapolation_follows_a_peak_that_moves() -> None:
    program = extrapolate({n: make_run(n, MOVING) for n in (64, 128, 256)})
    assert program is not None
    peak = program.predict(4096)
    assert peak.peak_bytes == 10_000 + 4 * 2 * 4096**2
    assert peak.by_category == {"softmax": 4 * 2 * 4096**2, "parameters": 10_000}
    assert (peak.phase, peak.layer, peak.op, peak.method) == ("forward", "h.1", "op1", "replay")
    assert peak.by_phase["backward"] == 10_000 + 16 * 4096


def test_extrapolation_finds_the_peaks_of_programs_that_differ_in_scale() -> None:
    program = extrapolate({n: make_run(n, MOVING) for n in (64, 128, 256)})
    assert program is not None
    loss = {"parameters": 10_000, "temporaries": 4 * 1000 * 256}
    scores = {"parameters": 10_000, "softmax": 4 * 2 * 256**2}
    # With four times the heads attention is the peak, with more of all it is not.
    assert program.list_highest(256, [{}]) == [loss]
    assert program.list_highest(256, [{"softmax": 4.0}]) == [scores]
    assert program.list_highest(256, [{}, {"softmax": 4.0}, {"parameters": 8.0}]) == [scores, loss]


def test_extrapolation_of_a_band_needs_negative_constants() -> None:
    window = 32
    band: list[Block] = [
        (0, 9, lambda n: 4 * (n // window - 1) * 2 * window * window, "forward", "softmax")
    ]
    program = extrapolate({n: make_run(n, band) for n in (64, 128, 256)})
    assert program is not None
    assert program.predict(8192).peak_bytes == 4 * (8192 // 32 - 1) * 2 * 32 * 32


def test_extrapolation_tells_single_powers_apart_by_two_lengths() -> None:
    program = extrapolate({n: make_run(n, MOVING) for n in (128, 256)})
    assert program is not None
    assert program.predict(4096).peak_bytes == 10_000 + 4 * 2 * 4096**2


sizes = st.tuples(st.integers(0, 10**6), st.integers(0, 10**4), st.integers(0, 100))


def of(law: tuple[int, int, int]) -> Callable[[int], int]:
    return lambda n: law[0] + law[1] * n + law[2] * n * n


@st.composite
def programs(draw: st.DrawFn) -> list[Block]:
    count = draw(st.integers(1, 12))
    events = draw(st.permutations(range(2 * count)))
    spans = sorted(sorted(events[2 * i : 2 * i + 2]) for i in range(count))
    phases = st.sampled_from(["forward", "backward"])
    return [(s, e, of(draw(sizes)), draw(phases), "softmax") for s, e in spans]


@given(programs(), st.integers(1000, 10**5))
def test_extrapolation_is_what_running_it_gives(program: list[Block], n: int) -> None:
    found = extrapolate({m: make_run(m, program) for m in (100, 150, 250, 400)})
    assert found is not None
    known = extrapolate({m: make_run(m, program) for m in (n, 2 * n, 3 * n)})
    assert known is not None
    assert found.predict(n).by_phase == known.predict(n).by_phase
    assert found.predict(n).peak_bytes == max(found.predict(n).by_phase.values())
    assert sum(found.predict(n).by_category.values()) == found.predict(n).peak_bytes
    assert found.estimate(n) == found.predict(n).peak_bytes


@given(programs(), st.integers(1, 10**5), st.integers(1, 10**5))
def test_extrapolation_grows_with_length(program: list[Block], n: int, more: int) -> None:
    found = extrapolate({m: make_run(m, program) for m in (100, 150, 250, 400)})
    assert found is not None
    assert found.predict(n).peak_bytes <= found.predict(n + more).peak_bytes


@pytest.mark.parametrize("n", [2**40, 10**30])
def test_extrapolation_refuses_more_bytes_than_can_be_counted(n: int) -> None:
    program = extrapolate({n: make_run(n, MOVING) for n in (64, 128, 256)})
    assert program is not None
    assert program.predict(2**29).peak_bytes == 10_000 + 4 * 2 * 4**29
    with pytest.raises(ValueError, match=rf"at n = {n} .* give a shorter length"):
        program.predict(n)


def test_extrapolation_rounds_as_the_allocator_does() -> None:
    runs = {n: make_run(n, MOVING, device="cuda:0", rounding=512) for n in (100, 150, 250)}
    program = extrapolate(runs)
    assert program is not None
    blocks = program.blocks_at(1001)
    assert blocks["requested_bytes"].to_list()[1:] == [8 * 1001**2, 4000 * 1001, 16 * 1001]
    assert program.predict(1001).peak_bytes == 20 * 512 + -(-8 * 1001**2 // 512) * 512
    at_1001 = make_run(1001, MOVING, device="cuda:0", rounding=512)
    expected = simulate_allocator(at_1001).reserved_peak_bytes
    assert simulate_allocator(blocks).reserved_peak_bytes == expected


def test_extrapolation_of_sizes_rounded_without_a_record_is_close() -> None:
    def rounded(n: int) -> pl.DataFrame:
        run = make_run(n, MOVING, device="cuda:0", rounding=512)
        return run.with_columns(requested_bytes="size_bytes")

    program = extrapolate({n: rounded(n) for n in (400, 600, 1000, 1600)})
    assert program is not None
    expected = 10_000 + 8 * 16000**2
    assert program.predict(16000).peak_bytes == pytest.approx(expected, rel=0.01)


def with_loop(n: int) -> list[Block]:
    return [(i, END, lambda _: 64, "forward", "activations") for i in range(n)]


def test_extrapolation_is_refused_if_ops_differ() -> None:
    assert extrapolate({n: make_run(n, with_loop(n)) for n in (4, 8, 16)}) is None


def test_extrapolation_is_refused_without_a_second_length() -> None:
    assert extrapolate({64: make_run(64, MOVING)}) is None
    assert extrapolate({}) is None


def test_extrapolation_is_refused_if_it_misses_what_is_known() -> None:
    lives: list[Block] = [*MOVING[:2], (3, END, lambda n: 4000 * n, "forward", "temporaries")]
    keeps: list[Block] = [(s, END, size, p, c) for s, _, size, p, c in lives]
    runs = {64: make_run(64, keeps), 128: make_run(128, keeps), 256: make_run(256, lives)}
    assert extrapolate(runs) is None


def test_extrapolation_starts_from_the_last_change_of_program() -> None:
    runs = {n: make_run(n, with_loop(3)) for n in (16, 32)}
    runs |= {n: make_run(n, MOVING) for n in (64, 128, 256)}
    program = extrapolate(runs)
    assert program is not None
    assert program.seq_lens == (64, 128, 256)


def test_programs_are_numbered_by_what_ran() -> None:
    runs = {n: make_run(n, with_loop(3)) for n in (16, 32)}
    runs |= {n: make_run(n, MOVING) for n in (64, 128)}
    assert find_programs(runs) == {16: 0, 32: 0, 64: 1, 128: 1}
