"""What torch and NVML count of CUDA's memory, to hold the answers of a trace against."""

from dataclasses import dataclass

import torch

from attnprof.capture.devices import GpuReader

_COUNTERS = ("allocated_bytes", "reserved_bytes")
"""What is read of ``torch.cuda.memory_stats``, to hold the answers against."""
_PINNED = ("allocated_bytes", "active_bytes")
"""What ``torch.cuda.host_memory_stats`` calls pinned memory, kept for reuse, and that in use."""
_PINNED_BEFORE_2_10 = ("reserved_bytes", "allocated_bytes")


@dataclass(frozen=True, slots=True)
class Counters:
    """What torch counts on a device."""

    allocated_bytes: int
    peak_bytes: int
    reserved_bytes: int
    reserved_peak_bytes: int


def count_devices() -> dict[int, Counters]:
    """Return torch's counters of every device that has memory."""
    found = {}
    for device in range(torch.cuda.device_count()):
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        if stats and stats["reserved_bytes"]["all"]["peak"]:
            counted = [stats[name]["all"] for name in _COUNTERS]
            found[device] = Counters(
                *(each[which] for each in counted for which in ("current", "peak"))
            )
    return found


def read_counters() -> dict[str, dict[str, int]]:
    """Return torch's counters of every device by its name; one without memory has zeros."""
    found = {}
    for device in range(torch.cuda.device_count()):
        stats = torch.cuda.memory_stats(device)
        found[f"cuda:{device}"] = {
            f"{name}_{which}": stats.get(f"{name}.all.{which}", 0)
            for name in _COUNTERS
            for which in ("current", "peak")
        }
    return found


def read_pinned() -> dict[str, int]:
    """Return how much of the host's memory torch pinned, which no device's history tells."""
    read = getattr(torch.cuda, "host_memory_stats", None)
    return describe_pinned(read() if read is not None else {})


def describe_pinned(stats: dict[str, int]) -> dict[str, int]:
    """Return `read_pinned`'s answer from ``torch.cuda.host_memory_stats``; {} if there was none."""
    counters = _PINNED if f"{_PINNED[1]}.peak" in stats else _PINNED_BEFORE_2_10
    if not stats.get(f"{counters[0]}.peak"):
        return {}
    return {
        f"{name}_{which}": stats[f"{counter}.{which}"]
        for name, counter in zip(_PINNED, counters, strict=True)
        for which in ("current", "peak")
    }


def note_process(devices: dict[str, dict[str, dict[str, int]]]) -> None:
    """Note what NVML counts for the whole process, the CUDA context and libraries included."""
    gpus = GpuReader()
    for device, own_bytes, *_ in gpus.read():
        if device in devices and own_bytes:
            devices[device]["end"]["process_bytes"] = own_bytes
    gpus.close()
