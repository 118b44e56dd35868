"""The process that writes a run: how a run names it, and whether it still lives."""

import os
import socket
import sys
from typing import Any

import psutil


def describe_process() -> dict[str, Any]:
    """Return which process this is, for the ``writer`` of run.json."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "command": sys.argv,
    }


def may_be_alive(writer: Any) -> bool:
    """Return whether a run's writer lives, or cannot be asked from here.

    Args:
        writer: What run.json says of it.
    """
    if not isinstance(writer, dict) or writer.get("host") != socket.gethostname():
        return True  # it cannot be asked from here, so nothing is claimed
    try:
        process = psutil.Process(writer["pid"])
        is_same = bool(abs(process.create_time() - writer["process_started"]) < 1.0)
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
