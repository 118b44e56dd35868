"""`Growth`: how memory grows with the sequence length, and where it runs out.

A growth comes from `attnprof.sweep`, from a directory that one wrote (`Growth.load`), from any
runs whose lengths differ (`Growth.from_runs`), or from one run whose steps do
(`Growth.from_run`): then nothing needs to be run again. None of it needs torch.
"""

from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import polars as pl

from attnprof.analysis.extrapolate import (
    Extrapolation,
    PredictedPeak,
    extrapolate,
    find_programs,
    keep_blocks,
)
from attnprof.analysis.fits import TOTAL, Fit, fit_points, require_law
from attnprof.analysis.growth import POINT_SCHEMA, find_phase_peaks, find_step_peaks
from attnprof.analysis.laws import fit_law
from attnprof.analysis.positions import find_position_limit, limit_probe
from attnprof.analysis.wall import (
    Probe,
    Wall,
    count_needed_bytes,
    find_wall,
    is_reserved,
    observe_wall,
)
from attnprof.analysis.wall import read_capacity as read_capacity  # what `find_wall` takes
from attnprof.errors import DryRunError, require_known
from attnprof.run import Run
from attnprof.store.lengths import DRY_RUN, MEASURED, STEPS, Length, read_growth
from attnprof.units import require_count
from attnprof.vocabulary import Category, Status

SOURCES = (MEASURED, DRY_RUN, STEPS)
"""Where points come from; of several sources known at equally many lengths, the first counts."""

_require = partial(require_known, where="the growth", most=20)
_DONE = Status.COMPLETED.value
_WITH_POINTS = (_DONE, Status.OUT_OF_MEMORY.value)
_MOST_DRY_BLOCKS = 3_000_000
"""A program that loops over tokens makes ever more allocations: a dry run then takes minutes."""


class Growth:
    """How memory grows with the sequence length n: points, laws, predictions and the wall.

    Runs are read when first asked for, one by one: kept of each are its points and its blocks.
    """

    def __init__(
        self,
        lengths: Iterable[Length],
        *,
        points: pl.DataFrame | None = None,
        probe: Probe | None = None,
        path: Path | None = None,
        keep_alive: object = None,
    ) -> None:
        """Wrap runs on disk; use `attnprof.sweep`, `load`, `from_runs` or `from_run` to get one.

        Args:
            lengths: The lengths and the directories of their runs.
            points: The points, where they come from the steps of one run.
            probe: Runs other lengths dry, for the wall.
            path: The directory that holds them all.
            keep_alive: What must not be collected as long as the runs are in use; the run of steps.
        """
        self._lengths = tuple(sorted(lengths, key=lambda x: (x.source, x.seq_len)))
        self._given_points = points
        self._probe = probe
        self._tables: dict[int, Any] = {}  # of dry runs: see `find_position_limit`
        self._path = path
        self._keep_alive = keep_alive

    @classmethod
    def load(cls, path: str | Path) -> "Growth":
        """Open what `attnprof.sweep` wrote into a directory.

        Raises:
            RunFormatError: There is no sweep, or its list is damaged or of another version.
        """
        path = Path(path)
        return cls(read_growth(path).lengths, path=path)

    @classmethod
    def from_runs(cls, runs: Iterable[Run]) -> "Growth":
        """Compare runs of the same program at different lengths, however they were recorded.

        Raises:
            TypeError: Something in ``runs`` is not a run.
            ValueError: There are none, a run has no single length, or two have the same.
        """
        listed = list(runs)
        lengths: dict[tuple[str, int], Length] = {}
        for run in listed:
            if not isinstance(run, Run):
                raise TypeError(
                    f"from_runs() takes runs, got {type(run).__name__}; open them with "
                    "attnprof.load(path)"
                )
            length = _describe_run(run)
            other = lengths.setdefault((length.source, length.seq_len), length)
            if other is not length:
                raise ValueError(
                    f"two runs have length {length.seq_len}: {other.path} and {length.path}; "
                    "give one run per length"
                )
        if not lengths:
            raise ValueError("no runs were given; growth needs at least two, of different lengths")
        return cls(lengths.values(), keep_alive=listed)

    @classmethod
    def from_run(cls, run: Run) -> "Growth":
        """Take growth from the steps of one run, if their sequences differ in length.

        A training loop with batches of different lengths, or a decoding loop whose cache grows,
        needs no sweep. Only steps that can be compared count: of one batch size, and begun with
        all gradients and optimizer state there will be, which the first steps lack.

        Raises:
            TypeError: ``run`` is not a run.
            ValueError: No step has a known length.
        """
        if not isinstance(run, Run):
            raise TypeError(f"from_run() takes a run, got {type(run).__name__}")
        # Where the run did not complete, the last step may lack its peak.
        unfinished = run.steps.tail(int(run.status is not Status.COMPLETED))
        steps = run.steps.head(len(run.steps) - len(unfinished))
        peaks = find_step_peaks(run.attribution.allocations, steps)
        if peaks.is_empty():
            raise ValueError(
                "the run has no step whose sequence length is known, so nothing grows in it; "
                "trace a loop over batches, or use attnprof.sweep()"
            )
        done = {n: Length(n, STEPS, _DONE, path=run.path) for n in peaks["seq_len"].unique()}
        ended = {n: Length(n, STEPS, run.status.value) for n in unfinished["seq_len"].drop_nulls()}
        points = peaks.with_columns(source=pl.lit(STEPS), status=pl.lit(_DONE))
        points = points.select(list(POINT_SCHEMA))
        return cls((ended | done).values(), points=points, keep_alive=run)

    def __repr__(self) -> str:
        known = ", ".join(f"{x.seq_len} {x.source} {x.status}" for x in self._lengths[:8])
        more = ", …" if len(self._lengths) > 8 else ""
        return f"Growth({known}{more})"

    @property
    def lengths(self) -> tuple[Length, ...]:
        """Every length and how running it went, by source and rising lengths."""
        return self._lengths

    @property
    def path(self) -> Path | None:
        """The directory of the sweep; None if the points come from runs elsewhere."""
        return self._path

    @cached_property
    def points(self) -> pl.DataFrame:
        """The points: how many bytes were live at most, per length, phase, category and layer.

        Columns: seq_len, source, status, phase, category (``"total"`` is all live bytes), layer
        (``""`` is all layers), peak_bytes. What does not occur has no row. Of a run that ran out
        of memory they say how far it had come.
        """
        if self._given_points is not None:
            return self._given_points
        return pl.concat(self._read_runs[0])

    @cached_property
    def _read_runs(self) -> tuple[list[pl.DataFrame], dict[str, dict[int, pl.DataFrame]]]:
        """The points of every run, and per source and completed length its blocks."""
        points = [pl.DataFrame(schema=POINT_SCHEMA)]
        blocks: dict[str, dict[int, pl.DataFrame]] = {}
        for length in self._lengths:
            if length.path is None or length.source == STEPS or length.status not in _WITH_POINTS:
                continue
            run = Run.load(length.path)
            allocations = run.attribution.allocations
            peaks = find_phase_peaks(allocations).with_columns(
                pl.lit(length.seq_len, pl.Int64).alias("seq_len"),
                source=pl.lit(length.source),
                status=pl.lit(length.status),
            )
            points.append(peaks.select(list(POINT_SCHEMA)))
            if length.status == _DONE:
                own = blocks.setdefault(length.source, {})
                own[length.seq_len] = keep_blocks(allocations)
                if tables := run.info.get("dry_run", {}).get("tables"):
                    self._tables[length.seq_len] = tables
        return points, blocks

    @cached_property
    def source(self) -> str:
        """The source that is used unless told: the one with most completed lengths.

        Raises:
            ValueError: No length was completed.
        """
        done = [x.source for x in self._lengths if x.status == _DONE]
        if not done:
            ended = ", ".join(f"{x.seq_len} ({x.reason or x.status})" for x in self._lengths[:4])
            raise ValueError(f"no length was completed, so nothing is known: {ended}")
        return max(SOURCES, key=done.count)  # of equals the first

    def run(self, seq_len: int, *, source: str | None = None) -> Run:
        """Return the run of a length.

        Raises:
            ValueError: There is no run of that length.
        """
        source = source or self.source
        runs = {x.seq_len: x.path for x in self._lengths if x.source == source and x.path}
        path = runs.get(seq_len)
        if path is None:
            known = ", ".join(map(str, runs)) or "none"
            raise ValueError(f"there is no {source} run of length {seq_len}; there are: {known}")
        own = self._keep_alive if source == STEPS else None
        return own if isinstance(own, Run) else Run.load(path, keep_alive=self)

    def fit(
        self, category: str = TOTAL, layer: str | None = None, *, source: str | None = None
    ) -> Fit:
        """Fit the law by which bytes grow, per phase: c0 + c1·n + c2·n², none negative.

        Args:
            category: A `Category`, or ``"total"`` for all live bytes.
            layer: A module path; all layers without it.
            source: ``"measured"``, ``"dry_run"`` or ``"steps"``; without it `source`.

        Raises:
            ValueError: There is no such category, layer or source, or fewer than two lengths of
                it were completed.
        """
        source = source or self.source
        words = [TOTAL, *(c.value for c in Category)]
        _require(category in words, "category", category, words)
        self._completed(source)
        own = self.points.filter(pl.col("source") == source, pl.col("status") == _DONE)
        layers = own["layer"].unique().sort().to_list()
        _require(layer is None or layer in layers, "layer", layer, [x for x in layers if x])
        occurring = own.filter(category=TOTAL, layer="").sort("seq_len")
        if occurring.is_empty():
            raise ValueError(
                f"the {source} runs hold no memory at all, so nothing grows in them; see that the "
                "function that make_step returns runs the model"
            )
        seq_lens = occurring.group_by("phase", maintain_order=True).agg("seq_len")
        return fit_points(
            own.filter(category=category, layer=layer or ""),
            dict(seq_lens.iter_rows()),
            category=category,
            layer=layer,
            source=source,
            programs=find_programs(self._read_runs[1].get(source, {})),
        )

    def _completed(self, source: str) -> list[int]:
        done = [x.seq_len for x in self._lengths if x.source == source and x.status == _DONE]
        known = sorted({x.source for x in self._lengths})
        _require(bool(done), "completed length whose source is", source, known)
        return sorted(done)

    def predict(self, seq_len: int) -> int:
        """Return the peak at a length, in bytes: the maximum over phases; see `predict_peak`."""
        return self.predict_peak(seq_len).peak_bytes

    def predict_peak(self, seq_len: int) -> PredictedPeak:
        """Predict the peak at a length from the lengths that are known.

        If the same ops ran at the two longest lengths or more, every block of memory is
        extrapolated and all instants are looked at again, since the peak may move. Otherwise
        each phase's peak follows its own law, and the highest counts.

        Args:
            seq_len: The sequence length n, in tokens.

        Raises:
            TypeError: ``seq_len`` is not a whole number.
            ValueError: It is under 1, or fewer than two lengths were completed.
        """
        seq_len = require_count("seq_len", seq_len)
        if self.extrapolation is not None:
            return self.extrapolation.predict(seq_len)
        by_phase = self._total_fit.predict_phases(seq_len)
        phase = max(by_phase, key=by_phase.__getitem__)
        return PredictedPeak(seq_len, by_phase[phase], by_phase, phase, "law", by_category={})

    @cached_property
    def _total_fit(self) -> Fit:
        return self.fit()

    @cached_property
    def extrapolation(self) -> Extrapolation | None:
        """The program of the longest lengths, block by block; None where it is not the same."""
        return extrapolate(self._read_runs[1].get(self.source, {}))

    def max_seq_len(self, capacity: int | str | None = None, *, multiple_of: int = 1) -> int:
        """Return the wall: the longest length whose step fits; 0 if none does.

        See `find_wall`, which also says how that is known.
        """
        return self.find_wall(capacity, multiple_of=multiple_of).seq_len

    def find_wall(self, capacity: int | str | None = None, *, multiple_of: int = 1) -> Wall:
        """Find the longest length whose step fits, and the next one, which does not.

        The laws say where to look. If the growth comes from a sweep that can run dry, dry runs
        around there decide; otherwise the prediction does.

        Args:
            capacity: Bytes, text such as ``"80 GB"``, or a device such as ``"H200"``, of whose
                memory the driver's share is not counted. Without it, the machine that the sweep
                ran on, if it ran out of memory.
            multiple_of: Only multiples of this are considered, such as the size of a window.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: The capacity cannot be read, memory does not grow, or too few lengths are
                known.
        """
        multiple_of = require_count("multiple_of", multiple_of)
        if capacity is None:
            return self._find_observed_wall()
        fit, dry = self._fit_probe, self._probe
        limit = find_position_limit(self._tables)
        return find_wall(
            read_capacity(capacity),
            self._estimate,
            fit=limit_probe(fit, limit),
            dry_run=dry and limit_probe(Probe(self._run_dry, dry.counts), limit),
            multiple_of=multiple_of,
            known=self._completed(self.source),
        )

    def _estimate(self, seq_len: int) -> int:
        if (program := self.extrapolation) is not None:
            return program.estimate(seq_len)
        fit = self._total_fit
        return (fit if self._probe and fit.law != "constant" else require_law(fit)).predict(seq_len)

    @property
    def _fit_probe(self) -> Probe:
        if (program := self.extrapolation) is not None and is_reserved(
            program.blocks_at(program.seq_lens[-1])
        ):
            return Probe(lambda n, c: count_needed_bytes(program.blocks_at(n), c), "reserved")
        return Probe(lambda n, _: self.predict(n), "live")

    def _run_dry(self, seq_len: int, capacity_bytes: int) -> int:
        assert self._probe is not None
        counts = {n: len(frame) for n, frame in self._read_runs[1].get(self.source, {}).items()}
        if len(counts) > 1:
            law = fit_law(sorted(counts), [counts[n] for n in sorted(counts)])
            if law.at(seq_len) > _MOST_DRY_BLOCKS:
                raise DryRunError(
                    f"it runs more ops the longer the sequence: about {law.at(seq_len):.1e} "
                    f"allocations at n = {seq_len}"
                )
        return self._probe.measure(seq_len, capacity_bytes)

    def _find_observed_wall(self) -> Wall:
        """Return the wall that running into it showed."""
        own = [x for x in self._lengths if x.source != DRY_RUN]
        over = [x.seq_len for x in own if x.status == Status.OUT_OF_MEMORY]
        if not over:
            raise ValueError(
                "no length ran out of memory, so how much there is is not known; give a capacity, "
                "such as '80 GB' or 'H200'"
            )
        done = [x for x in own if x.status == _DONE and x.seq_len < min(over)]
        fits = max((x.seq_len for x in done), default=0)
        own_points = self.points.filter(pl.col("source") != DRY_RUN, category=TOTAL, layer="")
        peak = own_points.filter(seq_len=fits)["peak_bytes"].max()
        return observe_wall(fits, peak if isinstance(peak, int) else 0, min(over))


def _describe_run(run: Run) -> Length:
    """Return the length that a run was made at: the one it was recorded with, or its steps'."""
    workload = run.info.get("workload")
    if isinstance(workload, dict) and "seq_len" in workload:
        return Length(workload["seq_len"], workload["source"], run.status.value, path=run.path)
    lengths = run.steps["seq_len"].drop_nulls().unique().to_list()
    if len(lengths) != 1:
        known = ", ".join(map(str, sorted(lengths)[:8])) or "none"
        raise ValueError(
            f"{run!r} has no single sequence length; the lengths of its steps: {known}. Record it "
            "with attnprof.sweep(), or if its steps differ, use Growth.from_run(run)"
        )
    return Length(lengths[0], MEASURED, run.status.value, path=run.path)
