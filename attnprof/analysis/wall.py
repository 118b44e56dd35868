"""The wall: the longest sequence whose step fits a capacity, found with few trials."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import polars as pl

from attnprof.analysis.allocator import simulate_allocator
from attnprof.analysis.peak import choose_device, find_peak
from attnprof.errors import CaptureError, DryRunError, LengthError
from attnprof.theory.devices import find_device
from attnprof.units import MOST_TOKENS, format_apart, format_bytes, parse_bytes

_TRUSTED_TRIALS = 8
"""After so many trials the law has misled, and the bracket is halved instead."""

_BOLDNESS = 8
"""As long as all trials fit, the next is longer by no more than this factor: trials are dear."""

_NEVER = 2**62
"""Stands among trials for what a length needs that the program refuses."""

Measure = Callable[[int], int]
"""Bytes needed at a sequence length."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A way to find out what a length needs."""

    measure: Callable[[int, int], int]
    """Bytes needed at a sequence length on a device with so many bytes."""
    counts: str
    """``"reserved"`` (by the allocator) or ``"live"`` bytes."""


@dataclass(frozen=True, slots=True)
class Wall:
    """The longest sequence that fits, the next one that does not, and how that is known."""

    seq_len: int
    """The longest length that fits, a multiple of what was asked for; 0 if none does."""
    peak_bytes: int
    """What it needs; 0 if none fits."""
    next_seq_len: int
    """The next length tried, which does not fit."""
    next_bytes: int | None
    """What that needs; None where it only ran out of memory, or cannot run at all."""
    capacity_bytes: int | None
    """What there is; None where it is only known to have run out."""
    by: str
    """``"dry run"``, ``"fit"`` or ``"measured"``."""
    counts: str
    """Which bytes were compared with the capacity: ``"reserved"`` or ``"live"``."""
    dry_runs: int = 0
    """How many were made."""
    reason: str = ""
    """Why no dry run says it, or why only some lengths were tried."""

    @property
    def sentence(self) -> str:
        """The wall and its evidence, in one sentence."""
        compared = (self.next_bytes, self.capacity_bytes, self.peak_bytes)
        known = [size for size in compared if size is not None]
        texts = dict(zip(known, format_apart(*known), strict=True))
        capacity = "memory" if self.capacity_bytes is None else texts[self.capacity_bytes]
        below = (
            f"n = {self.seq_len:,} fits into {capacity} with {texts[self.peak_bytes]}"
            if self.seq_len
            else f"no length fits into {capacity}"
        )
        fails = "runs out" if self.by == "measured" else "cannot run"
        needs = fails if self.next_bytes is None else f"needs {texts[self.next_bytes]}"
        trials = "1 dry run" if self.dry_runs == 1 else f"{self.dry_runs} dry runs"
        how = {"measured": "measured", "fit": "by fit"}.get(self.by, trials)
        text = f"{below}, n = {self.next_seq_len:,} {needs} ({self.counts} bytes, {how})"
        return text + (f"; {self.reason}" if self.reason else "")


def read_capacity(capacity: int | str) -> int:
    """Return a capacity in bytes.

    Args:
        capacity: Bytes, text such as ``"80 GB"``, or the name of a device such as ``"H200"``,
            which stands for what a program can have of its memory.

    Raises:
        TypeError: It is neither a whole number nor text.
        ValueError: It is neither a size nor a known device.
    """
    if isinstance(capacity, str) and not capacity.strip()[:1].isdigit():
        return find_device(capacity).available_bytes
    return parse_bytes(capacity)


def count_needed_bytes(allocations: pl.DataFrame, capacity_bytes: int | None = None) -> int:
    """Return what a device must have for a run.

    On a GPU that is what the caching allocator reserves at its peak, cached and fragmented memory
    included; on a CPU, the peak of live bytes. An allocator that finds its device full gives back
    what it only caches, so that it may do with less than it would like to have.

    Args:
        allocations: Attributed blocks with ``start`` and ``end`` (order of events).
        capacity_bytes: What the device has. Without, there is no limit.
    """
    if not is_reserved(allocations):
        return find_peak(allocations).total_bytes
    wanted = simulate_allocator(allocations).reserved_peak_bytes
    if capacity_bytes is None or wanted <= capacity_bytes:
        return wanted
    limited = simulate_allocator(allocations, capacity_bytes=capacity_bytes)
    return wanted if limited.out_of_memory else limited.reserved_peak_bytes


def is_reserved(allocations: pl.DataFrame) -> bool:
    """Return whether a caching allocator served the blocks."""
    return choose_device(allocations, None).startswith("cuda")


class _Refused(Exception):
    """The workload raised something at a length of our choice."""


def find_wall(
    capacity_bytes: int,
    law: Measure,
    *,
    fit: Probe,
    dry_run: Probe | None = None,
    multiple_of: int = 1,
    known: Sequence[int] = (),
) -> Wall:
    """Find the longest length that fits, by dry runs if they are possible, else by the fit.

    Args:
        capacity_bytes: What there is.
        law: An estimate of the bytes needed that rises with n; it says where to look.
        fit: Tells what a length needs from what is known of other lengths.
        dry_run: Tells it by running the length dry.
        multiple_of: Only multiples of this are considered.
        known: Lengths that the workload accepts: if it refuses others, the multiples of what they
            have in common are considered.

    Raises:
        CaptureError: A dry run is not possible now, since another trace is running.
        ValueError: Every length fits.
    """
    fitted = _search(capacity_bytes, law, fit, multiple_of, by="fit")
    if dry_run is None:
        return fitted
    reason = ""
    common = math.lcm(multiple_of, math.gcd(*known) or 1)
    for step in dict.fromkeys((multiple_of, common)):
        left_out = f"only multiples of {step} were tried: {reason}" if reason else ""
        try:
            wall = _search(
                capacity_bytes, law, _guard(dry_run), step, by="dry run", start=fitted.seq_len
            )
            return replace(wall, reason=wall.reason or left_out)
        except DryRunError as error:
            reason = str(error)
            break
        except _Refused as refused:
            reason = str(refused)
    return replace(fitted, reason=f"no dry run says so: {reason}")


def observe_wall(seq_len: int, peak_bytes: int, next_seq_len: int) -> Wall:
    """Return the wall of a machine that ran out of memory at a length, and did not at another."""
    return Wall(seq_len, peak_bytes, next_seq_len, None, None, by="measured", counts="live")


def _guard(probe: Probe) -> Probe:
    """Tell what the workload raises from what we raise."""

    def measure(seq_len: int, capacity_bytes: int) -> int:
        try:
            return probe.measure(seq_len, capacity_bytes)
        except (CaptureError, DryRunError):  # a `LengthError` says where to look instead
            raise
        except Exception as error:
            what = f"at n = {seq_len} the workload raises {type(error).__name__}: {error}"
            raise _Refused(what) from error

    return replace(probe, measure=measure)


def _search(
    capacity_bytes: int,
    law: Measure,
    probe: Probe,
    multiple_of: int,
    *,
    by: str,
    start: int | None = None,
) -> Wall:
    def measure(seq_len: int) -> int:
        return probe.measure(seq_len, capacity_bytes)

    refusals: dict[int, LengthError] = {}
    trials = search_wall(
        capacity_bytes, law, measure, multiple_of=multiple_of, start=start, refusals=refusals
    )
    fits = max((n for n, size in trials.items() if size <= capacity_bytes), default=0)
    over = min(n for n, size in trials.items() if size > capacity_bytes and n > fits)
    return Wall(
        seq_len=fits,
        peak_bytes=trials.get(fits, 0),
        next_seq_len=over,
        next_bytes=None if over in refusals else trials[over],
        capacity_bytes=capacity_bytes,
        by=by,
        counts=probe.counts,
        dry_runs=len(trials) if by == "dry run" else 0,
        reason=str(refusals.get(over, "")),
    )


def search_wall(
    capacity_bytes: int,
    law: Measure,
    measure: Measure,
    *,
    multiple_of: int = 1,
    start: int | None = None,
    refusals: dict[int, LengthError] | None = None,
) -> dict[int, int]:
    """Measure until a length is known to fit and the next one not to.

    The law says where to look. It is corrected by what the last trials found, so that two do
    where it is right and a few more where it is off; where it misleads, the bracket is halved.

    Args:
        capacity_bytes: What there is.
        law: An estimate of what ``measure`` returns; cheap.
        measure: What a length really needs; expensive.
        multiple_of: Only multiples of this are tried.
        start: The first length to try, where it is known better than by the law.
        refusals: Gets the lengths that ``measure`` refuses, as longer than the program can take.

    Returns:
        The trials: bytes by length. Among them are the longest that fits, unless not even
        ``multiple_of`` does, and the next one.

    Raises:
        ValueError: Every length fits.
        Exception: What ``measure`` raises.
    """
    longest = MOST_TOKENS // multiple_of  # memory that still fits there does not grow
    guess = _find_longest(capacity_bytes, law, multiple_of)
    if guess == longest:
        raise _no_wall(capacity_bytes)
    if start is not None:
        guess = start // multiple_of
    low, high = 0, longest  # in multiples; low fits, high is taken not to
    trials: dict[int, int] = {}
    refused = {} if refusals is None else refusals
    fitted: bool | None = None
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        if high == longest and trials:
            guess = min(guess, _BOLDNESS * low)
        at, before = guess, fitted
        try:
            trials[at * multiple_of] = measure(at * multiple_of)
        except LengthError as error:
            refused[at * multiple_of] = error
            trials[at * multiple_of] = _NEVER
        fitted = trials[at * multiple_of] <= capacity_bytes
        low, high = (at, high) if fitted else (low, at)
        if high * multiple_of in refused:
            guess = _step_to_limit(low, high, refused[high * multiple_of].rows // multiple_of)
            continue
        corrected = _correct(capacity_bytes, law, trials)
        if corrected is None:
            guess = (low + high) // 2 if high < longest else _BOLDNESS * low
            continue
        guess = _find_longest(corrected, law, multiple_of)
        if fitted == before:
            guess += guess - at  # past the wall, to have it between two trials
    if high == longest:
        raise _no_wall(capacity_bytes)
    return trials


def _step_to_limit(low: int, high: int, rows: int) -> int:
    """Return where to look for the end of a table that is too short for ``high``.

    A table of positions ends at the length of which it has rows; others have more or fewer.
    """
    if low < rows < high:
        return rows
    return low + 1 if low == rows else (low + high) // 2


def _correct(capacity_bytes: int, law: Measure, trials: dict[int, int]) -> float | None:
    """Return where the law stands when the capacity is full; None if it has misled too often.

    What is measured is taken for a + b·law by the last two trials, or, after one or if it did
    not rise between them (allocators reserve in steps), for b·law.
    """
    if len(trials) > _TRUSTED_TRIALS:
        return None
    (x_before, y_before), (x, y) = [(0, 0), *((law(n), size) for n, size in trials.items())][-2:]
    if (y - y_before) * (x - x_before) <= 0:
        x_before = y_before = 0
    return x + (capacity_bytes - y) * (x - x_before) / ((y - y_before) or 1)


def _no_wall(capacity_bytes: float) -> ValueError:
    return ValueError(
        f"there is no wall: by all that is known, {MOST_TOKENS} tokens fit into "
        f"{format_bytes(round(capacity_bytes))}; sweep lengths at which memory grows, or give a "
        "smaller capacity"
    )


def _find_longest(capacity_bytes: float, law: Measure, multiple_of: int) -> int:
    """Return the most multiples that fit by a law that rises with n; 0 if none does."""
    low, high, longest = 0, 1, MOST_TOKENS // multiple_of
    while law(high * multiple_of) <= capacity_bytes:
        low, high = high, 2 * high
        if high > longest:
            return longest
    while high - low > 1:
        middle = (low + high) // 2
        if law(middle * multiple_of) <= capacity_bytes:
            low = middle
        else:
            high = middle
    return low
