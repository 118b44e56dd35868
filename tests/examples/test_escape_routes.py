"""Every escape route grows as its paper, or its implementation, has it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import polars as pl
import pytest

import attnprof

Load = Callable[[str], ModuleType]

pytestmark = pytest.mark.filterwarnings(
    # performer-pytorch compares versions with it when it is imported.
    "ignore:distutils Version classes are deprecated:DeprecationWarning"
)

BATCH, HEADS, LAYERS, FLOAT = 2, 4, 2, 4
SCORES = BATCH * HEADS * FLOAT
"""Bytes of one score matrix, per n²."""


@dataclass(frozen=True)
class Route:
    """A route and the laws it must show."""

    file: str
    function: str = "make_step"
    exponents: dict[str, int] = field(default_factory=dict)
    """Per category, the exponent of its bytes."""
    quadratic: int = 0
    """Bytes per n² of the whole peak; 0 where it is linear."""
    shortest: int = 256
    """It is run at this length, twice and four times it."""

    def __str__(self) -> str:
        return f"{self.file}:{self.function}"


LINEAR_SCORES = {"attention_scores": 1, "softmax": 1}
QUADRATIC_SCORES = {"attention_scores": 2, "softmax": 2}

ROUTES = [
    # The softmax of both layers, in one of them scores and masked scores too, and two bool masks.
    Route("materialised", exponents=QUADRATIC_SCORES, quadratic=4 * SCORES + LAYERS),
    Route("sdpa"),
    # A floating-point copy of the mask per layer.
    Route("sdpa", "make_masked_step", {"attention_mask": 2}, quadratic=LAYERS * FLOAT),
    Route("linformer_attention", exponents=LINEAR_SCORES),
    Route("performer"),
    Route("performer", "make_causal_step", shortest=128),
    Route("linear_attention", exponents=LINEAR_SCORES),
    Route("linear_attention", "make_cumulative_step"),
    Route("retention", exponents={"softmax": 1}),
    # Per layer the weights and the decays are kept; the gradient of the weights joins them.
    Route(
        "retention",
        "make_parallel_step",
        {"softmax": 2},
        quadratic=LAYERS * (SCORES + HEADS * FLOAT) + SCORES,
    ),
    Route("retention", "make_recurrent_step", shortest=64),
    Route("rwkv", shortest=64),
    Route("mamba", shortest=64),
    Route("longformer", exponents=LINEAR_SCORES),
    Route("bigbird", exponents=LINEAR_SCORES),
    # One matrix of all weights; no layer's outlives it.
    Route("bigbird", "make_public_step", quadratic=SCORES),
    Route("sliding_window", exponents=LINEAR_SCORES),
    # The softmax of both layers, its gradient and that of the scores in one, and the mask.
    Route(
        "sliding_window",
        "make_masked_step",
        QUADRATIC_SCORES,
        quadratic=(LAYERS + 2) * SCORES + BATCH * FLOAT,
    ),
    # Each layer keeps its copy of the mask.
    Route(
        "sliding_window",
        "make_masked_sdpa_step",
        {"attention_mask": 2},
        quadratic=LAYERS * BATCH * FLOAT,
    ),
]


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_route_grows_as_expected(route: Route, load_route: Load) -> None:
    make_step = getattr(load_route(route.file), route.function)
    growth = attnprof.sweep(make_step, [route.shortest * times for times in (1, 2, 4)])
    exponents = {category: growth.fit(category).exponent for category in route.exponents}
    assert exponents == pytest.approx(route.exponents, abs=0.1)
    linear, quadratic = find_terms(growth)
    if route.quadratic:
        assert quadratic == pytest.approx(route.quadratic, rel=0.15)
    else:
        assert quadratic * 4 * route.shortest < 0.02 * linear


def find_terms(growth: attnprof.Growth) -> tuple[float, float]:
    """Return c1 and c2 of the peak from its differences at n, 2n and 4n."""
    total = growth.points.filter(pl.col("category") == "total", pl.col("layer") == "")
    peaks = total.group_by("seq_len").agg(pl.col("peak_bytes").max()).sort("seq_len")
    n = peaks["seq_len"][0]
    first, second = peaks["peak_bytes"].diff().drop_nulls()
    quadratic = (second - 2 * first) / (6 * n**2)
    return first / n - 3 * quadratic * n, quadratic


def test_longformer_of_transformers_builds_a_quadratic_mask(load_route: Load) -> None:
    growth = attnprof.sweep(load_route("longformer").make_public_step, [256, 512, 1024])
    mask = growth.fit("attention_mask")
    assert mask.exponent == pytest.approx(2, abs=0.05)
    # In floating point, and for a moment the bool mask that it is made from.
    assert mask.predict(1024) == pytest.approx(BATCH * 1024**2 * (FLOAT + 1), rel=0.05)


def test_linformer_grows_its_parameters(load_route: Load) -> None:
    growth = attnprof.sweep(load_route("linformer_attention").make_step, [256, 512])
    sizes = [growth.fit("parameters").predict(n) for n in (256, 512)]
    projections = LAYERS * 2 * 64 * FLOAT  # per token: of keys and values, to 64 rows each
    assert sizes[1] - sizes[0] == 256 * projections


def find_kinds(load_route: Load, file: str, function: str) -> set[str]:
    """Return the kinds of the two layers that a route must have."""
    make_step = getattr(load_route(file), function)
    with attnprof.trace() as tracer:
        make_step(256, "cpu")()
    layers = tracer.run.layers()
    assert layers.height == LAYERS, layers["layer"].to_list()
    return set(layers["kind"])


@pytest.mark.parametrize(
    ("file", "function", "kind"),
    [
        ("materialised", "make_step", "materialised"),
        ("sdpa", "make_step", "fused"),
        ("sdpa", "make_masked_step", "fused"),
        ("linformer_attention", "make_step", "low_rank"),
        ("linear_attention", "make_step", "linear"),
        ("retention", "make_step", "linear"),
        ("retention", "make_parallel_step", "materialised"),
        ("longformer", "make_step", "banded"),
        ("longformer", "make_public_step", "banded"),
        ("bigbird", "make_step", "banded"),
        ("sliding_window", "make_step", "banded"),
        ("sliding_window", "make_masked_step", "materialised"),
        ("sliding_window", "make_masked_sdpa_step", "fused"),
        ("performer", "make_step", "linear"),
        ("performer", "make_causal_step", "linear"),
        ("linear_attention", "make_cumulative_step", "linear"),
        ("retention", "make_recurrent_step", "recurrent"),
        ("rwkv", "make_step", "recurrent"),
        ("mamba", "make_step", "recurrent"),
        ("bigbird", "make_public_step", "banded"),
    ],
)
def test_kind_is_named(load_route: Load, file: str, function: str, kind: str) -> None:
    assert find_kinds(load_route, file, function) == {kind}
