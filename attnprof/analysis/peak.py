"""The peak: the instant with most bytes live, and what was live then."""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from attnprof.errors import require_known
from attnprof.vocabulary import Phase

Array = np.ndarray


@dataclass(frozen=True)
class Replay:
    """Live bytes on one device after each allocation, in the order of events."""

    frame: pl.DataFrame
    """The device's blocks, in the order in which they appeared."""
    live_bytes: Array
    """Per block, the bytes live on the device once it was there."""

    def held_at(self, position: int) -> pl.DataFrame:
        """Return the blocks live once the block at ``position`` was there."""
        start = self.frame["start"][position]
        return self.frame[: position + 1].filter(pl.col("end") > start)


def replay(allocations: pl.DataFrame, device: str) -> Replay:
    """Replay allocations and frees of one device.

    Live bytes are highest just after an allocation, so those instants are all there is to look at.
    """
    frame = allocations.filter(pl.col("device").cast(pl.String) == device).sort(
        "start", "allocation_id"
    )
    size, start, end = (frame[c].to_numpy() for c in ("size_bytes", "start", "end"))
    by_end = np.argsort(end, kind="stable")
    freed = np.concatenate([[0], np.cumsum(size[by_end])])
    live = np.cumsum(size) - freed[np.searchsorted(end[by_end], start, "right")]
    return Replay(frame, live)


@dataclass(frozen=True)
class Peak:
    """The instant of most live bytes on one device."""

    device: str
    total_bytes: int
    """All live bytes at the instant. The categories sum to it exactly."""
    step: int
    phase: str
    """What the program was doing."""
    layer: str
    """The module that was running; in backward, that of the op being differentiated."""
    op: str | None
    """The op whose result made the peak; None if no op was seen making it."""
    time_ns: int
    """On the clock of ``start_ns`` in `allocations`."""
    allocations: pl.DataFrame = field(repr=False)
    """What was live, largest first; the columns are those of `Run.allocations`."""

    def by_category(self) -> dict[str, int]:
        """Return live bytes per category, largest first; they sum to `total_bytes`."""
        frame = (
            self.allocations.group_by(pl.col("category").cast(pl.String))
            .agg(pl.col("size_bytes").sum())
            .sort("size_bytes", "category", descending=[True, False])
        )
        return dict(frame.iter_rows())

    def by_layer(self) -> pl.DataFrame:
        """Return live bytes per layer and category: columns layer, category, size_bytes."""
        return (
            self.allocations.group_by(pl.col("layer", "category").cast(pl.String))
            .agg(pl.col("size_bytes").sum())
            .sort("size_bytes", "layer", "category", descending=[True, False, False])
        )


def find_peak(
    allocations: pl.DataFrame,
    *,
    device: str | None = None,
    step: int | None = None,
    phase: str | None = None,
) -> Peak:
    """Return the highest instant of a device, a step or a phase.

    Args:
        allocations: Attributed blocks with ``start`` and ``end`` (order of events).
        device: The device; without it the GPU that held most, or else the CPU.
        step: Only instants in this step. What was allocated earlier counts while it lives.
        phase: Only instants at which this phase allocated something.

    Raises:
        ValueError: The run has no such device or step, or no such phase in it.
    """
    device = choose_device(allocations, device)
    replayed = replay(allocations, device)
    frame, live = replayed.frame, replayed.live_bytes
    eligible = np.ones(len(frame), np.bool_)
    if step is not None:
        eligible &= frame["step"].to_numpy() == step
        # A run in which nothing was allocated is one step long, as `Run.steps` has it.
        steps = allocations["step"].unique().sort().to_list() or [0]
        is_there = bool(eligible.any()) if len(allocations) else step in steps
        require_known(is_there, "step", step, steps)
    if phase is not None:
        phases = frame["phase"].cast(pl.String)
        known = sorted(phases.filter(eligible).unique().to_list())
        eligible &= (phases == phase).to_numpy()
        where = "the run" if step is None else f"step {step}"
        require_known(bool(eligible.any()), "phase", phase, known, where=where)
    if not len(frame):
        return Peak(device, 0, 0, Phase.OUTSIDE.value, "", None, 0, frame.drop("start", "end"))
    at = int(np.argmax(np.where(eligible, live, -1)))
    maker = frame.row(at, named=True)
    held = replayed.held_at(at).drop("start", "end")
    return Peak(
        device=device,
        total_bytes=int(live[at]),
        step=int(maker["step"]),
        phase=str(maker["phase"]),
        layer=str(maker["layer"]),
        op=maker["op"],
        time_ns=int(maker["start_ns"]),
        allocations=held.sort("size_bytes", "allocation_id", descending=[True, False]),
    )


def choose_device(allocations: pl.DataFrame, device: str | None) -> str:
    """Return ``device`` if the run has it; without one, the device a reader wants to see first.

    That is the GPU with the most bytes; on a machine without, the CPU.

    Raises:
        ValueError: The run has no such device.
    """
    totals = allocations.group_by(pl.col("device").cast(pl.String)).agg(pl.col("size_bytes").sum())
    found: dict[str, int] = dict(totals.iter_rows())
    if device is not None:
        require_known(device in found, "device", device, sorted(found))
        return device
    gpus = [name for name in found if name not in ("cpu", "meta")]
    return max(gpus, key=lambda name: (found[name], name)) if gpus else "cpu"
