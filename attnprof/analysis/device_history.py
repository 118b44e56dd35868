"""The allocator's history of each device of a run, recorded or imported."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnprof.analysis.allocator.history import (
    KINDS,
    OTHER,
    SEGMENT_GIVEN,
    SEGMENT_TAKEN,
    Events,
    Lives,
    list_lives,
    list_seedings,
)
from attnprof.analysis.allocator.pools import PrivateSegments, find_pools
from attnprof.analysis.allocator.settings import AllocatorSettings
from attnprof.attribution.attribute import Attribution
from attnprof.attribution.facts import Ints
from attnprof.store.reader import StoredRun
from attnprof.store.schema import SEED, SEGMENT_SEED


@dataclass(frozen=True)
class DeviceHistory:
    """The allocator's history of one device of a run, and its blocks."""

    device: str
    number: int
    """Row of `devices`."""
    events: Events
    lives: Lives
    position: Ints
    """Per event, its place in the order of the run's events: a ``start`` or an ``end``."""
    time_ns: Ints
    """Per event, on the clock of ``start_ns`` in `allocations`."""
    op: Ints
    """Per event, the op that was running, or -1."""
    stream: Ints
    pool: Ints
    """Per event, the number of the private pool it happened in, or `SHARED`."""
    rows: Ints
    """Per event, its row in `allocator_events`."""
    stack: Ints
    """Per event, the row of `stacks`, or -1."""
    settings: AllocatorSettings

    def reserved_bytes(self) -> Ints:
        """Return how much was reserved after each event."""
        kind, size = self.events.kind, self.events.size_bytes
        change = np.where(kind == SEGMENT_TAKEN, size, 0) - np.where(kind == SEGMENT_GIVEN, size, 0)
        total = np.cumsum(change)
        for first, after in list_seedings(self.events):
            before = total[first - 1] if first else 0
            total[after - 1 :] -= before  # all of it is told again
            total[first:after] = total[after - 1]
        return total


@dataclass(frozen=True)
class AllocatorAttribution(Attribution):
    """What a run means whose allocators' histories are part of it."""

    histories: list[DeviceHistory]

    def describe_event(self, history: DeviceHistory, at: int) -> tuple[str, str | None]:
        """Return where in the program an event of a history happened, and in which op.

        Args:
            history: One of `histories`.
            at: The position of the event in it.
        """
        op = int(history.op[at])
        if not 0 <= op < self.facts.count:
            return "", None
        forward = int(self.facts.forward_op[op])
        module = self.facts.op_module[forward if forward >= 0 else op]
        name = self.facts.code_names[self.facts.code[op]].removesuffix(".default")
        return self.facts.module_paths[module], name


def read_histories(
    stored: StoredRun, about: dict[str, Any], *, sizes_are_exact: bool = False
) -> list[DeviceHistory]:
    """Return the allocator's history per device of a run that has one.

    Args:
        stored: The run.
        about: The allocator's settings, as torch describes them in snapshots.
        sizes_are_exact: Whether the events have the sizes of blocks instead of requests.
    """
    settings = read_settings(about)
    columns = stored.columns("allocator_events")
    private = stored.columns("private_segments")
    stack = stored.columns("allocator_contexts")["stack"]
    if not len(stack):  # a traced program's events have no stacks
        stack = np.full(len(columns["device"]), -1)
    actions = stored.table("allocator_events")["action"].combine_chunks().dictionary_encode()
    words = actions.dictionary.to_pylist()
    kinds = np.array([KINDS.get(word, OTHER) for word in words], np.int64)
    is_seed = np.array([word in (SEED, SEGMENT_SEED) for word in words], np.bool_)
    code = actions.indices.to_numpy()
    histories = []
    for number, name in enumerate(stored.table("devices")["name"].to_pylist()):
        rows = np.flatnonzero(columns["device"] == number)
        if not len(rows):
            continue
        own = {column: values[rows] for column, values in columns.items()}
        events = Events(
            kinds[code[rows]],
            own["address"],
            own["size_bytes"],
            is_seed[code[rows]],
        )
        lives = list_lives(events, settings, sizes_are_exact=sizes_are_exact)
        histories.append(
            DeviceHistory(
                device=name,
                number=number,
                events=events,
                lives=lives,
                position=np.arange(len(rows)),
                time_ns=own["time_ns"],
                op=own["op"],
                stream=own["stream"],
                pool=find_pools(events, _list_private(private, number, rows)),
                rows=rows,
                stack=stack[rows],
                settings=settings,
            )
        )
    return histories


def _list_private(columns: dict[str, Ints], device: int, rows: Ints) -> PrivateSegments:
    """Return what was listed of a device's private segments, in terms of its own events."""
    is_own = columns["device"] == device
    own = {name: values[is_own] for name, values in columns.items()}
    return PrivateSegments(
        event=np.searchsorted(rows, own["event"]),
        address=own["address"],
        size_bytes=own["size_bytes"],
        pool=own["pool"],
    )


def read_settings(recorded: dict[str, object]) -> AllocatorSettings:
    """Return the allocator's options from what torch's snapshots say of them."""
    try:
        settings = AllocatorSettings.parse(str(recorded.get("PYTORCH_CUDA_ALLOC_CONF", "")))
    except ValueError:  # of a release with other options
        settings = AllocatorSettings()
    # What was set while the program ran need not be in that text.
    is_expandable = recorded.get("expandable_segments", settings.expandable_segments) is True
    return replace(settings, expandable_segments=is_expandable)
