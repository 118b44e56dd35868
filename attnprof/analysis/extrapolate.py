"""Replay a run at a length it was never run at: every block of memory follows a law of its own.

A peak is a maximum over instants, and a sum of maxima follows no simple law: as n grows the peak
moves, from the loss to an attention's backward, say. But if the same ops run at every length, each
single block is c0 + c1·n + c2·n² bytes exactly, and lives from the same op to the same op. So the
blocks are extrapolated one by one, and the peak is looked for again among all instants.

Known limitations:
    Two lengths cannot tell c0 + c1·n from a mixture with n²; the former is assumed. Three can.
    Blocks padded to whole windows follow no such law exactly; theirs is then approximate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from attnprof.analysis.laws import Law
from attnprof.analysis.peak import Replay, choose_device, replay
from attnprof.units import require_countable

Floats = np.ndarray
Ints = np.ndarray

ALLOCATOR_ROUNDING = 512
"""CUDA's caching allocator hands out multiples of so many bytes; the CPU's, what was asked for.

https://github.com/pytorch/pytorch/blob/v2.13.0/c10/cuda/CUDACachingAllocator.h (kMinBlockSize)
"""
_COEFFICIENT_STEP = 1 / 8
"""Coefficients of exact laws are multiples of this: bytes per element, halves of triangles."""
_ROUGH_SHARE = 0.02
"""A block that follows no exact law is given the simplest one that is so close."""
_MOST_ERROR = 1e-3
"""A replay that misses what is known by this share of the peak is not believed."""
_LEAST_LENGTHS = 2
_SIMPLEST_FIRST = ((0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2))
"""Powers of n in a block's law. Two lengths tell single ones apart; a mixture they call a line."""

_PROGRAM = ("op", "layer", "phase", "step")
"""What has to be equal, block by block, for two runs to be the same program."""


@dataclass(frozen=True, slots=True)
class PredictedPeak:
    """The peak at a length, as far as other lengths tell."""

    seq_len: int
    peak_bytes: int
    by_phase: dict[str, int]
    """The most live bytes in each phase."""
    phase: str
    """The phase of the peak."""
    method: str
    """``"replay"`` (every block extrapolated and replayed) or ``"law"`` (of the phases' peaks)."""
    by_category: dict[str, int]
    """Live bytes per category at the peak, largest first; empty by law, which cannot tell."""
    layer: str = ""
    """The module that was running; empty by law."""
    op: str | None = None
    """The op whose result made the peak; None by law."""


def keep_blocks(allocations: pl.DataFrame, *, device: str | None = None) -> pl.DataFrame:
    """Return what extrapolation needs of a run's allocations, in the order of allocation.

    Args:
        allocations: Attributed blocks with ``start`` and ``end`` (order of events).
        device: The device; chosen as for a peak without it.
    """
    device = choose_device(allocations, device)
    frame = allocations.filter(pl.col("device").cast(pl.String) == device)
    return frame.sort("start", "allocation_id").select(
        *("allocation_id", "device", *_PROGRAM, "category"),
        *("size_bytes", "requested_bytes", "start", "end"),
    )


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """A program of ops whose blocks' sizes are known at every length."""

    seq_lens: tuple[int, ...]
    """The lengths at which this program was seen, ascending."""
    _blocks: pl.DataFrame
    """Those of the longest."""
    _laws: Floats
    """(blocks, 3): c0, c1, c2 of each."""
    _live_laws: Floats
    """(instants, 3): c0, c1, c2 of all live bytes once each block is there."""
    _rounding: int

    def estimate(self, seq_len: int) -> int:
        """Return the peak at a length, but for rounding, without replaying it: much faster."""
        return round(float((self._live_laws @ _powers_of(seq_len)).max()))

    def law_at(self, seq_len: int) -> Law:
        """Return the law of what is live at the peak of a length, but for rounding."""
        at = int((self._live_laws @ _powers_of(seq_len)).argmax())
        c0, c1, c2 = self._live_laws[at].tolist()
        return Law(c0, c1, c2, self.seq_lens[0], self.seq_lens[-1], max_relative_error=0.0)

    def blocks_at(self, seq_len: int) -> pl.DataFrame:
        """Return the blocks as they would be at a length, in the order of allocation.

        Raises:
            ValueError: Together they would have 2^63 bytes or more, which cannot be counted.
        """
        exact = self._laws @ _powers_of(seq_len)
        require_countable(exact.clip(0).sum(), f"at n = {seq_len} the blocks", "a shorter length")
        requested = np.maximum(np.rint(exact), 0).astype(np.int64)
        size = -(-requested // self._rounding) * self._rounding
        return self._blocks.with_columns(size_bytes=size, requested_bytes=requested)

    def predict(self, seq_len: int) -> PredictedPeak:
        """Return the peak at a length."""
        replayed = _replay(self.blocks_at(seq_len))
        at = int(np.argmax(replayed.live_bytes))
        maker = replayed.frame.row(at, named=True)
        by_category = (
            replayed.held_at(at)
            .group_by(pl.col("category").cast(pl.String))
            .agg(pl.col("size_bytes").sum())
            .filter(pl.col("size_bytes") > 0)
            .sort("size_bytes", "category", descending=[True, False])
        )
        return PredictedPeak(
            seq_len=seq_len,
            peak_bytes=int(replayed.live_bytes[at]),
            by_phase=_find_highest(replayed),
            phase=str(maker["phase"]),
            method="replay",
            by_category=dict(by_category.iter_rows()),
            layer=str(maker["layer"]),
            op=maker["op"],
        )

    def list_highest(
        self, seq_len: int, factors: Sequence[Mapping[str, float]]
    ) -> list[dict[str, int]]:
        """Return live bytes per category at the instants that would be peaks of other programs.

        Args:
            seq_len: The length.
            factors: Per program, how many times as large each category is in it; 1 where it is
                not named. Where categories grow by different factors the peak moves.
        """
        blocks = self.blocks_at(seq_len)
        category = blocks["category"].cast(pl.String)
        names = category.unique().sort().to_list()
        sizes = np.zeros((len(blocks), len(names)))
        which = category.replace_strict(names, range(len(names)), return_dtype=pl.Int64)
        sizes[np.arange(len(blocks)), which.to_numpy()] = blocks["size_bytes"].to_numpy()
        live = _sum_live(blocks, sizes)
        weights = np.array([[each.get(name, 1.0) for name in names] for each in factors])
        instants = np.unique((live @ weights.T).argmax(axis=0)).tolist()
        return [
            {name: round(size) for name, size in zip(names, live[at], strict=True) if size >= 1}
            for at in instants
        ]


def extrapolate(runs: Mapping[int, pl.DataFrame]) -> Extrapolation | None:
    """Return the program that the longest lengths have in common, with a law for every block.

    Args:
        runs: Per sequence length, its blocks as `keep_blocks` returns them.

    Returns:
        None if the two longest lengths do not run the same ops, or if replaying them does not
        give the peaks that are known.
    """
    programs = find_programs(runs)
    common = [n for n, program in programs.items() if program == max(programs.values(), default=0)]
    if len(common) < _LEAST_LENGTHS or runs[common[-1]].is_empty():
        return None
    requested = np.stack([runs[n]["requested_bytes"].to_numpy() for n in common])
    laws = _fit_blocks(np.array(common, np.float64), requested)
    template = runs[common[-1]]
    is_rounded = bool((template["size_bytes"] != template["requested_bytes"]).any())
    result = Extrapolation(
        seq_lens=tuple(common),
        _blocks=template,
        _laws=laws,
        _live_laws=_sum_live(template, laws),
        _rounding=ALLOCATOR_ROUNDING if is_rounded else 1,
    )
    return result if all(_explains(result, n, runs[n]) for n in common) else None


def find_programs(runs: Mapping[int, pl.DataFrame]) -> dict[int, int]:
    """Number the programs of ops that runs went through, by rising lengths.

    Neighbouring lengths have the same number if the same ops ran, in the same layers and phases.

    Args:
        runs: Per sequence length, its blocks as `keep_blocks` returns them.
    """
    programs: dict[int, int] = {}
    number, before = -1, None
    for n in sorted(runs):
        if before is None or not _is_same_program(before, runs[n]):
            number += 1
        programs[n], before = number, runs[n]
    return programs


def _is_same_program(some: pl.DataFrame, other: pl.DataFrame) -> bool:
    if len(some) != len(other):
        return False
    return all(some[c].cast(pl.String).equals(other[c].cast(pl.String)) for c in _PROGRAM)


def _explains(program: Extrapolation, seq_len: int, blocks: pl.DataFrame) -> bool:
    known = _find_highest(_replay(blocks))
    found = _find_highest(_replay(program.blocks_at(seq_len)))
    most = _MOST_ERROR * max(known.values(), default=0)
    return all(abs(found[phase] - size) <= most for phase, size in known.items())


def _sum_live(blocks: pl.DataFrame, values: Floats) -> Floats:
    """Return the sums of the values of the blocks that are live once each block is there."""
    start, end = blocks["start"].to_numpy(), blocks["end"].to_numpy()
    by_end = np.argsort(end, kind="stable")
    freed = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values[by_end], axis=0)])
    gone = freed[np.searchsorted(end[by_end], start, "right")]
    return np.asarray(np.cumsum(values, axis=0) - gone)


def _powers_of(seq_len: int) -> Floats:
    return np.array([1.0, seq_len, float(seq_len) ** 2])


def _replay(blocks: pl.DataFrame) -> Replay:
    return replay(blocks, str(blocks["device"][0]))


def _find_highest(replayed: Replay) -> dict[str, int]:
    by_phase = replayed.frame.select(pl.col("phase").cast(pl.String), live=replayed.live_bytes)
    return dict(by_phase.group_by("phase").agg(pl.col("live").max()).sort("phase").iter_rows())


def _fit_blocks(n: Floats, sizes: Ints) -> Floats:
    """Return (blocks, 3) coefficients for (lengths, blocks) bytes.

    A block's law is exact with the fewest terms that give all its sizes. Where none does (padding
    to a whole number of windows, sizes the allocator rounded) it is the simplest that is close.
    """
    found = np.zeros((sizes.shape[1], 3))
    is_open = np.ones(sizes.shape[1], np.bool_)
    powers = np.stack([np.ones_like(n), n, n**2])
    fitted = [_fit_terms(n, sizes, terms) for terms in _SIMPLEST_FIRST if len(terms) <= len(n)]
    exact = [np.rint(laws / _COEFFICIENT_STEP) * _COEFFICIENT_STEP for laws in fitted]
    close = np.maximum(_ROUGH_SHARE * sizes, ALLOCATOR_ROUNDING)
    for laws, allowed in [*((e, 0.5) for e in exact), *((f, close) for f in fitted)]:
        fits = is_open & (np.abs((laws @ powers).T - sizes) <= allowed).all(axis=0)
        found[fits] = laws[fits]
        is_open &= ~fits
    found[is_open] = fitted[-1][is_open]
    return found


def _fit_terms(n: Floats, sizes: Ints, terms: tuple[int, ...]) -> Floats:
    """Return (blocks, 3) coefficients, zero but for some terms, by least squares."""
    powers = np.stack([(n / n[-1]) ** term for term in terms], axis=1)
    scaled = np.linalg.pinv(powers) @ sizes  # (terms, blocks)
    laws = np.zeros((sizes.shape[1], 3))
    laws[:, terms] = (scaled / (n[-1] ** np.array(terms))[:, None]).T
    return laws
