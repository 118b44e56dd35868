"""What joins scores: biases that are learned, their gradients, and what only looks like one."""

import pytest
import torch
from torch import Tensor, nn

import attnprof
from attnprof.run import Run

BATCH, HEADS, HEAD_DIM, TOKENS, FLOAT = 2, 3, 10, 37, 4
WIDTH = HEADS * HEAD_DIM
BIAS = HEADS * TOKENS * TOKENS


class Biased(nn.Module):
    """Attention with a bias (1, H, T, T); ``again`` hides some keys by it."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        if self.again:
            bias = bias + torch.ones(TOKENS, TOKENS).triu(1) * -1e9
        mixed = (query @ key.mT + bias).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Distances(nn.Module):
    """Two layers whose bias a table gives by distance, as T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * TOKENS, HEADS)
        self.layers = nn.ModuleList([Biased(), Biased(again=True)])

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(TOKENS)
        bias = self.table(places[:, None] - places + TOKENS).permute(2, 0, 1)[None]
        for layer in self.layers:
            x = x + layer(x, bias)
        return x


def train(model: nn.Module) -> Run:
    with attnprof.trace(samples_per_second=0) as tracer:
        model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    return tracer.run


def test_gradients_of_a_bias_are_a_mask() -> None:
    frame = train(Distances()).allocations
    own = frame.filter((frame["phase"] == "backward") & (frame["size_bytes"] == BIAS * FLOAT))
    assert own["layer"].to_list() == ["layers.1", "layers.0"]
    assert {*own["category"]} == {"attention_mask"}


class Added(nn.Module):
    """Scores by ``baddbmm``, which has to be given something to add to."""

    def __init__(self, start: Tensor, beta: float) -> None:
        super().__init__()
        self.start, self.beta = start, beta
        self.project = nn.Linear(WIDTH, 3 * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        start = self.start.new_empty(len(x), TOKENS, TOKENS) if self.beta == 0 else self.start
        scores = torch.baddbmm(start, query, key.mT, beta=self.beta, alpha=0.3)
        return scores.softmax(-1) @ value


@pytest.mark.parametrize(("beta", "mask"), [(0, 0), (1, BATCH * TOKENS * TOKENS * FLOAT)])
def test_an_empty_tensor_that_scores_are_added_to_is_no_mask(beta: float, mask: int) -> None:
    run = train(Added(torch.zeros(BATCH, TOKENS, TOKENS), beta))
    assert run.layers()["mask_bytes"].to_list() == [mask]
    frame = run.allocations
    empty = frame.filter((frame["op"] == "aten::new_empty") & (frame["phase"] == "forward"))
    assert {*empty["category"]} <= {"attention_scores"}
