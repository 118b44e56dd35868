"""Models and optimizers that a program writes without ``nn.Module`` or ``torch.optim``."""

import pytest
import torch
from torch import Tensor, nn

import attnprof

BATCH, TOKENS, WIDTH, FLOAT = 3, 22, 60, 4


def test_parameters_are_what_an_optimizer_updates() -> None:
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(3)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    with attnprof.trace(samples_per_second=0) as tracer:
        q, k, v = (torch.randn(BATCH, TOKENS, WIDTH) @ weight for weight in weights)
        ((q @ k.mT).softmax(-1) @ v).square().mean().backward()
        optimizer.step()
    run = tracer.run
    assert run.peak().by_category()["parameters"] == 3 * WIDTH * WIDTH * FLOAT
    row = run.layers().row(0, named=True)
    assert row["kind"] == "materialised"
    assert row["saved_softmax_bytes"] == BATCH * TOKENS * TOKENS * FLOAT


def orthogonalise(gradient: Tensor) -> Tensor:
    """Newton and Schulz's iteration, as in Muon: products of what stems from gradients."""
    x = gradient.bfloat16()
    x = x / x.norm()
    for _ in range(3):
        square = x @ x.mT
        x = 3 * x + (square + square @ square) @ x
    return x


def test_products_of_gradients_are_no_attention() -> None:
    model = nn.Linear(30, 40, bias=False)
    with attnprof.trace(samples_per_second=0) as tracer:
        for _ in range(2):
            model(torch.randn(5, 30)).square().mean().backward()
            with torch.no_grad():
                model.weight -= 0.1 * orthogonalise(model.weight.grad)
            model.weight.grad = None
    run = tracer.run
    assert run.layers().is_empty()
    assert not {"softmax", "attention_scores", "attention_io"} & run.peak().by_category().keys()


@pytest.mark.parametrize("is_parameter", [False, True])
def test_gradients_of_inputs_lead_to_attention(is_parameter: bool) -> None:
    """What an adversarial example is made of goes through the model again."""
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    optimizer = torch.optim.SGD([x] if is_parameter else attention.parameters(), lr=0.1)
    with attnprof.trace(samples_per_second=0) as tracer:
        attention(x, x, x)[0].square().mean().backward()
        worse = (x + 0.1 * x.grad.sign()).detach()
        attention(worse, worse, worse)[0].square().mean().backward()
        optimizer.step()
    frame = tracer.run.layers()
    assert frame.select("calls", "batch", "heads").rows() == [(2, BATCH, 4)]


def test_parameters_of_models_keep_their_layer_whatever_comes_first() -> None:
    """A trace may begin between backward and the optimizer's step."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, WIDTH)).square().mean().backward()
    with attnprof.trace(samples_per_second=0) as tracer:
        optimizer.step()
        model(torch.randn(5, WIDTH)).square().mean().backward()
    rows = tracer.run.attribution.facts.stored.table("identities").to_pylist()
    (parameter,) = [row for row in rows if row["role"] == "parameter"]
    assert (parameter["name"], parameter["module"]) == ("0.weight", 1)
