"""Everything a report says about growth, gathered once, so that all reporters say the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attnprof.analysis.fits import TOTAL, Fit
from attnprof.analysis.wall import Wall
from attnprof.report.summary import Holder
from attnprof.vocabulary import Status


@dataclass(frozen=True, slots=True)
class Point:
    """What one length held, measured or in a dry run."""

    seq_len: int
    source: str
    """``"measured"``, ``"dry_run"`` or ``"steps"``."""
    status: str
    """A `Status`, or ``"skipped"``."""
    reason: str = ""
    """Why it is not completed."""
    sizes: dict[str, int] = field(default_factory=dict)
    """The most bytes of each category; ``"total"`` is the peak. Empty if nothing is known."""

    @property
    def is_done(self) -> bool:
        """Whether the length ran to its end."""
        return self.status == Status.COMPLETED

    def held_bytes(self, category: str = TOTAL) -> int | None:
        """Return the most bytes of a category, as far as the length came; None if not known."""
        return self.sizes.get(category, 0) if self.sizes else None


@dataclass(frozen=True, slots=True)
class LayerLaw:
    """Layers that hold the same bytes of a category at every length, and their law."""

    layer: str
    """The folded name."""
    count: int
    """How many layers the name stands for."""
    fit: Fit
    """Of one of them."""
    each_bytes: int
    """The most that one of them holds at the longest length."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory that a step has to fit into, and the longest sequence that does."""

    name: str
    """``"H200"``, ``"80 GB"``, or where it ran out of memory."""
    size_bytes: int | None
    """None where it is only known to have run out."""
    wall: Wall | None
    """None if there is none, or it cannot be told."""
    why_no_wall: str = ""


@dataclass(frozen=True, slots=True)
class GrowthSummary:
    """How memory grows, as reports tell it."""

    name: str
    """What was swept."""
    path: Path | None
    """The directory of the sweep, or of the run whose steps grow."""
    points: tuple[Point, ...]
    """By source and rising lengths."""
    capacities: tuple[Capacity, ...] = ()
    about: tuple[str, ...] = ()
    """Where it ran and with what, in a few words each."""
    fits: dict[str, Fit] = field(default_factory=dict)
    """``"total"`` first, then categories, what is largest at the longest length first. Empty if
    fewer than two lengths are known."""
    longest: int | None = None
    """The longest completed length of the source that is fitted; None if there is none."""
    holders: tuple[Holder, ...] = ()
    """Who holds the peak of the longest length; they sum to it."""
    layer_laws: tuple[LayerLaw, ...] = ()
    """Of layers and categories, what is largest at the longest length first."""
    predicted: tuple[tuple[int, int], ...] = ()
    """Lengths from the longest known one on, and their predicted peaks."""
    theory: tuple[tuple[int, int], ...] = ()
    """Lengths, and what theory says autograd keeps of their softmax results; empty for none."""
    assumptions: tuple[str, ...] = ()
    """What dry runs took for granted."""
    focus: str = TOTAL
    """The category that sentence, plot and first table are about, or ``"total"``."""

    @property
    def fit(self) -> Fit | None:
        """The law of the focus."""
        return self.fits.get(self.focus)

    @property
    def largest_bytes(self) -> int:
        """The peak at the longest length."""
        return sum(holder.size_bytes for holder in self.holders)

    def find_points(self, source: str) -> list[Point]:
        """Return the points of a source, by rising lengths."""
        return [point for point in self.points if point.source == source]


def find_residual(fit: Fit, point: Point) -> float | None:
    """Return by which share of the law a point's bytes differ from it; None if it has none."""
    size, fitted = point.held_bytes(fit.category), fit.predict(point.seq_len)
    if size is None or not point.is_done or not fitted:
        return None
    return size / fitted - 1


def find_shared_lengths(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Return measured points beside the dry ones of the same lengths."""
    dry = {p.seq_len: p for p in points if p.source == "dry_run" and p.is_done}
    return [
        (point, dry[point.seq_len])
        for point in points
        if point.source == "measured" and point.is_done and point.seq_len in dry
    ]
