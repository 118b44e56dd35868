"""The device that a prediction is for."""

from dataclasses import dataclass

from attnprof.theory.devices import DRIVER_RESERVE_BYTES, find_device
from attnprof.units import parse_bytes


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory that a workload has to fit into."""

    name: str
    """``"H200"``, or a size such as ``"80 GB"``."""
    capacity_bytes: int
    """What a program can have there."""
    target: str
    """What `dry_run` calls it."""


def find_machine(device: str) -> Machine:
    """Return the machine that a name or a size stands for.

    Args:
        device: A device such as ``"H200"``, of whose memory the driver's share is not counted, or
            a size such as ``"80 GB"``, of which all is.

    Raises:
        ValueError: It is neither.
    """
    device = device.strip()
    if device[:1].isdigit():
        return Machine(device, parse_bytes(device), "cuda")
    found = find_device(device)
    return Machine(found.name, found.available_bytes, found.name)


def describe_gpu(name: str, total_bytes: int) -> Machine:
    """Return a GPU that is there, known to a table or not.

    Args:
        name: As its driver reports it.
        total_bytes: All of its memory.
    """
    try:
        target = find_device(name).name
    except ValueError:
        target = "cuda"
    return Machine(name, total_bytes - DRIVER_RESERVE_BYTES, target)
