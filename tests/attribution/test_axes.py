"""Where dimensions come from, on signatures made by hand."""

import math

from attnprof.attribution.axes import FEATURE, LEFT, RIGHT, TOKEN, through_op, through_view
from attnprof.attribution.facts import Signature
from attnprof.attribution.layouts import fold, unfold

B, H, T, D = 2, 4, 6, 3


def contiguous(*shape: int) -> Signature:
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return Signature(shape, tuple(stride), "float32", math.prod(shape))


def view(shape: tuple[int, ...], stride: tuple[int, ...]) -> Signature:
    return Signature(shape, stride, "float32", math.prod(shape))


def test_split_heads_are_features_and_tokens_stay_tokens() -> None:
    written = contiguous(B * T, H * D)
    heads = view((B, H, T, D), (T * H * D, D, H * D, 1))
    assert through_view(written, (TOKEN, FEATURE), heads) == (TOKEN, FEATURE, TOKEN, FEATURE)


def test_transpose_is_told_apart_where_sizes_coincide() -> None:
    n = 5
    square = contiguous(n, n)
    assert through_view(square, (TOKEN, FEATURE), view((n, n), (1, n))) == (FEATURE, TOKEN)


def test_overlapping_windows_stem_from_tokens() -> None:
    written = contiguous(T, D)
    windows = view((T - 1, 2, D), (D, D, 1))
    assert through_view(written, (TOKEN, FEATURE), windows) == (TOKEN, TOKEN, FEATURE)


def test_expanded_dimensions_stem_from_nothing() -> None:
    written = contiguous(B, 1, T, D)
    bits = (TOKEN, 0, TOKEN, FEATURE)
    expanded = view((B, H, T, D), (T * D, 0, D, 1))
    assert through_view(written, bits, expanded) == (TOKEN, 0, TOKEN, FEATURE)


def test_dtype_views_are_compared_in_bytes() -> None:
    written = Signature((T, 2 * D), (2 * D, 1), "float32", 2 * T * D)
    complex_view = Signature((T, D), (D, 1), "complex64", T * D)
    assert through_view(written, (TOKEN, FEATURE), complex_view) == (TOKEN, FEATURE)


def test_broadcasting_aligns_from_the_right() -> None:
    bits = through_op(contiguous(B, H, T, T), [(contiguous(T, T), (LEFT, RIGHT))])
    assert bits == (0, 0, LEFT, RIGHT)


def test_reduction_matches_sizes_in_order() -> None:
    bits = through_op(contiguous(B, T), [(contiguous(B, T, D), (TOKEN, TOKEN, FEATURE))])
    assert bits == (TOKEN, TOKEN)


def test_folded_batch_and_heads_unfold_again() -> None:
    written = contiguous(B, H, T, D)
    folded = view((B * H, T, D), (T * D, D, 1))
    parts = unfold(written, (TOKEN, FEATURE, TOKEN, FEATURE), folded)
    assert parts == (((B, TOKEN), (H, FEATURE)), ((T, TOKEN),), ((D, FEATURE),))


def test_layout_gives_new_sides_to_tokens_only() -> None:
    out = contiguous(B, H * T, T)
    rows = ((H, FEATURE), (T, TOKEN))
    bits = (TOKEN, TOKEN | FEATURE | LEFT, TOKEN | RIGHT)
    layout = fold(out, bits, (((B, TOKEN),), rows, ((T, TOKEN),)))
    assert layout is not None
    assert layout[0].shape == (B, H, T, T)
    assert layout[1] == (TOKEN, FEATURE, TOKEN | LEFT, TOKEN | RIGHT)


def test_layout_of_what_is_not_folded_is_none() -> None:
    assert fold(contiguous(B, T), (TOKEN, TOKEN), (((B, TOKEN),), ((T, TOKEN),))) is None
