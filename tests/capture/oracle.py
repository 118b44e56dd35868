"""The CPU allocator's own account of a piece of program, to judge the ledger by.

`torch.profiler` reports every block that the CPU allocator hands out and takes back. Replayed per
pointer, they give the live bytes at every instant. Blocks older than the profile are not among
them, and frees of such blocks count for nothing.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

DISPATCH = "PythonDispatchMode"
"""The profiler's name for one op as a dispatch mode sees it: with a trace on, one per op."""


@dataclass(eq=False)
class Block:
    """One block of memory, from allocation to free."""

    size_bytes: int
    taken_by: tuple[str, ...]
    """The events that it was allocated in, innermost first."""
    start: int
    end: int | None
    """Position in the order of allocator events; None for a block that is still live."""
    op: Any
    """The dispatched op that was running, or None."""
    op_at_end: Any

    @property
    def is_scratch(self) -> bool:
        """Whether an op took the block and gave it back before it returned."""
        return self.op is not None and self.op is self.op_at_end

    @property
    def is_beside_ops(self) -> bool:
        """Whether no op asked for it: C++ took it, below the sight of every dispatch mode."""
        return not self.taken_by or not self.taken_by[0].startswith("aten::")


def record_blocks(program: Callable[[], object]) -> list[Block]:
    """Run ``program`` and return the blocks that the CPU allocator handed out meanwhile."""
    gc.collect()
    # torch 2.11 warns, once a process, where nobody says whether cycles (there is one) add up.
    options = {"profile_memory": True, "acc_events": True}
    with profile(activities=[ProfilerActivity.CPU], **options) as profiled:
        program()
    tree = profiled.profiler.kineto_results.experimental_event_tree()
    events = sorted(
        (e for e in _walk(tree) if e.tag == _EventType.Allocation),
        key=lambda event: event.start_time_ns,
    )
    live: dict[int, Block] = {}
    blocks = []
    for position, event in enumerate(events):
        fields = event.extra_fields
        above = list(_ancestors(event))
        op = next((e for e in above if e.name == DISPATCH), None)
        if fields.alloc_size > 0:
            names = tuple(e.name for e in above)
            live[fields.ptr] = Block(fields.alloc_size, names, position, None, op, None)
            blocks.append(live[fields.ptr])
        elif fields.ptr in live:
            freed = live.pop(fields.ptr)
            freed.end, freed.op_at_end = position, op
    return blocks


def find_peak_bytes(blocks: list[Block]) -> int:
    """Return the most bytes that were live at once."""
    changes = [(block.start, block.size_bytes) for block in blocks]
    changes += [(block.end, -block.size_bytes) for block in blocks if block.end is not None]
    live = peak = 0
    for _, change in sorted(changes):
        live += change
        peak = max(peak, live)
    return peak


def _walk(events: Any) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(event.children)


def _ancestors(event: Any) -> Iterator[Any]:
    while (event := event.parent) is not None:
        yield event
