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
    from attnprof import theory
    from attnprof.capture.block_tables import note_blocks
    from attnprof.capture.dry_run import dry_run
    from attnprof.capture.sweep import sweep
    from attnprof.capture.tags import tag
    from attnprof.capture.tracer import Tracer, trace
    from attnprof.errors import AttnprofError
    from attnprof.growth import Growth
    from attnprof.run import Run, load
    from attnprof.vocabulary import Category, Phase

__all__ = [
    "AttnprofError",
    "Category",
    "Growth",
    "Phase",
    "Run",
    "Tracer",
    "dry_run",
    "load",
    "note_blocks",
    "sweep",
    "tag",
    "theory",
    "trace",
]

_HOMES = {
    "AttnprofError": "attnprof.errors",
    "Category": "attnprof.vocabulary",
    "Growth": "attnprof.growth",
    "Phase": "attnprof.vocabulary",
    "Run": "attnprof.run",
    "Tracer": "attnprof.capture.tracer",
    "dry_run": "attnprof.capture.dry_run",
    "load": "attnprof.run",
    "note_blocks": "attnprof.capture.block_tables",
    "sweep": "attnprof.capture.sweep",
    "tag": "attnprof.capture.tags",
    "trace": "attnprof.capture.tracer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import attnprof`` stays light."""
    if name == "theory":
        return import_module("attnprof.theory")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'attnprof' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
