"""``--seq-lens``: a list of lengths, or a range with a factor or a step."""

import math
from itertools import pairwise

from attnprof.errors import CommandError
from attnprof.units import format_length, parse_length

_MOST = 1000
"""More lengths than this are a slip of the pen: ``1:1M:1`` would be a million runs."""
_FORMS = "a list such as '256,512,1K', or first:last:x2 or first:last:256, such as '256:4096:x2'"


def parse_seq_lens(text: str) -> list[int]:
    """Return the sequence lengths that ``--seq-lens`` names, which rise.

    Args:
        text: Lengths and ranges, with commas between them. ``256:4096:x2`` doubles from 256 on,
            ``256:4096:256`` adds 256 each time; the last length is included if it is met. Lengths
            are read as `parse_length` does: K is 1024, M is 1024 · 1024.

    Raises:
        CommandError: The text is neither, or its lengths do not rise.
    """
    if not text.strip():
        raise CommandError(f"no lengths in --seq-lens; expected {_FORMS}")
    lengths: list[int] = []
    for part in text.split(","):
        lengths += _read_part(part.strip(), text)
    for before, after in pairwise(lengths):
        if after <= before:
            what = "twice" if after == before else f"after {before}"
            raise CommandError(
                f"--seq-lens {text!r} has {after} {what}; give each length once, the shortest first"
            )
    return lengths


def _read_part(part: str, text: str) -> list[int]:
    pieces = [piece.strip() for piece in part.split(":")]
    if len(pieces) == 1 and pieces[0]:
        return [_read_length(pieces[0], text)]
    if len(pieces) != 3 or not all(pieces):
        raise CommandError(f"cannot read {part!r} in --seq-lens {text!r}; expected {_FORMS}")
    first, last = _read_length(pieces[0], text), _read_length(pieces[1], text)
    if last < first:
        raise CommandError(
            f"--seq-lens {text!r} ends at {last}, before it begins at {first}; "
            "give the shortest length first"
        )
    if pieces[2][0] in "xX×*":
        return _multiply(first, last, pieces[2][1:], text)
    step = _read_length(pieces[2], text)
    _limit((last - first) // step + 1, text)
    return list(range(first, last + 1, step))


def _multiply(first: int, last: int, factor_text: str, text: str) -> list[int]:
    try:
        factor = float(factor_text)
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor > 1):
        raise CommandError(
            f"cannot multiply by {factor_text!r} in --seq-lens {text!r}; "
            "expected a factor above 1, as in '256:4096:x2' or '1K:1M:x1.5'"
        )
    _limit(math.floor(math.log(last / first, factor)) + 1, text)
    lengths, exact = [], float(first)
    while (length := round(exact)) <= last:
        lengths.append(length)
        exact *= factor
    return lengths


def _limit(count: int, text: str) -> None:
    if count > _MOST:
        raise CommandError(
            f"--seq-lens {text!r} asks for {count} lengths; expected at most {_MOST}: "
            f"give a larger step, or a factor as in '{format_length(1024)}:1M:x2'"
        )


def _read_length(text: str, whole: str) -> int:
    try:
        return parse_length(text)
    except ValueError as error:
        raise CommandError(f"--seq-lens {whole!r}: {error}") from None
