"""The forms of a route compute the same function, and a window is a window."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

Load = Callable[[str], ModuleType]
Form = Callable[[Tensor, Tensor, Tensor], Tensor]

BATCH, HEADS, HEAD_DIM = 2, 4, 8


def draw_operands(length: int = 64) -> list[Tensor]:
    """Return random Q, K and V, (B, H, n, D), in double precision."""
    shape = (BATCH, HEADS, length, HEAD_DIM)
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in range(3)]


def assert_same(form: Form, reference: Form, operands: list[Tensor]) -> None:
    """Assert that results and gradients agree."""
    weights = torch.randn_like(operands[2])
    for got, expected in zip(
        *(
            (result, *torch.autograd.grad((result * weights).sum(), operands))
            for result in (form(*operands), reference(*operands))
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", ["retain_recurrent", "retain_chunkwise"])
def test_retention_is_the_same_in_every_form(load_route: Load, form: str) -> None:
    retention = load_route("retention")
    decay = retention.decay_of_heads(HEADS).double()
    assert_same(
        lambda q, k, v: getattr(retention, form)(q, k, v, decay),
        lambda q, k, v: retention.retain_parallel(q, k, v, decay),
        draw_operands(3 * 64),
    )


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunkwise_retention_does_not_depend_on_the_chunk(load_route: Load, chunk: int) -> None:
    retention = load_route("retention")
    decay = retention.decay_of_heads(HEADS).double()
    operands = draw_operands()
    torch.testing.assert_close(
        retention.retain_chunkwise(*operands, decay, chunk=chunk),
        retention.retain_parallel(*operands, decay),
    )


def test_parallel_retention_decays_with_distance(load_route: Load) -> None:
    matrix = load_route("retention").decay_matrix(3, torch.tensor([0.5]))
    assert matrix.tolist() == [[[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]]]


@pytest.mark.parametrize("form", ["attend_cumulative", "attend_chunked"])
def test_linear_attention_is_normalised_feature_products(load_route: Load, form: str) -> None:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (torch.nn.functional.elu(t) + 1 for t in (q, k))
        weights = (q @ k.transpose(-1, -2)).tril()
        return weights / weights.sum(-1, keepdim=True) @ v

    assert_same(getattr(load_route("linear_attention"), form), reference, draw_operands(3 * 64))


@pytest.mark.parametrize("form", ["attend", "attend_with_mask"])
def test_sdpa_is_materialised_attention(load_route: Load, form: str) -> None:
    reference = load_route("materialised").attend
    assert_same(getattr(load_route("sdpa"), form), reference, draw_operands())


def test_bigbird_meets_its_window_the_ends_and_random_blocks(load_route: Load) -> None:
    plan = load_route("bigbird").plan_blocks(32).tolist()
    assert len(plan) == 32 - 2  # the ends attend to everything
    for block, met in enumerate(plan, start=1):
        assert len(set(met)) == 8
        assert {0, block - 1, block, block + 1, 31} <= set(met)
        assert set(met) <= set(range(32))


def test_bigbird_with_as_many_blocks_as_there_are_is_full_attention(load_route: Load) -> None:
    bigbird = load_route("bigbird")
    blocks = bigbird.KEY_BLOCKS
    sparse = bigbird.BlockSparseAttention(blocks * bigbird.BLOCK).attend_blocks
    assert_same(sparse, bigbird.attend, draw_operands(blocks * bigbird.BLOCK))
