"""The weights beside a KV cache."""

import polars as pl

from attnprof.analysis.forwards import find_forwards
from attnprof.analysis.peak import choose_device
from attnprof.attribution import Attribution
from attnprof.vocabulary import Category


def measure_weights(attribution: Attribution, forward: int) -> int:
    """Return the bytes of parameters that live when a forward has ended, where its caches are.

    A run may load, measure and drop other models before, and keep a copy on the host.

    Args:
        attribution: The run.
        forward: Number of one of its outermost forwards without gradients.
    """
    event = next(f.exit_event for f in find_forwards(attribution) if f.number == forward)
    frame = attribution.allocations
    live = frame.filter((pl.col("start") < event) & (pl.col("end") >= event)).select(
        pl.col("category", "device").cast(pl.String), "size_bytes"
    )
    main = choose_device(frame, None)
    caches = live.filter(pl.col("category") == Category.KV_CACHE.value)
    devices = {main, *caches["device"]}
    if main != "cpu":  # a cache on the host is there to leave the GPU to the weights
        devices.discard("cpu")
    weights = live.filter(
        (pl.col("category") == Category.PARAMETERS.value) & pl.col("device").is_in(list(devices))
    )
    return int(weights["size_bytes"].sum())
