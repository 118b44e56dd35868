"""What a test's run held, by the names of limits, and who held it; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from attnprof.analysis.growth import find_phase_peaks
from attnprof.analysis.peak import Peak, choose_device, find_peak
from attnprof.attribution.workspace import NO_STORAGE
from attnprof.pytest_plugin.marks import (
    KV_PER_TOKEN,
    LEAKED,
    LIMITS,
    PEAK,
    RESERVED,
    SAVED_SOFTMAX,
    TOTAL,
)
from attnprof.pytest_plugin.measure import RESERVED_PEAK
from attnprof.report.fold import fold_names
from attnprof.report.verdict import format_share
from attnprof.run import Run
from attnprof.units import format_bytes
from attnprof.vocabulary import Category, Phase

_MOST_LINES = 6
_MOST_SHARES = 4
NO_LAYER = "outside of submodules"
"""How a layer without a name is called: the only model itself, or code that is in no module."""


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds the bytes that a limit counts."""

    when: str
    """The instant they are counted at, or what they have in common."""
    lines: tuple[str, ...]
    """The largest first."""


class Held:
    """What one run held on its device: the GPU that held most, else the CPU."""

    def __init__(self, run: Run) -> None:
        """Ask ``run``."""
        self.run = run
        self._allocations = run.attribution.allocations
        self._device = choose_device(self._allocations, None)

    def measure(self, name: str) -> int:
        """Return what a limit is compared with, in bytes.

        Args:
            name: One of `LIMITS`. ``reserved`` is what CUDA's allocator reported; for a run on
                the CPU, what it would reserve for the same allocations, simulated.
        """
        if name == PEAK:
            return self._peaks.get((TOTAL, ""), 0)
        if name == RESERVED:
            return self._reserved_bytes
        if name == LEAKED:
            return int(self._leaked["size_bytes"].sum())
        if name in (SAVED_SOFTMAX, KV_PER_TOKEN):
            return sum(self.measure_layers(name).values())
        return self._peaks.get((name, ""), 0)

    def measure_layers(self, name: str) -> dict[str, int]:
        """Return per layer the most bytes it held, the largest first; ``""`` is `NO_LAYER`.

        Args:
            name: One of `PER_LAYER`.
        """
        if name == SAVED_SOFTMAX:
            sizes = self._saved_softmax
        elif name == KV_PER_TOKEN:
            sizes = self._kv_bytes_per_token
        else:
            sizes = {layer: size for (word, layer), size in self._peaks.items() if word == name}
            sizes.pop("", None)  # of all layers
            outside = self._measure_outside(name)
            if outside and (not sizes or "" in self.run.layers()["layer"]):
                sizes[""] = outside
        return dict(sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])))

    @cached_property
    def values(self) -> dict[str, int]:
        """Every limit's value, in bytes; but for the peak, only those that are not zero."""
        measured = {name: self.measure(name) for name in LIMITS}
        return {name: size for name, size in measured.items() if size or name == PEAK}

    def find_holders(self, name: str) -> Holders:
        """Return who holds what a limit counts."""
        if name in (SAVED_SOFTMAX, KV_PER_TOKEN):
            return Holders("by layer", list_layers(self.measure_layers(name)))
        if name == LEAKED:
            return Holders("made by the test and live when it had ended", list_blocks(self._leaked))
        if name in (PEAK, RESERVED):
            peak = self.run.peak()
            when = describe_instant(peak) + _describe_shares(peak)
            if name == RESERVED:  # in segments, which also hold what is free
                when = f"tensors had {format_bytes(peak.total_bytes)} of it at most, {when}"
        else:
            word = pl.col("category").cast(pl.String)
            peak = find_peak(self._allocations.filter(word == name), device=self._device)
            when = describe_instant(peak)
        return Holders(when, list_blocks(peak.allocations))

    @property
    def is_reserved_simulated(self) -> bool:
        """Whether no CUDA allocator reported what it reserved."""
        return self._device not in self.run.info.get(RESERVED_PEAK, {})

    @cached_property
    def _reserved_bytes(self) -> int:
        if not self.is_reserved_simulated:
            return int(self.run.info[RESERVED_PEAK][self._device])
        return self.run.simulate_allocator().reserved_peak_bytes

    @cached_property
    def _peaks(self) -> dict[tuple[str, str], int]:
        """The most live bytes by category (or total) and layer (``""`` for all)."""
        peaks = find_phase_peaks(self._allocations)
        most = peaks.group_by("category", "layer").agg(pl.col("peak_bytes").max())
        return {(word, layer): size for word, layer, size in most.iter_rows()}

    def _measure_outside(self, category: str) -> int:
        """Return the most live bytes of a category that no layer with a name holds."""
        alone = self._allocations.filter(
            pl.col("category").cast(pl.String) == category, pl.col("layer").cast(pl.String) == ""
        )
        return find_peak(alone, device=self._device).total_bytes if len(alone) else 0

    @cached_property
    def _saved_softmax(self) -> dict[str, int]:
        """The most bytes between QKᵀ and PV that each layer kept for backward at once."""
        return dict(self.run.layers().select("layer", "saved_softmax_bytes").iter_rows())

    @cached_property
    def _kv_bytes_per_token(self) -> dict[str, int]:
        rows = self.run.kv_cache().filter(pl.col("category") == Category.KV_CACHE.value)
        most = rows.group_by("layer").agg(pl.col("bytes_per_token").max().ceil().cast(pl.Int64))
        return {layer: size for layer, size in most.iter_rows() if size}

    @cached_property
    def _leaked(self) -> pl.DataFrame:
        """The blocks on any device that the run saw being made, and not being freed.

        Not what libraries keep to themselves, such as cuBLAS its workspace: no tensor holds it.
        """
        blocks = self.run.attribution.blocks
        is_held = ~blocks.is_found & ~blocks.is_freed & (blocks.storage != NO_STORAGE)
        return self._allocations.filter(pl.Series(is_held))


def describe_instant(peak: Peak) -> str:
    """Return when a peak was, for a line above its holders."""
    where = f" of {peak.layer}" if peak.layer and peak.phase != Phase.OUTSIDE else ""
    return f"live at once, {describe_phase(peak.phase)}{where}"


def describe_phase(phase: str) -> str:
    """Return where in a program a phase is, to follow on what happens there."""
    return "outside of any module" if phase == Phase.OUTSIDE else f"in {phase}"


def _describe_shares(peak: Peak) -> str:
    """Return what most of a peak is, in brackets; nothing if it is all the same."""
    sizes = sorted(peak.by_category().items(), key=lambda pair: -pair[1])[:_MOST_SHARES]
    if len(sizes) < 2:
        return ""
    shares = (f"{format_share(size, peak.total_bytes)} {category}" for category, size in sizes)
    return f" ({', '.join(shares)})"


def list_blocks(blocks: pl.DataFrame) -> tuple[str, ...]:
    """Return a line for each category, op and layer, alike layers as one, the largest first."""
    rows = (
        blocks.group_by(pl.col("category", "op", "layer").cast(pl.String))
        .agg(pl.col("size_bytes").sum(), count=pl.len())
        .sort("size_bytes", "layer", descending=[True, False])
    )
    alike: dict[tuple[str, str | None, int, int], list[str]] = {}
    for category, op, layer, size, count in rows.iter_rows():
        alike.setdefault((category, op, size, count), []).append(layer or "")
    lines = [
        (size * len(layers), _describe_blocks(category, op, name, count * len(layers)))
        for (category, op, size, count), names in alike.items()
        for name, layers in fold_names(names).items()
    ]
    lines.sort(key=lambda line: (-line[0], line[1]))
    return _write_lines(lines, are_parts=True)


def _describe_blocks(category: str, op: str | None, layer: str, count: int) -> str:
    where = f" in {layer}" if layer else ""
    made = f", made by {op}" if op else ""
    return f"{category}{where}{made}" + (f" ({count} blocks)" if count > 1 else "")


def list_layers(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return a line for each layer that holds something, those that hold the same as one."""
    alike: dict[int, list[str]] = {}
    for layer, size in sizes.items():
        if size:
            alike.setdefault(size, []).append(layer)
    lines = [
        (size, (name or NO_LAYER) + (", each" if len(layers) > 1 else ""))
        for size, names in alike.items()
        for name, layers in fold_names(names).items()
    ]
    return _write_lines(lines, are_parts=False)


def _write_lines(sized: Sequence[tuple[int, str]], *, are_parts: bool) -> tuple[str, ...]:
    """Return a line for each of the first, and one for the rest, with the sum of parts."""
    rest = [size for size, _ in sized[_MOST_LINES:]]
    lines = [f"{format_bytes(size):>12}  {text}" for size, text in sized[:_MOST_LINES]]
    if rest and are_parts:
        lines.append(f"{format_bytes(sum(rest)):>12}  in {len(rest)} smaller ones")
    elif rest:
        lines.append(f"{'':>12}  and {len(rest)} more")
    return tuple(lines)
