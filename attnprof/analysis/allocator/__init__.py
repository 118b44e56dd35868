"""CUDA's caching allocator, simulated: how many bytes it reserves to serve what a program asks for.

`CachingAllocator` takes one request after the other; `simulate_allocator` replays a table of
allocations. Both are pure arithmetic: no GPU, no torch. ``docs/cuda-model.md`` says which rules of
which release are followed, what they were checked against, and what is left out.
"""

from attnprof.analysis.allocator.engine import CachingAllocator
from attnprof.analysis.allocator.settings import AllocatorSettings
from attnprof.analysis.allocator.simulation import OutOfMemory, Simulation, simulate_allocator

__all__ = [
    "AllocatorSettings",
    "CachingAllocator",
    "OutOfMemory",
    "Simulation",
    "simulate_allocator",
]
