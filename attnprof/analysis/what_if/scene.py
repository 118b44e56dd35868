"""What scenarios look at: a run's facts by storage and by op, prepared once."""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import polars as pl

from attnprof.analysis.peak import Peak, find_peak
from attnprof.analysis.what_if.lineage import Masks
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.attribute import Attribution
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import ITEM_BYTES, Bools, Facts, Ints
from attnprof.units import format_bytes
from attnprof.vocabulary import Category


class Scene:
    """One run and one of its devices."""

    def __init__(self, attribution: Attribution, device: str | None = None) -> None:
        """Look at a device of a run.

        Args:
            attribution: The run.
            device: The device; without it, as `Run.peak` chooses.

        Raises:
            ValueError: The run has no such device.
        """
        self.attribution = attribution
        self.facts: Facts = attribution.facts
        self.table = Table.of(attribution, device)
        """What was recorded."""
        self.before: Peak = find_peak(attribution.allocations, device=device)

    @property
    def device(self) -> str:
        """The device whose memory is replayed."""
        return self.table.device

    @property
    def is_on_cpu(self) -> bool:
        """Whether the CPU's kernels do the work."""
        return self.device == "cpu"

    @property
    def is_torch_2_8(self) -> bool:
        """Whether the oldest torch that is supported recorded the run."""
        environment = self.facts.stored.info.get("environment") or {}
        return str(environment.get("torch", "")).startswith("2.8.")

    @property
    def calls(self) -> list[AttentionCall]:
        """All attention calls, repeated forwards included."""
        return self.attribution.calls

    @cached_property
    def layers(self) -> pl.Series:
        """Per row of the allocations, the path of its layer."""
        return self.attribution.allocations["layer"].cast(pl.String)

    @cached_property
    def item_bytes(self) -> Ints:
        """Per row of the allocations, bytes per element; 1 where the dtype is not known."""
        dtypes = self.attribution.allocations["dtype"].cast(pl.String)
        sizes = dtypes.replace_strict(ITEM_BYTES, default=1, return_dtype=pl.Int64)
        result: Ints = sizes.fill_null(1).to_numpy()
        return result

    @cached_property
    def roles(self) -> dict[int, str]:
        """Per storage that has one, its `Role`: what the program itself says it is."""
        table = self.facts.stored.table("identities")
        return dict(zip(table["storage"].to_pylist(), table["role"].to_pylist(), strict=True))

    @cached_property
    def masks(self) -> Masks:
        """Where the masks of the calls come from."""
        return Masks(self.facts, self.roles)

    def is_in_layers(self, table: Table, layers: Iterable[str]) -> Bools:
        """Return which blocks belong to some layers."""
        inside: Bools = self.layers.is_in(list(layers)).to_numpy()
        return inside[table.block]

    def is_storage(self, table: Table, storages: Iterable[int]) -> Bools:
        """Return which blocks are of some storages."""
        return np.isin(table.storage, np.fromiter(storages, np.int64))

    def event_before(self, op: Ints) -> Ints:
        """Return the first event of each op; for an op past the last, the end of the run."""
        return np.searchsorted(self.facts.events["op"], op, "left")

    def first_birth(self, op: Ints) -> Ints:
        """Return the first event from each op on that is no free: what came before it is gone."""
        births = self.facts.births
        at = np.searchsorted(self.facts.events["op"][births], op, "left")
        return np.append(births, len(self.facts.events["op"]))[at]

    def event_after(self, op: Ints) -> Ints:
        """Return the first event after each op."""
        return np.searchsorted(self.facts.events["op"], op, "right")

    def event_of_return(self, op: Ints) -> Ints:
        """Return for each op the first event after its module returned; for -1, the run's end."""
        return self.event_before(self._return_of_scope[np.append(self.facts.scope, -1)[op]])

    @cached_property
    def _return_of_scope(self) -> Ints:
        """Per module call, the first op after it; the last entry, for no module, is past all."""
        result = np.full(len(self.facts.scope_module), self.facts.count, np.int64)
        result[self.facts.scopes["scope"]] = self.facts.scopes["exit_op"]
        result[-1] = self.facts.count
        return result

    def forward_of(self, call: AttentionCall) -> int:
        """Return the number of the outermost forward that a call began in, or the last before."""
        enters = self.attribution.timeline.forward_begin
        return int(np.searchsorted(enters, call.ops[0], "right")) - 1

    def storages_of(self, rows: Iterable[int]) -> set[int]:
        """Return the storages in operand rows."""
        return {int(self.facts.storage[row]) for row in rows}

    @cached_property
    def _backward_of(self) -> tuple[Ints, Ints]:
        """Ops of backward by the op of forward that they belong to, and where each one's begin."""
        forward = self.facts.forward_op
        order = np.argsort(forward, kind="stable")
        return order, np.searchsorted(forward[order], np.arange(self.facts.count + 1))

    def ops_differentiating(self, ops: Iterable[int]) -> list[int]:
        """Return the ops of backward that belong to some ops of forward, in their order."""
        order, begins = self._backward_of
        found: list[int] = []
        for op in ops:
            found += order[begins[op] : begins[op + 1]].tolist()
        return sorted(found)

    def size_at_peak(self, *categories: Category, layers: Iterable[str] | None = None) -> int:
        """Return the bytes of some categories at the peak that was recorded."""
        held = self.before.allocations
        mine = pl.col("category").cast(pl.String).is_in([c.value for c in categories])
        if layers is not None:
            mine &= pl.col("layer").cast(pl.String).is_in(list(layers))
        return int(held.filter(mine)["size_bytes"].sum())

    def size_of_held(self, table: Table, which: Bools) -> int:
        """Return the bytes, at the peak that was recorded, of some blocks of a table."""
        held = np.isin(self.before.allocations["allocation_id"].to_numpy(), table.block[which])
        return int(self.before.allocations["size_bytes"].to_numpy()[held].sum())

    def say_share(self, size_bytes: int) -> str:
        """Return bytes and their share of the peak that was recorded: ``"96.0 MiB (46 %)"``."""
        total = self.before.total_bytes
        share = 100 * size_bytes / total if total else 0.0
        return f"{format_bytes(size_bytes)} ({share:.0f} %)"


def list_ranges(begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Return every (i, j) with ``begin[i] <= j < end[i]``, by i and then by j."""
    counts = np.maximum(end - begin, 0)
    which = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return which, np.arange(len(which)) - first[which] + begin[which]


def count_words(number: int, word: str) -> str:
    """Return ``"1 layer"`` or ``"12 layers"``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
