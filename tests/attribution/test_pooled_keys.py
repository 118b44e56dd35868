"""Keys projected from pooled tokens: a share of them that grows with n, or a number of them."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import attnprof

HEADS, WIDTH, BATCH = 2, 24, 3


def list_kinds(model: nn.Module, images: Tensor) -> list[tuple[object, ...]]:
    with attnprof.trace(samples_per_second=0) as tracer:
        model(images)[0].float().square().mean().backward()
    return tracer.run.layers().select("kind", "q_len", "k_len").rows()


@pytest.mark.parametrize(
    ("is_linear", "rows"),
    [
        (True, [("low_rank", 256, 49), ("low_rank", 64, 49)]),
        (False, [("materialised", 256, 16), ("materialised", 64, 16)]),
    ],
    ids=["adaptive pool", "strided convolution"],
)
def test_pyramid_vision_transformer(is_linear: bool, rows: list[tuple[object, ...]]) -> None:
    config = transformers.PvtV2Config(
        image_size=64, hidden_sizes=[12, WIDTH], depths=[1, 1], num_attention_heads=[1, HEADS],
        num_encoder_blocks=2, sr_ratios=[4, 2], mlp_ratios=[2, 2], patch_sizes=[7, 3],
        strides=[4, 2], linear_attention=is_linear,
    )  # fmt: skip
    assert list_kinds(transformers.PvtV2Model(config), torch.randn(BATCH, 3, 64, 64)) == rows


class Pyramid(nn.Module):
    """P2T: keys and values are projected from tokens pooled to several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = self.patch(images)
        pools = [functional.adaptive_avg_pool2d(x, size).flatten(2) for size in (1, 2, 3)]
        pooled = self.norm(torch.cat(pools, -1).mT)
        q = self.query(x.flatten(2).mT).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.key_value(pooled).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(-1) @ v,)


def test_pools_of_several_sizes() -> None:
    rows = list_kinds(Pyramid(), torch.randn(BATCH, 3, 32, 32))
    assert rows == [("low_rank", 64, 1 + 4 + 9)]


class Agents(nn.Module):
    """Agent attention: a number of tokens, pooled from the queries, ask and are asked."""

    def __init__(self, agents: int) -> None:
        super().__init__()
        self.agents, self.project = agents, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        pooled = functional.adaptive_avg_pool1d(q.flatten(0, 1).mT, self.agents).mT
        agents = pooled.unflatten(0, (-1, HEADS))
        heard = (agents @ k.mT).softmax(-1) @ v
        return ((q @ agents.mT).softmax(-1) @ heard,)


@pytest.mark.parametrize("agents", [5, 6, 16])
def test_a_number_of_agents_is_low_rank_however_many_tokens_there_are(agents: int) -> None:
    ((kind, *_lengths),) = list_kinds(Agents(agents), torch.randn(BATCH, 23, WIDTH))
    assert kind == "low_rank"
