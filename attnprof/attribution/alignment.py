"""Line up two sequences that follow the same order, as far as that is certain."""

from functools import lru_cache

import numpy as np

Ints = np.ndarray[tuple[int, int], np.dtype[np.int64]]

_MOST_CELLS = 4_000_000


def align(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """Return for every number on the left the position of its match on the right, or -1.

    Matches keep the order of both sides, and there are as many as there can be. Where that can be
    had with another match for a number, it has none.
    """
    return _line_up(left, right)[0]


def count_matches(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Return how many numbers can be matched, in the order of both sides."""
    return _line_up(left, right)[1]


@lru_cache(maxsize=32)
def _line_up(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return the matches that are certain, and the number of all."""
    if not left or not right or len(left) * len(right) > _MOST_CELLS:
        return (-1,) * len(left), 0
    a, b = np.array(left), np.array(right)
    before = _count_matches(a, b)
    after = _count_matches(a[::-1], b[::-1])[::-1, ::-1]
    most = int(before[-1, -1])
    may_match = (a[:, None] == b) & (before[:-1, :-1] + 1 + after[1:, 1:] == most)
    is_certain = may_match.sum(axis=1) == 1
    # Nor is it a match if the number can be left out and nothing is lost.
    is_needed = (before[:-1] + after[1:]).max(axis=1) < most
    found = np.where(is_certain & is_needed, may_match.argmax(axis=1), -1)
    return tuple(found.tolist()), most


def _count_matches(a: np.ndarray, b: np.ndarray) -> Ints:
    """Return the longest common subsequence of every two beginnings."""
    result = np.zeros((len(a) + 1, len(b) + 1), np.int64)
    for i, number in enumerate(a.tolist()):
        longest = np.where(b == number, result[i, :-1] + 1, result[i, 1:])
        result[i + 1, 1:] = np.maximum.accumulate(np.maximum(longest, result[i, 1:]))
    return result
