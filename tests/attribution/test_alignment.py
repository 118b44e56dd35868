"""Two sequences in the same order are lined up where that leaves no choice."""

from collections.abc import Iterator
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from attnprof.attribution.alignment import align

NUMBERS = st.lists(st.integers(0, 2), max_size=5).map(tuple)


def list_longest(left: tuple[int, ...], right: tuple[int, ...]) -> Iterator[dict[int, int]]:
    """Yield every way to match as many numbers as possible, in order."""
    for count in range(min(len(left), len(right)), -1, -1):
        found = [
            dict(zip(a, b, strict=True))
            for a in combinations(range(len(left)), count)
            for b in combinations(range(len(right)), count)
            if [left[i] for i in a] == [right[j] for j in b]
        ]
        if found:
            yield from found
            return


@given(NUMBERS, NUMBERS)
def test_matches_are_those_that_every_longest_one_has(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    ways = list(list_longest(left, right))
    for position, match in enumerate(align(left, right)):
        certain = {way.get(position, -1) for way in ways}
        assert match == (certain.pop() if len(certain) == 1 else -1)


def test_what_one_side_alone_has_is_left_out() -> None:
    assert align((4, 2, 9, 2, 4), (7, 4, 2, 2, 4)) == (1, 2, -1, 3, 4)


def test_weights_of_the_same_size_need_each_other() -> None:
    assert align((1, 1, 1), (1, 1, 1)) == (0, 1, 2)
    assert align((1, 1), (1, 1, 1)) == (-1, -1)
