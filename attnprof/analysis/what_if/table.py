"""The blocks of one device as a table that scenarios rewrite, and its replay.

A what-if drops rows, changes their size, moves their ends or adds rows; then all of them are
replayed, for the peak moves. Nothing here knows why a row is rewritten.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from attnprof.analysis.peak import Peak, Replay, choose_device
from attnprof.analysis.peak import replay as replay_frame
from attnprof.attribution.attribute import Attribution
from attnprof.attribution.blocks import CUDA_BLOCK_BYTES
from attnprof.attribution.facts import Bools, Ints
from attnprof.attribution.labels import CATEGORIES
from attnprof.attribution.labels import CODE as CATEGORY
from attnprof.attribution.phases import CODE as PHASE
from attnprof.attribution.phases import PHASES
from attnprof.vocabulary import Category, Phase


@dataclass(frozen=True, slots=True)
class Table:
    """Blocks, one per position in all of the arrays; every method returns another table.

    ``start`` and ``end`` are places in the order of events, `span` places apart, so that whole
    forwards can be inserted between two events (see `before`).
    """

    device: str
    span: int
    """Places per event: more than there are events."""
    block: Ints
    """The row of `Attribution.allocations` that a block was, or is a copy of."""
    storage: Ints
    size_bytes: Ints
    start: Ints
    end: Ints
    category: Ints
    """Position in `labels.CATEGORIES`."""
    phase: Ints
    """Position in `phases.PHASES`."""

    @classmethod
    def of(cls, attribution: Attribution, device: str | None = None) -> "Table":
        """Return what was recorded of a device, unchanged.

        Args:
            attribution: The run.
            device: The device; without it, as `Run.peak` chooses.

        Raises:
            ValueError: The run has no such device.
        """
        frame = attribution.allocations
        device = choose_device(frame, device)
        block = np.flatnonzero((frame["device"].cast(pl.String) == device).to_numpy())
        last = max((int(frame[c].max() or 0) for c in ("start", "end")), default=0)  # type: ignore[arg-type]  # integers
        span = last + 2
        return cls(
            device=device,
            span=span,
            block=block,
            storage=attribution.blocks.storage[block],
            size_bytes=frame["size_bytes"].to_numpy()[block],
            start=frame["start"].to_numpy()[block] * span,
            end=frame["end"].to_numpy()[block] * span,
            category=_number(frame["category"], {c.value: n for c, n in CATEGORY.items()})[block],
            phase=_number(frame["phase"], {p.value: n for p, n in PHASE.items()})[block],
        )

    def __len__(self) -> int:
        return len(self.block)

    def at(self, event: Ints) -> Ints:
        """Return the places of events, given as positions in the order of events."""
        return event * self.span

    def before(self, event: Ints, number: Ints) -> Ints:
        """Return places between events and what came before them.

        Args:
            event: Positions in the order of events.
            number: Which of the places, from 0 on; fewer than there are events.
        """
        return (event - 1) * self.span + 1 + number

    def take(self, which: Ints | Bools) -> "Table":
        """Return some of the blocks, by a mask or by their positions."""
        return self._with({name: getattr(self, name)[which] for name in _COLUMNS})

    def drop(self, which: Bools) -> "Table":
        """Return the table without some blocks."""
        return self.take(~which)

    def is_of(self, *categories: Category) -> Bools:
        """Return which blocks are of these categories."""
        return np.isin(self.category, [CATEGORY[c] for c in categories])

    def is_in(self, *phases: Phase) -> Bools:
        """Return which blocks were made in these phases."""
        return np.isin(self.phase, [PHASE[p] for p in phases])

    def resize(self, which: Bools, size_bytes: Ints) -> "Table":
        """Return the table with other sizes for some blocks.

        Args:
            which: The blocks.
            size_bytes: A size per block of the table; only those of ``which`` are used.
        """
        sizes = round_up(size_bytes, self.device)
        return replace(self, size_bytes=np.where(which, sizes, self.size_bytes))

    def end_by(self, which: Bools, end: Ints) -> "Table":
        """Return the table with some blocks freed earlier.

        Args:
            which: The blocks.
            end: A place per block of the table. A block's life never grows by it, and what would
                end before it began is dropped.
        """
        ends = np.where(which, np.minimum(self.end, end), self.end)
        return replace(self, end=ends).drop(which & (ends <= self.start))

    def hold_until(self, which: Bools, end: Ints) -> "Table":
        """Return the table with some blocks kept for longer; a place per block of the table."""
        return replace(self, end=np.where(which, np.maximum(self.end, end), self.end))

    def move(self, start: Ints, end: Ints) -> "Table":
        """Return the table with all blocks at other places."""
        return replace(self, start=start, end=end)

    def add(self, other: "Table") -> "Table":
        """Return the table with the blocks of another besides."""
        return self._with(
            {n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in _COLUMNS}
        )

    def relabel(
        self, which: Bools, *, category: Category | None = None, phase: Phase | None = None
    ) -> "Table":
        """Return the table with another category or phase for some blocks."""
        changes: dict[str, Ints] = {}
        if category is not None:
            changes["category"] = np.where(which, CATEGORY[category], self.category)
        if phase is not None:
            changes["phase"] = np.where(which, PHASE[phase], self.phase)
        return self._with(changes)

    def elide(self, links: Mapping[int, int]) -> "Table":
        """Return the table as if some storages had never been copied from others.

        Args:
            links: Per storage that would not exist, the storage that would be read in its place
                and is kept for as long as both were. Chains are followed. Where there is no block
                of the storage at the end of the chain, the copy stays.
        """
        links = {copy: source for copy, source in links.items() if copy != source}
        if not links or not len(self):
            return self
        copies, sources = follow_links(links)
        count = int(max(self.storage.max(), copies.max(), sources.max())) + 1
        source_of = np.full(count, -1, np.int64)
        source_of[copies] = sources
        newest = np.full(count, -1, np.int64)
        """Per storage, its last block here."""
        order = np.argsort(self.start, kind="stable")
        newest[self.storage[order]] = order
        source = source_of[self.storage]
        goes = (source >= 0) & (newest[source] >= 0)
        ends = self.end.copy()
        np.maximum.at(ends, newest[source[goes]], self.end[goes])
        return replace(self, end=ends).drop(goes)

    def _with(self, columns: dict[str, Ints]) -> "Table":
        kept = {name: getattr(self, name) for name in _COLUMNS}
        return Table(device=self.device, span=self.span, **(kept | columns))

    def replay(self) -> Replay:
        """Return live bytes after each allocation; the frame's ``row`` is a position here."""
        frame = pl.DataFrame(
            {
                "row": np.arange(len(self)),
                "device": pl.repeat(self.device, len(self), eager=True),
                "allocation_id": np.arange(len(self)),
                "size_bytes": self.size_bytes,
                "start": self.start,
                "end": self.end,
            }
        )
        return replay_frame(frame, self.device)

    def find_peak(self, attribution: Attribution, replayed: Replay | None = None) -> Peak:
        """Return the highest instant of the replay, in the words of the run it came from.

        Args:
            attribution: That run.
            replayed: What `replay` returned, if the caller has it already.
        """
        if not len(self):
            nothing = attribution.allocations.clear().drop("start", "end")
            return Peak(self.device, 0, 0, Phase.OUTSIDE.value, "", None, 0, nothing)
        replayed = replayed or self.replay()
        at = int(np.argmax(replayed.live_bytes))
        maker = int(replayed.frame["row"][at])
        held = self.take(replayed.held_at(at)["row"].to_numpy())
        row = attribution.allocations.row(int(self.block[maker]), named=True)
        return Peak(
            device=self.device,
            total_bytes=int(replayed.live_bytes[at]),
            step=int(row["step"]),
            phase=PHASES[self.phase[maker]].value,
            layer=str(row["layer"]),
            op=row["op"],
            time_ns=self._find_time(maker, attribution),
            allocations=held.to_frame(attribution).sort(
                "size_bytes", "allocation_id", descending=[True, False]
            ),
        )

    def most_by_phase(self, replayed: Replay) -> dict[str, int]:
        """Return the most live bytes at any allocation of each phase that has some.

        Args:
            replayed: What `replay` returned.
        """
        phases = self.phase[replayed.frame["row"].to_numpy()]
        return {
            PHASES[phase].value: int(replayed.live_bytes[phases == phase].max())
            for phase in np.unique(phases).tolist()
        }

    def to_frame(self, attribution: Attribution) -> pl.DataFrame:
        """Return the blocks with the columns of `Run.allocations`.

        ``requested_bytes`` is ``size_bytes``, and ``exact`` is false, where a block was rewritten;
        ``start_ns`` and ``end_ns`` are when it lived in the run as it was.
        """
        frame = attribution.allocations[self.block]
        is_same = (frame["size_bytes"] == pl.Series(self.size_bytes)) & (
            frame["end"] * self.span == pl.Series(self.end)
        )
        return frame.with_columns(
            size_bytes=pl.Series(self.size_bytes),
            requested_bytes=pl.when(is_same)
            .then("requested_bytes")
            .otherwise(pl.Series(self.size_bytes)),
            phase=_name(PHASES, self.phase),
            category=_name(CATEGORIES, self.category),
            exact=pl.col("exact") & is_same,
        ).drop("start", "end")

    def _find_time(self, row: int, attribution: Attribution) -> int:
        """Return when the event at which a block begins took place, or the one it follows."""
        began = attribution.blocks.start[self.block[row]] * self.span
        if self.start[row] <= began:
            return int(attribution.blocks.start_ns[self.block[row]])
        times = attribution.facts.events["time_ns"]
        return int(times[min(int(self.start[row]) // self.span, len(times) - 1)])


_COLUMNS = ("block", "storage", "size_bytes", "start", "end", "category", "phase")


def round_up(size_bytes: Ints, device: str) -> Ints:
    """Return what an allocator takes for a request: multiples of 512 bytes on a GPU."""
    if not device.startswith("cuda"):
        return size_bytes
    return -(-size_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES


def follow_links(links: Mapping[int, int]) -> tuple[Ints, Ints]:
    """Return copies, and what is at the end of each one's chain of links."""
    ends: dict[int, int] = {}
    for copy in links:
        at, passed = copy, dict[int, None]()
        while at in links and at not in ends and at not in passed:
            passed[at] = None
            at = links[at]
        if at in passed:  # a ring: from each of its storages the way ends just before it
            ring = list(passed)[list(passed).index(at) :]
            ends |= zip(ring, [ring[-1], *ring[:-1]], strict=True)
        end = ends.get(at, at)
        ends |= {storage: end for storage in passed if storage not in ends}
    pairs = np.array([(c, e) for c in links if (e := ends[c]) != c], np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _number(words: pl.Series, numbers: Mapping[str, int]) -> Ints:
    found: Ints = words.cast(pl.String).replace_strict(numbers, return_dtype=pl.Int64).to_numpy()
    return found


def _name(words: list[Category] | list[Phase], numbers: Ints) -> pl.Series:
    return pl.Series([w.value for w in words], dtype=pl.String).gather(numbers).cast(pl.Categorical)
