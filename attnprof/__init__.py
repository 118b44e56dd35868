"""attnprof: a memory profiler and visualiser for attention in PyTorch.

::

    import attnprof

    with attnprof.trace("runs/gpt2") as tracer:
        train()

    tracer.run.peak().by_category()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnprof.capture.tracer import Tracer, tag, trace
    from attnprof.errors import AttnprofError
    from attnprof.run import Run, load
    from attnprof.vocabulary import Category, Phase

__all__ = ["AttnprofError", "Category", "Phase", "Run", "Tracer", "load", "tag", "trace"]

_HOMES = {
    "AttnprofError": "attnprof.errors",
    "Category": "attnprof.vocabulary",
    "Phase": "attnprof.vocabulary",
    "Run": "attnprof.run",
    "Tracer": "attnprof.capture.tracer",
    "load": "attnprof.run",
    "tag": "attnprof.capture.tracer",
    "trace": "attnprof.capture.tracer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import attnprof`` stays light."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'attnprof' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
