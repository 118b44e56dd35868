"""What was replayed of a GPU's memory beside what torch itself counted there."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnprof.analysis.device_history import AllocatorAttribution, DeviceHistory
from attnprof.analysis.peak import replay
from attnprof.attribution.attribute import Attribution


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """One of torch's counters (``torch.cuda.memory_stats``) and the same number, replayed."""

    device: str
    counter: str
    """``"allocated_bytes.all.peak"`` and the like."""
    replayed_bytes: int
    counted_bytes: int

    @property
    def difference_bytes(self) -> int:
        """How much more torch counted; 0 where every block is known."""
        return self.counted_bytes - self.replayed_bytes


def reconcile(attribution: AllocatorAttribution, about: dict[str, Any]) -> list[Reconciliation]:
    """Return torch's counters beside the replay, per device.

    A counter of peaks speaks of the trace only if it stood at what was held when the trace began,
    or has risen since; where an older peak stands in its place it is left out. So it is where it
    rose in a step that was only counted.

    Args:
        attribution: A traced run's blocks and histories.
        about: ``allocator`` of its run.json.
    """
    found = []
    for history in attribution.histories:
        counters = about.get("devices", {}).get(history.device, {})
        if not {"begin", "end"} <= counters.keys():  # the process was killed
            continue
        begin, end = counters["begin"], counters["end"]
        unseen = _find_counted_peaks(attribution, history)
        for name, (peak, current) in _replay(attribution, history).items():
            was_fresh = begin[f"{name}_peak"] == begin[f"{name}_current"]
            counted = end[f"{name}_peak"]
            is_seen = peak == counted or unseen[name] < counted
            if is_seen and (was_fresh or counted > begin[f"{name}_peak"]):
                found.append(Reconciliation(history.device, f"{name}.all.peak", peak, counted))
            counted = end[f"{name}_current"]
            found.append(Reconciliation(history.device, f"{name}.all.current", current, counted))
    return found


def _find_counted_peaks(attribution: Attribution, history: DeviceHistory) -> dict[str, int]:
    """Return the highest counters of steps that were only counted."""
    rows = attribution.facts.stored.columns("counted_steps")
    own = rows["device"] == history.number
    return {
        "allocated_bytes": int(rows["peak_bytes"][own].max(initial=-1)),
        "reserved_bytes": int(rows["reserved_bytes"][own].max(initial=-1)),
    }


def _replay(
    attribution: AllocatorAttribution, history: DeviceHistory
) -> dict[str, tuple[int, int]]:
    """Return the most bytes, and those at the end, that were allocated and reserved."""
    replayed = replay(attribution.allocations, history.device)
    is_live = replayed.frame["end_ns"].is_null()
    live = int(replayed.frame.filter(is_live)["size_bytes"].sum())
    reserved = np.append(0, history.reserved_bytes())
    return {
        "allocated_bytes": (int(replayed.live_bytes.max(initial=0)), live),
        "reserved_bytes": (int(reserved.max()), int(reserved[-1])),
    }


def count_streams(attribution: Attribution, device: str) -> int:
    """Return how many streams of a device had blocks; 0 where no history tells."""
    if not isinstance(attribution, AllocatorAttribution):
        return 0
    own = [history for history in attribution.histories if history.device == device]
    return len(np.unique(own[0].stream[own[0].lives.begin])) if own else 0
