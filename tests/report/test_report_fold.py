"""Names of repeated layers, folded."""

from hypothesis import given
from hypothesis import strategies as st

from attnprof.report.fold import fold_names


def test_fold_makes_one_name_of_a_stack() -> None:
    assert list(fold_names([f"h.{n}.attn" for n in range(6)])) == ["h.[0-5].attn"]


def test_fold_shows_gaps() -> None:
    assert list(fold_names([f"h.{n}" for n in (0, 1, 2, 4, 7, 8)])) == ["h.[0-2,4,7-8]"]


def test_fold_works_at_two_depths() -> None:
    names = [f"layers.{a}.experts.{b}.w" for a in range(2) for b in range(8)]
    assert {label: len(of) for label, of in fold_names(names).items()} == {
        "layers.[0-1].experts.[0-7].w": 16
    }


def test_fold_keeps_different_words_apart() -> None:
    assert list(fold_names(["h.0.attn", "h.0.mlp", "lm_head", ""])) == [
        "h.0.attn",
        "h.0.mlp",
        "lm_head",
        "",
    ]


def test_fold_does_not_mix_numbers_within_words() -> None:
    assert len(fold_names(["ln_1", "ln_2", "conv1d"])) == 3


parts = st.sampled_from(["h", "attn", "0", "1", "2", "10"])
paths = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(st.lists(paths, max_size=30))
def test_fold_neither_loses_nor_invents_names(names: list[str]) -> None:
    members = [name for of in fold_names(names).values() for name in of]
    assert sorted(members) == sorted(set(names))
