"""Second products without a matrix product: values are multiplied by weights and summed up."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnprof
from attnprof.analysis.what_if.scenario import DoesNotApply
from attnprof.run import Run

BATCH, TOKENS, HEADS, HEAD_DIM, KEPT = 2, 23, 4, 6, 5
WIDTH = HEADS * HEAD_DIM
FLOAT = 4
SCORES = BATCH * HEADS * TOKENS * TOKENS * FLOAT
"""Bytes of a matrix of scores."""

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def weigh(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1)


def sum_twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (query.unsqueeze(3) * key.unsqueeze(2)).sum(-1).softmax(-1)
    return (weights.unsqueeze(-1) * value.unsqueeze(2)).sum(3)


def sum_values(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (weigh(query, key).unsqueeze(-1) * value.unsqueeze(2)).sum(3)


def sum_per_query(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = weigh(query, key)
    return torch.stack([(weights[:, :, i, :, None] * value).sum(2) for i in range(TOKENS)], 2)


def add_per_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights, result = weigh(query, key), torch.zeros_like(query)
    for i in range(TOKENS):
        result = result + weights[..., i : i + 1] * value[:, :, i : i + 1]
    return result


def sum_chosen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights, keys = weigh(query, key).topk(KEPT, -1)
    values = value.unsqueeze(2).expand(-1, -1, TOKENS, -1, -1)
    chosen = values.gather(3, keys[..., None].expand(-1, -1, -1, -1, HEAD_DIM))
    return (weights.unsqueeze(-1) * chosen).sum(3)


class Attention(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix, self.project = mix, nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.mix(*parts).transpose(1, 2).flatten(2))


def train(mix: Mix) -> Run:
    model = nn.Sequential(Attention(mix), Attention(mix))
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    return tracer.run


@pytest.mark.parametrize("mix", [sum_twice, sum_values, sum_per_query, add_per_key, sum_chosen])
def test_values_that_are_weighed_one_by_one_are_attended_to(mix: Mix) -> None:
    run = train(mix)
    shapes = run.layers().select("layer", "kind", "batch", "heads", "q_len", "k_len", "head_dim")
    assert shapes.rows() == [
        (name, "materialised", BATCH, HEADS, TOKENS, TOKENS, HEAD_DIM) for name in "01"
    ]
    chosen = BATCH * HEADS * TOKENS * KEPT * FLOAT if mix is sum_chosen else 0
    assert run.layers()["softmax_bytes"].to_list() == [SCORES] * 2
    assert run.layers()["saved_softmax_bytes"].to_list() == [SCORES + chosen] * 2
    large = run.allocations.filter(run.allocations["requested_bytes"] == SCORES)
    assert set(large["category"]) == {"attention_scores", "softmax"}


@pytest.mark.parametrize("mix", [sum_twice, sum_values, sum_chosen])
def test_weighed_values_count_as_attention_while_they_live(mix: Mix) -> None:
    run = train(mix)
    keys = KEPT if mix is sum_chosen else TOKENS
    wide = BATCH * HEADS * TOKENS * keys * HEAD_DIM * FLOAT
    large = run.allocations.filter(
        run.allocations["requested_bytes"] == wide, run.allocations["op"] == "aten::mul.Tensor"
    )
    assert {*large.filter(large["phase"] == "forward")["category"]} <= {
        "attention_scores",
        "softmax",
    }
    assert "softmax" in set(large["category"])


def test_fused_attention_is_not_offered_for_chosen_keys() -> None:
    with pytest.raises(DoesNotApply, match=r"topk comes between the softmax and V"):
        train(sum_chosen).what_if("fused_attention")
    assert train(sum_values).what_if("fused_attention").saves_bytes > 0


def test_fused_attention_is_not_offered_where_heads_are_mixed_after_the_softmax() -> None:
    heads = torch.randn(HEADS, HEADS, requires_grad=True)

    def talk(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.einsum("bhqk,hg->bgqk", weigh(query, key), heads) @ value

    with pytest.raises(DoesNotApply, match=r"bmm comes between the softmax and V"):
        train(talk).what_if("fused_attention")
