"""How ``gpu.py`` runs its cases: each begins alike, and one that fails ends nothing else."""

import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

Results = dict[str, Any]


def forget() -> None:
    """Give back what nobody holds, so that each case begins alike."""
    gc.collect()
    torch.cuda.empty_cache()


def attempt(measure: Callable[..., Results], *arguments: Any) -> Results:
    """Return what is measured, or with which error that failed, and how long it took."""
    forget()
    begin = time.perf_counter()
    try:
        results = measure(*arguments)
    except Exception:
        results = {"error": traceback.format_exc(limit=-4)}
    return results | {"seconds": round(time.perf_counter() - begin, 1)}
