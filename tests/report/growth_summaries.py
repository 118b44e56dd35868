"""Growth made by hand: points that follow known laws, and summaries of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from attnprof.analysis.fits import TOTAL, Fit, fit_points
from attnprof.analysis.wall import Wall
from attnprof.report.growth_summary import Capacity, GrowthSummary, LayerLaw, Point
from attnprof.report.summary import Holder

LAYERS, HEADS, BATCH, ITEM_BYTES, WIDTH = 12, 8, 2, 4, 512
PARAMETERS = LAYERS * 12 * WIDTH**2 * ITEM_BYTES

Law = Callable[[int], int]


def softmax_bytes(n: int) -> int:
    """What all layers keep of their softmax results."""
    return LAYERS * BATCH * HEADS * n * n * ITEM_BYTES


def activation_bytes(n: int) -> int:
    """What all layers keep besides."""
    return LAYERS * 16 * BATCH * n * WIDTH * ITEM_BYTES


LAWS: dict[str, Law] = {
    "parameters": lambda n: PARAMETERS,
    "activations": activation_bytes,
    "softmax": softmax_bytes,
}


def total_bytes(n: int) -> int:
    """The sum of all categories."""
    return sum(law(n) for law in LAWS.values())


def make_points(
    seq_lens: Sequence[int], *, source: str = "measured", laws: dict[str, Law] = LAWS
) -> list[Point]:
    """Return completed lengths whose categories follow laws."""
    points = []
    for n in seq_lens:
        sizes = {name: law(n) for name, law in laws.items()}
        points.append(Point(n, source, "completed", sizes={**sizes, TOTAL: sum(sizes.values())}))
    return points


def make_fits(points: Sequence[Point]) -> dict[str, Fit]:
    """Fit every category of points that are all of one source."""
    done = [point for point in points if point.is_done]
    names = sorted(done[-1].sizes, key=lambda name: -done[-1].sizes[name])
    return {name: fit_category(done, name) for name in names}


def fit_category(points: Sequence[Point], category: str, *, layer: str | None = None) -> Fit:
    """Fit one category of points; all of it is in backward."""
    frame = pl.DataFrame(
        {
            "seq_len": [point.seq_len for point in points],
            "phase": ["backward"] * len(points),
            "peak_bytes": [point.sizes[category] for point in points],
        }
    )
    return fit_points(
        frame,
        {"backward": [point.seq_len for point in points]},
        category=category,
        layer=layer,
        source=points[0].source,
    )


def make_summary(seq_lens: Sequence[int] = (256, 512, 1024, 2048)) -> GrowthSummary:
    """Return a sweep that was measured and run dry, ran out of memory, and has a wall."""
    measured = make_points(seq_lens)
    dry = make_points(seq_lens, source="dry_run")
    over = Point(8192, "measured", "out_of_memory", "MemoryError: 1 GiB", {TOTAL: 3 * 2**30})
    fits = make_fits(measured)
    longest = measured[-1]
    each = longest.sizes["softmax"] // LAYERS
    wall = Wall(
        seq_len=8730,
        peak_bytes=total_bytes(8730),
        next_seq_len=8731,
        next_bytes=total_bytes(8731),
        capacity_bytes=total_bytes(8730) + 1,
        by="fit",
        counts="live",
    )
    return GrowthSummary(
        name="train.py:make_step",
        path=Path("runs/train-sweep"),
        about=("NVIDIA H200", "torch 2.13.0"),
        points=(*dry, *measured, over),
        capacities=(
            Capacity("A100 80GB", total_bytes(8730) + 1, wall),
            Capacity("1 PB", 10**15, None, "there is no wall"),
        ),
        fits=fits,
        longest=longest.seq_len,
        holders=(
            Holder("h.[0-11].attn", LAYERS, "softmax", each, LAYERS * each),
            Holder("h.[0-11]", LAYERS, "activations", 1, longest.sizes["activations"]),
            Holder("h.[0-11]", LAYERS, "parameters", 1, longest.sizes["parameters"]),
        ),
        layer_laws=(
            LayerLaw("h.[0-11].attn", LAYERS, fits["softmax"], each),
            LayerLaw("h.[0-11].mlp.[0,2]", 2 * LAYERS, fits["activations"], 2**20),
        ),
        predicted=tuple((n, total_bytes(n)) for n in (2048, 4096, 8192, 10000)),
        theory=tuple((n, softmax_bytes(n)) for n in seq_lens),
        assumptions=("kernels were chosen as on compute capability 9.0",),
    )
