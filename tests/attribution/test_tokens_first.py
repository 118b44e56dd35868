"""Data may be (tokens, batch, …), as ``nn.Transformer`` has it: the rows are the same."""

import pytest
import torch
from torch import Tensor, nn

import attnprof

WIDTH, HEADS, SOURCE, TARGET = 20, 5, 7, 9


def list_rows(model: nn.Module, *inputs: Tensor) -> list[tuple[object, ...]]:
    with attnprof.trace(samples_per_second=0) as tracer:
        model(*inputs).square().mean().backward()
    columns = ("kind", "batch", "heads", "q_len", "k_len")
    return tracer.run.layers().select(columns).rows()


@pytest.mark.parametrize("batch", [1, 3, SOURCE, TARGET, 23])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
def test_every_layer_of_a_transformer_is_materialised(batch: int, batch_first: bool) -> None:
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 40, dropout=0.1, batch_first=batch_first)
    inputs = [torch.randn(length, batch, WIDTH) for length in (SOURCE, TARGET)]
    if batch_first:
        inputs = [each.transpose(0, 1).contiguous() for each in inputs]
    assert list_rows(model, *inputs) == [
        ("materialised", batch, HEADS, SOURCE, SOURCE),
        ("materialised", batch, HEADS, TARGET, TARGET),
        ("materialised", batch, HEADS, TARGET, SOURCE),
    ]


class LanguageModel(nn.Module):
    """Attention over embedded tokens (n, batch)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(31, WIDTH), nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mixed: Tensor = self.attention(x, x, x)[0]
        return mixed


def test_tokens_may_be_numbers() -> None:
    rows = list_rows(LanguageModel(), torch.randint(31, (TARGET, 30)))
    assert rows == [("materialised", 30, HEADS, TARGET, TARGET)]


class Windows(nn.Module):
    """Attention within windows of ``size`` tokens of (batch, n, width)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.project = size, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.size, WIDTH)
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1)
        )
        return (q @ k.mT).softmax(-1) @ v


class Columns(nn.Module):
    """Attention within the columns of (batch, rows, columns, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, HEADS, -1)).unbind(3)
        q, k, v = (part.permute(0, 2, 3, 1, 4) for part in parts)
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_windows_are_not_taken_for_it(batch: int) -> None:
    """As many sequences as a window has tokens: then the sizes alone would say so."""
    (row,) = list_rows(Windows(8), torch.randn(batch, 32, WIDTH))
    assert row == ("banded", 4 * batch, HEADS, 8, 8)


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_columns_are_not_taken_for_it(batch: int) -> None:
    (row,) = list_rows(Columns(), torch.randn(batch, 6, 11, WIDTH))
    assert row == ("banded", 11 * batch, HEADS, 6, 6)
