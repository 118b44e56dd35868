"""A compiled training step is told apart by layer and category, as its uncompiled form is."""

from collections.abc import Iterator

import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attnprof
from attnprof import Run
from tests.versions import needs_compiled_code

B, T, H, D = 2, 32, 4, 8
WIDTH = H * D
SCORES = 4 * B * H * T * T

pytestmark = [
    needs_compiled_code,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # of Inductor itself
]


class Attention(nn.Module):
    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.is_fused = is_fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.is_fused:
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = (q @ k.transpose(-1, -2) * D**-0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self.attention = Attention(is_fused=is_fused)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.fixture(scope="module")
def runs() -> Iterator[tuple[Run, Run]]:
    """Return a training step of one written-out and one fused layer: plain, and compiled."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(Block(is_fused=False), Block(is_fused=True))
    x = torch.randn(B, T, WIDTH)
    found = []
    for each in (model, torch.compile(model)):
        each(x).sum().backward()
        model.zero_grad()
        with attnprof.trace(samples_per_second=0) as tracer:
            each(x).sum().backward()
        model.zero_grad()
        found.append(tracer.run)
    yield found[0], found[1]
    torch._dynamo.reset()


def test_layers_of_compiled_code_are_those_of_the_model(runs: tuple[Run, Run]) -> None:
    plain, compiled = (run.layers().drop("backend_reason", "scores_peak_bytes") for run in runs)
    assert compiled.rows() == plain.rows()
    assert compiled["layer"].to_list() == ["0.attention", "1.attention"]
    assert compiled["saved_softmax_bytes"].to_list() == [SCORES, 0]
    reasons = runs[1].layers()["backend_reason"].to_list()
    assert reasons[0] == "written out: products around a fused kernel"


def test_everything_compiled_code_makes_and_frees_has_a_category(runs: tuple[Run, Run]) -> None:
    peak = runs[1].peak()
    sizes = peak.by_category()
    assert sum(sizes.values()) == peak.total_bytes
    assert "unattributed" not in sizes
    whole = set(runs[1].allocations["category"].cast(pl.String))
    assert {"softmax", "attention_scores", "activations", "temporaries", "gradients"} <= whole


def test_what_is_concluded_is_not_called_exact(runs: tuple[Run, Run]) -> None:
    frame = runs[1].allocations.with_columns(pl.col("category").cast(pl.String))
    concluded = frame.filter(pl.col("op").is_null() & (pl.col("category") != "parameters"))
    known = {"gradients", "inputs"}  # the program says so
    assert not concluded.filter(~pl.col("category").is_in(known))["exact"].any()
    assert frame.filter(pl.col("category") == "parameters")["exact"].all()


def test_products_work_for_the_module_whose_weight_they_read(runs: tuple[Run, Run]) -> None:
    facts = runs[1].attribution.facts
    layers = {
        facts.module_paths[facts.op_module[op]]
        for op in range(facts.count)
        if facts.is_compiled[op]
    }
    linear = {"q", "k", "v", "out"}
    for block in ("0", "1"):
        assert {f"{block}.attention.{name}" for name in linear} <= layers
        assert {f"{block}.attention", f"{block}.up", f"{block}.down"} <= layers


def test_saved_activations_belong_to_forward(runs: tuple[Run, Run]) -> None:
    frame = runs[1].allocations
    saved = frame.filter("saved")
    assert set(saved["phase"].cast(pl.String)) == {"forward"}
    assert saved.filter(pl.col("layer").cast(pl.String).str.starts_with("0.")).height


def test_layers_whose_weights_are_cast_inside_kernels_are_told_apart() -> None:
    model = nn.Sequential(Block(is_fused=True), Block(is_fused=True))
    compiled, x = torch.compile(model), torch.randn(B, T, WIDTH)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(x).float().square().mean()
        loss.backward()

    step()
    with attnprof.trace(samples_per_second=0) as tracer:
        step()
    run = tracer.run
    assert run.layers().select("layer", "kind").rows() == [
        ("0.attention", "fused"),
        ("1.attention", "fused"),
    ]
    facts = run.attribution.facts
    forward = [
        facts.module_paths[facts.op_module[op]]
        for op in range(facts.count)
        if facts.is_compiled[op] and not facts.is_backward[op]
    ]
    names = (
        "attention.q",
        "attention.k",
        "attention.v",
        "attention",
        "attention.out",
        "up",
        "down",
    )
    assert forward == [f"{block}.{name}" for block in (0, 1) for name in names]
