"""One device of a run that is still being written: live bytes, their peak, and a rolling window."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

WINDOW_SECONDS = 120.0
OTHER = "activations and all else"
COUNTED = "only counted"
"""What the allocator counted at the end of a step that was not recorded, beyond what is known."""
_WINDOW_NS = int(WINDOW_SECONDS * 1e9)
_FINEST_NS = 95
_COARSEST_NS = _FINEST_NS << 20
"""Of what is kept of the past: the extremes of every tenth of a second, and of shorter stretches as
long as there is room for them."""
_MOST_BINS = _WINDOW_NS // _COARSEST_NS + 1


@dataclass(frozen=True, slots=True)
class Instant:
    """Live bytes at a time."""

    time_ns: int
    total_bytes: int
    by_role: tuple[tuple[str, int], ...]
    """They sum to the total."""


@dataclass(slots=True)
class Device:
    """One device's live bytes, as far as the run was written."""

    total_bytes: int = 0
    named: dict[str, int] = field(default_factory=dict)
    """Of what the program says something about, bytes by role."""
    peak: Instant | None = None
    """The highest instant since the run began: exact, whatever the window shows."""
    bins: OrderedDict[int, tuple[Instant, Instant]] = field(default_factory=OrderedDict)
    """Per stretch of `bin_ns` its lowest and highest instant."""
    bin_ns: int = _FINEST_NS

    def name(self, role: str, size_bytes: int) -> None:
        """Take note that bytes of a role came or, if negative, went; the total stays."""
        if role != OTHER:
            self.named[role] = self.named.get(role, 0) + size_bytes

    def change(self, time_ns: int, size_bytes: int) -> None:
        """Take note that the total changed."""
        self.total_bytes += size_bytes
        lowest, highest = self.bins.get(time_ns // self.bin_ns, (None, None))
        is_low = lowest is None or self.total_bytes < lowest.total_bytes
        is_high = highest is None or self.total_bytes > highest.total_bytes
        if not (is_low or is_high):
            return
        now = Instant(time_ns, self.total_bytes, tuple(self._split()))
        self.bins[time_ns // self.bin_ns] = (
            now if is_low or lowest is None else lowest,
            now if is_high or highest is None else highest,
        )
        if self.peak is None or self.total_bytes > self.peak.total_bytes:
            self.peak = now
        while len(self.bins) > _MOST_BINS:
            self._make_room(time_ns)

    def _make_room(self, now_ns: int) -> None:
        """Drop the oldest stretch if the window is past it, else merge stretches two by two."""
        oldest = next(iter(self.bins))
        if self.bin_ns == _COARSEST_NS or (oldest + 1) * self.bin_ns <= now_ns - _WINDOW_NS:
            del self.bins[oldest]
            return
        fine, self.bins, self.bin_ns = self.bins, OrderedDict(), 2 * self.bin_ns
        for at, (lowest, highest) in fine.items():
            low, high = self.bins.get(at // 2, (lowest, highest))
            self.bins[at // 2] = (
                min(low, lowest, key=lambda instant: instant.total_bytes),
                max(high, highest, key=lambda instant: instant.total_bytes),
            )

    def hold(self, time_ns: int, total_bytes: int) -> None:
        """Take note of the total that an allocator's history tells."""
        self.named.pop(COUNTED, None)
        self.change(time_ns, total_bytes - self.total_bytes)

    def count(self, time_ns: int, total_bytes: int, peak_bytes: int) -> None:
        """Take note of what the allocator counted by the end of a step that was not recorded.

        Args:
            time_ns: When the step ended.
            total_bytes: What was live then.
            peak_bytes: The most that was live in it; -1 if that is not known.
        """
        if peak_bytes > (self.peak.total_bytes if self.peak else 0):
            self.peak = Instant(time_ns, peak_bytes, ((COUNTED, peak_bytes),))
        self.name(COUNTED, total_bytes - self.total_bytes)
        self.change(time_ns, total_bytes - self.total_bytes)

    def _split(self) -> Iterable[tuple[str, int]]:
        """Yield bytes by role; they sum to the total."""
        rest = self.total_bytes
        for role, size in sorted(self.named.items()):
            # An allocator's history and what the program says are not in step to the event.
            shown = max(0, min(size, rest))
            yield role, shown
            rest -= shown
        yield OTHER, rest

    def instants(self, since_ns: int, now_ns: int) -> list[Instant]:
        """Return the extremes of the window, in order of time, and what is live now.

        Args:
            since_ns: When the window begins.
            now_ns: The time of the last event of any device.
        """
        pairs = [pair for at, pair in self.bins.items() if (at + 1) * self.bin_ns > since_ns]
        by_time = {instant.time_ns: instant for pair in pairs for instant in pair}
        found = [by_time[time_ns] for time_ns in sorted(by_time)]
        if self.peak is None:
            return []
        if not found or found[-1].time_ns < now_ns or found[-1].total_bytes != self.total_bytes:
            found.append(Instant(now_ns, self.total_bytes, tuple(self._split())))
        return found
