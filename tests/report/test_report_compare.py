"""Two runs side by side, and the peak that fused attention would have had."""

from pathlib import Path

import pytest
import torch
from report_runs import MIB, make_peak, record
from torch import nn

from attnprof.report.compare import compare_peaks, predict_fused
from attnprof.run import Run

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    """Attention with heads, written out or fused."""

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self.is_fused = is_fused
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, n, _ = x.shape
        q, k, v = self.qkv(x).view(batch, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # (B, H, n, D)
        if self.is_fused:
            o = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            o = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        result: torch.Tensor = self.out(o.transpose(1, 2).reshape(batch, n, WIDTH))
        return x + result


def record_pair(directory: Path, *, layers: int) -> tuple[Run, Run]:
    """Return the same training with materialised and with fused attention."""
    runs = []
    for name, is_fused in (("materialised", False), ("fused", True)):
        model = nn.Sequential(*(Attention(is_fused=is_fused) for _ in range(layers)))
        runs.append(record(directory / name, model))
    return runs[0], runs[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    return record_pair(tmp_path_factory.mktemp("pair"), layers=3)


def test_changes_sum_to_the_difference_of_the_peaks(pair: tuple[Run, Run]) -> None:
    first, second = pair[0].peak(), pair[1].peak()
    changes = compare_peaks(first, second)
    assert sum(c.difference_bytes for c in changes) == second.total_bytes - first.total_bytes
    assert sum(c.first_bytes for c in changes) == first.total_bytes
    assert sum(c.second_bytes for c in changes) == second.total_bytes


def test_changes_come_largest_first() -> None:
    first = make_peak([("a", "softmax", 9), ("a", "inputs", 1)])
    second = make_peak([("a", "inputs", 1), ("a", "attention_io", 2)])
    changes = [(c.category, c.difference_bytes) for c in compare_peaks(first, second)]
    assert changes == [("softmax", -9 * MIB), ("attention_io", 2 * MIB), ("inputs", 0)]


def test_prediction_meets_the_measured_peak(pair: tuple[Run, Run]) -> None:
    materialised, fused = pair
    predicted, measured = predict_fused(materialised), fused.peak()
    # What a kernel and its backward lay out differently is small beside the scores.
    assert predicted.total_bytes == pytest.approx(measured.total_bytes, rel=0.05)
    assert predicted.total_bytes < materialised.peak().total_bytes


def test_prediction_holds_no_scores(pair: tuple[Run, Run]) -> None:
    predicted = predict_fused(pair[0])
    held = predicted.by_category()
    assert not {"softmax", "attention_scores", "attention_mask"} & held.keys()
    assert sum(held.values()) == predicted.total_bytes


def test_prediction_leaves_the_run_as_it_was(pair: tuple[Run, Run]) -> None:
    before = pair[0].peak().by_category()
    predict_fused(pair[0])
    assert pair[0].peak().by_category() == before


def test_prediction_of_a_fused_run_is_its_peak(pair: tuple[Run, Run]) -> None:
    assert predict_fused(pair[1]).total_bytes == pair[1].peak().total_bytes
