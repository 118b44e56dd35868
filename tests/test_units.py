"""Byte sizes and lengths, read and written."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.units import (
    MOST_TOKENS,
    format_apart,
    format_bytes,
    format_length,
    parse_bytes,
    parse_length,
    require_count,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1.5 GiB", 3 * 2**29),
        ("80 GB", 80 * 10**9),
        ("64MiB", 64 * 2**20),
        (" 2 tib ", 2**41),
        (17, 17),
    ],
)
def test_parse_reads_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1 MiB", "1.2.3 MB", "5 XB", "1e3"])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read .* as a size; expected a number"):
        parse_bytes(text)


def test_parse_refuses_negative_numbers() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -5"):
        parse_bytes(-5)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint16, np.array])
def test_whole_numbers_of_numpy_are_whole_numbers(kind: Any) -> None:
    read = [parse_bytes(kind(4096)), parse_length(kind(4096)), require_count("n", kind(4096))]
    assert read == [4096, 4096, 4096]
    assert {type(number) for number in read} == {int}


@pytest.mark.parametrize("value", [True, 2.0, np.float64(2), "2", None, np.array([1, 2])])
def test_a_count_is_a_whole_number(value: object) -> None:
    with pytest.raises(TypeError, match="n must be a whole number, got"):
        require_count("n", value)


def test_a_count_begins_at_one() -> None:
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        require_count("n", np.int64(0))


@pytest.mark.parametrize("size", [1.5, True, None])
def test_parse_refuses_other_types(size: object) -> None:
    with pytest.raises(TypeError, match=r"must be an int or text such as '1\.5 GiB'"):
        parse_bytes(size)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (2**41, "2.00 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_format_writes_binary_units(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, 2**50))
def test_format_and_parse_agree_within_rounding(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.05, abs=1)


@given(st.integers(0, 2**60), st.lists(st.integers(0, 2**60), max_size=3))
def test_size_does_not_read_like_those_it_is_compared_with(size: int, others: list[int]) -> None:
    first, *rest = format_apart(size, *others)
    assert [text == first for text in rest] == [other == size for other in others]


def test_sizes_have_no_more_digits_than_tell_them_apart() -> None:
    assert format_apart(3 * 2**29, 2**20) == ["1.50 GiB", "1.0 MiB"]
    assert format_apart(2**30, 2**30) == ["1.00 GiB", "1.00 GiB"]
    assert format_apart(2**30, 2**30 + 2**20) == ["1.000 GiB", "1.001 GiB"]
    assert format_apart(2**31, 2**30, 2**30 + 1) == ["2.00 GiB", "1.00 GiB", "1.00 GiB"]
    assert format_apart(2**50, 2**50 + 1) == ["1,125,899,906,842,624 B", "1,125,899,906,842,625 B"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1", 1),
        ("8000", 8000),
        ("8_000", 8000),
        ("8K", 8 * 1024),
        ("128k", 128 * 1024),
        (" 1 M ", 1024 * 1024),
        ("1.5M", 3 * 2**19),
        (".5K", 512),
        (1_048_576, 1024 * 1024),
    ],
)
def test_parse_reads_lengths(text: int | str, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "1G", "-4", "8KB", "1e6"])
def test_parse_length_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read .* as a sequence length; expected tokens"):
        parse_length(text)


@pytest.mark.parametrize("length", [0, -1, "0", "1.5", "0.0001K"])
def test_parse_length_refuses_what_is_no_count_of_tokens(length: int | str) -> None:
    with pytest.raises(ValueError, match="must be a whole number from 1 on, got"):
        parse_length(length)


@pytest.mark.parametrize("length", [1.5, True, None])
def test_parse_length_refuses_other_types(length: object) -> None:
    with pytest.raises(TypeError, match="must be an int or text such as '128K'"):
        parse_length(length)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(1, "1"), (1000, "1000"), (1024, "1K"), (1536, "1536"), (131_072, "128K"), (2**20, "1M")],
)
def test_format_length_is_short(tokens: int, text: str) -> None:
    assert format_length(tokens) == text


@given(st.integers(1, 2**40))
def test_format_and_parse_length_agree(tokens: int) -> None:
    assert parse_length(format_length(tokens)) == tokens


def test_length_beyond_all_sequences_is_refused() -> None:
    assert parse_length(MOST_TOKENS) == MOST_TOKENS
    with pytest.raises(ValueError, match="must be at most 1099511627776, got '1099511627777'"):
        parse_length(str(MOST_TOKENS + 1))
