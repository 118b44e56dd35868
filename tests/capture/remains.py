"""Everything in the process that tracing changes for the time being: compare before and after."""

import signal
import sys
import threading
import warnings
from typing import Any

import torch
import torch._dynamo  # now: it brings warning filters along
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def list_remains() -> dict[str, Any]:
    """Return hooks, modes, threads, handlers and replaced functions, each under a name."""
    found: dict[str, Any] = {
        f"{place.__name__}.{name}": dict(value)
        for place in (module_hooks, optimizer_hooks)
        for name, value in vars(place).items()
        if name.startswith("_global") and isinstance(value, dict)
    }
    assert found, "torch keeps its global hooks elsewhere in this version"
    return found | {
        "always-called hooks": dict(module_hooks._global_forward_hooks_always_called),
        "torch.autograd.backward": torch.autograd.backward,
        "torch.autograd.grad": torch.autograd.grad,
        "UntypedStorage": dict(vars(torch.UntypedStorage)),
        "dispatch modes": _get_current_dispatch_mode_stack(),
        "function modes": _get_current_function_mode_stack(),
        "threads": threading.enumerate(),
        "signals": [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)],
        "warning filters": list(warnings.filters),
        "hooks of the interpreter": (sys.excepthook, threading.excepthook, sys.getprofile()),
    }
