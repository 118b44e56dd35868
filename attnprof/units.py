"""Parse and format byte sizes and lengths in tokens; the only place that does either."""

import operator
import re
from fractions import Fraction
from typing import SupportsIndex

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")
_LENGTH_FACTORS = {"": 1, "k": 2**10, "m": 2**20}
_MOST_DIGITS = 6
"""That are added to a size before it is written out in bytes."""
MOST_TOKENS = 2**40
"""The longest sequence that is asked about: more elements than 64 bits count are near."""


def read_whole(value: object) -> int | None:
    """Return a whole number, of Python or numpy, as an int; None for anything else, and truths."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array has the method, and only some of them the number
        return None


def require_count(name: str, value: object) -> int:
    """Return a whole number from 1 on as an int.

    Args:
        name: Of the argument, for the message.
        value: What was given.

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is under 1.
    """
    count = read_whole(value)
    if count is None:
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if count < 1:
        raise ValueError(f"{name} must be 1 or more, got {count}")
    return count


def parse_bytes(size: SupportsIndex | str) -> int:
    """Return ``size`` in bytes.

    Args:
        size: A count of bytes, or text such as ``"1.5 GiB"``, ``"80 GB"`` or ``"4096"``.
            Units ending in ``iB`` are powers of 1024, units ending in ``B`` powers of 1000.

    Raises:
        ValueError: The text is not a number with a known unit, or is negative.
        TypeError: ``size`` is neither an integer nor text.
    """
    if not isinstance(size, str):
        count = read_whole(size)
        if count is None:
            raise TypeError(
                f"a size in bytes must be an int or text such as '1.5 GiB', got {size!r} "
                f"of type {type(size).__name__}"
            )
        if count < 0:
            raise ValueError(f"a size in bytes must not be negative, got {count}")
        return count
    match = _SIZE.fullmatch(size)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"cannot read {size!r} as a size; expected a number with one of "
            "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, such as '1.5 GiB'"
        )
    return round(float(match[1].replace("_", "")) * factor)


def format_bytes(size_bytes: int, *, more_digits: int = 0) -> str:
    """Return ``size_bytes`` as short text in binary units: ``"1.50 GiB"``, ``"17 B"``.

    Args:
        size_bytes: The size.
        more_digits: How many digits to add to what is usual for the unit.
    """
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    if size < 2**10:
        return f"{sign}{size} B"
    for unit, factor, usual in (("KiB", 2**10, 1), ("MiB", 2**20, 1), ("GiB", 2**30, 2)):
        digits = usual + more_digits
        if round(size / factor, digits) < 1024:
            return f"{sign}{size / factor:.{digits}f} {unit}"
    return f"{sign}{size / 2**40:.{2 + more_digits}f} TiB"


def format_apart(size_bytes: int, *others: int) -> list[str]:
    """Return sizes as text, with so many digits that the first reads like no other size."""
    sizes = (size_bytes, *others)
    for more in range(_MOST_DIGITS):
        texts = [format_bytes(size, more_digits=more) for size in sizes]
        if all(
            text != texts[0] for text, size in zip(texts, sizes, strict=True) if size != sizes[0]
        ):
            return texts
    return [f"{size:,} B" for size in sizes]


def require_countable(total_bytes: float, what: str, remedy: str) -> None:
    """Raise a ValueError if a number of bytes does not fit into a column of integers.

    Args:
        total_bytes: The sum that is about to be counted.
        what: What adds up to it.
        remedy: What to give instead.
    """
    if not total_bytes < 2**63:  # nor is it a number, where infinities were multiplied
        raise ValueError(
            f"{what} add up to 2^63 bytes or more, which cannot be counted; give {remedy}"
        )


def parse_length(length: SupportsIndex | str) -> int:
    """Return a sequence length in tokens.

    Args:
        length: A count of tokens, or text such as ``"4096"``, ``"8K"``, ``"128k"``, ``"1M"`` or
            ``"1.5M"``. K is 1024 and M is 1024 · 1024, as context lengths are named; for a
            round number of thousands write the digits: ``"8000"`` or ``"8_000"``.

    Raises:
        ValueError: The text is not a whole number of tokens, or there is not one token, or there
            are more than `MOST_TOKENS`.
        TypeError: ``length`` is neither an integer nor text.
    """
    count = _read_length(length) if isinstance(length, str) else read_whole(length)
    if count is None:
        raise TypeError(
            f"a sequence length must be an int or text such as '128K', got {length!r} "
            f"of type {type(length).__name__}"
        )
    tokens = Fraction(count)
    if tokens.denominator != 1 or tokens < 1:
        raise ValueError(f"a sequence length must be a whole number from 1 on, got {length!r}")
    if tokens > MOST_TOKENS:
        raise ValueError(f"a sequence length must be at most {MOST_TOKENS}, got {length!r}")
    return int(tokens)


def parse_length_argument(text: str) -> int:
    """Return a sequence length; for ``type`` of argparse, which shows no message of a ValueError.

    Args:
        text: As for `parse_length`.

    Raises:
        ArgumentTypeError: `parse_length` refuses it, for the same reason.
    """
    from argparse import ArgumentTypeError

    try:
        return parse_length(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _read_length(text: str) -> Fraction:
    match = _SIZE.fullmatch(text)
    factor = _LENGTH_FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"cannot read {text!r} as a sequence length; expected tokens, with K for 1024 or M "
            "for 1024 * 1024, such as '4096', '128K' or '1M'"
        )
    return Fraction(match[1].replace("_", "")) * factor


def format_length(tokens: int) -> str:
    """Return a sequence length as short text that `parse_length` reads back: ``"128K"``."""
    for unit, factor in (("M", 2**20), ("K", 2**10)):
        if tokens >= factor and tokens % factor == 0:
            return f"{tokens // factor}{unit}"
    return str(tokens)
