"""Live bytes by category over time, thinned without losing extremes."""

import numpy as np
import polars as pl
from tsdownsample import MinMaxDownsampler

from attnprof.analysis.peak import choose_device


def sample_timeline(
    allocations: pl.DataFrame, *, device: str | None = None, max_points: int = 2000
) -> pl.DataFrame:
    """Return live bytes over time: columns ``time_ns``, ``total_bytes`` and one per category.

    Instants are picked by minimum and maximum of the total, so the highest and the lowest are
    always among them; every category is then taken at those same instants and they sum exactly.

    Args:
        allocations: Attributed blocks with ``start`` and ``end`` (order of events).
        device: The device; chosen as for a peak without it.
        max_points: At most so many rows, 4 or more.

    Raises:
        ValueError: The device does not occur, or ``max_points`` is under 4.
        TypeError: ``max_points`` is no whole number.
    """
    if not isinstance(max_points, int):
        raise TypeError(f"max_points must be a whole number, got {max_points!r}")
    if max_points < 4:
        raise ValueError(f"max_points must be at least 4, got {max_points}")
    device = choose_device(allocations, device)
    frame = allocations.filter(pl.col("device").cast(pl.String) == device)
    changes = list_changes(frame)
    total = changes["change"].cum_sum()
    if len(total) > max_points:
        picked = MinMaxDownsampler().downsample(  # type: ignore[no-untyped-call]  # untyped library
            total.to_numpy().astype(np.float64), n_out=max_points - max_points % 2
        )
    else:
        picked = np.arange(len(total))
    columns = {"time_ns": changes["time_ns"].gather(picked), "total_bytes": total.gather(picked)}
    for category in sorted(frame["category"].cast(pl.String).unique().to_list()):
        own = pl.when(changes["category"] == category).then(changes["change"]).otherwise(0)
        columns[category] = pl.select(own.cum_sum()).to_series().gather(picked)
    return pl.DataFrame(columns)


def list_changes(frame: pl.DataFrame) -> pl.DataFrame:
    """Return every allocation and free in order: columns order, time_ns, category, change."""
    category = pl.col("category").cast(pl.String)
    # A block older than the trace is given the time at which counting it begins.
    first_ns = frame["start_ns"].min() if len(frame) else 0
    born = frame.select(
        order="start",
        rank=pl.lit(1),
        time_ns=pl.col("start_ns"),
        category=category,
        change="size_bytes",
    )
    freed = frame.filter(pl.col("end_ns").is_not_null()).select(
        order="end",
        rank=pl.lit(0),
        time_ns=pl.col("end_ns"),
        category=category,
        change=-pl.col("size_bytes"),
    )
    changes = pl.concat([born, freed]).sort("order", "rank", maintain_order=True)
    # Backdated blocks keep the clock of their first use; the axis must still only move forward.
    return changes.with_columns(
        pl.when(pl.col("order") == 0).then(first_ns).otherwise(pl.col("time_ns")).alias("time_ns")
    ).with_columns(pl.col("time_ns").reverse().cum_min().reverse())
