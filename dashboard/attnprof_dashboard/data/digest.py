"""A run's derived files, mapped: everything a page asks of one run."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from attnprof_dashboard.data.derive import FACTS_FILE, FORMAT
from attnprof_dashboard.data.timeline_index import TimelineIndex, map_column


class Digest:
    """What `attnprof_dashboard.data.derive` wrote about one run."""

    def __init__(self, folder: Path) -> None:
        """Open a directory; its tables are mapped when first asked for.

        Raises:
            ValueError: It is of another format.
        """
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text("utf-8"))
        if self.facts.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {self.facts.get('format')!r}, not {FORMAT}")
        self._devices = [
            DeviceDigest(folder / f"device-{number}", facts)
            for number, facts in enumerate(self.facts["devices"])
        ]

    @property
    def device_names(self) -> list[str]:
        """The devices, the one a reader wants to see first first."""
        return [device.name for device in self._devices]

    def device(self, name: str = "") -> "DeviceDigest":
        """Return a device's part; of an unknown one, the first's."""
        return next((d for d in self._devices if d.name == name), self._devices[0])

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says."""
        found: dict[str, Any] = self.facts["info"]
        return found

    @cached_property
    def kv_cache(self) -> pl.DataFrame:
        """`Run.kv_cache`."""
        return _read_frame(self.folder / "kv_cache.arrow")

    @property
    def kv_blocks(self) -> pl.DataFrame:
        """`Run.kv_blocks`."""
        return _read_frame(self.folder / "kv_blocks.arrow")

    @cached_property
    def samples(self) -> pl.DataFrame:
        """What host and GPUs said of the memory of process and machine, over time."""
        return _read_frame(self.folder / "samples.arrow")


class DeviceDigest:
    """One device of a run."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Open a device's directory."""
        self._folder = folder
        self.facts = facts
        self.name: str = facts["name"]
        self.summary: dict[str, Any] = facts["summary"]

    @cached_property
    def index(self) -> TimelineIndex:
        """The timeline."""
        return TimelineIndex(self._folder / "index", self.facts["categories"])

    @cached_property
    def steps(self) -> pl.DataFrame:
        """`Run.steps`, of this device."""
        return _read_frame(self._folder / "steps.arrow")

    @cached_property
    def spans(self) -> pl.DataFrame:
        """Stretches of one phase: columns phase, begin_ns, end_ns."""
        return _read_frame(self._folder / "spans.arrow")

    @cached_property
    def phases(self) -> list[str]:
        """The phases that occur."""
        found: list[str] = self.spans["phase"].unique().to_list()
        return found

    def spans_between(self, begin_ns: int, end_ns: int, most: int) -> list[tuple[str, int, int]]:
        """Return the stretches of one phase between two times; none if there are more than most."""
        first = int(self.spans["end_ns"].search_sorted(begin_ns, "right"))
        last = int(self.spans["begin_ns"].search_sorted(end_ns, "left"))
        return self.spans[first:last].rows() if 0 < last - first <= most else []

    @cached_property
    def peaks(self) -> pl.DataFrame:
        """The most bytes per phase, category and layer; see `find_phase_peaks`."""
        return _read_frame(self._folder / "peaks.arrow")

    @property
    def peak_event(self) -> int:
        """The event of most live bytes; -1 if there are no events."""
        return self.index.peak()

    @property
    def step_peaks(self) -> list[int]:
        """The events of most live bytes of the steps, in order of time."""
        return sorted(set(self.peak_of_step.values()))

    @cached_property
    def peak_of_step(self) -> dict[int, int]:
        """Per number of a step the event of its most live bytes."""
        if self.steps.is_empty():
            return {}
        begins = np.searchsorted(self.index.time_ns, self.steps["begin_ns"].to_numpy(), "left")
        begins[:1] = 0
        ends = np.append(begins[1:], len(self.index))
        found = [self.index.peak(b, e) for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]
        numbers = self.steps["step"].to_list()
        return {n: event for n, event in zip(numbers, found, strict=True) if event >= 0}

    @cached_property
    def _blocks(self) -> pa.Table:
        return _map_table(self._folder / "blocks.arrow")

    @cached_property
    def _start(self) -> np.ndarray:
        return map_column(self._folder / "start.npy")

    @cached_property
    def _end(self) -> np.ndarray:
        return map_column(self._folder / "end.npy")

    def live_at(self, event: int) -> pl.DataFrame:
        """Return the blocks live after an event, largest first, as `Run.allocations` has them."""
        if event < 0 or not len(self.index):
            return self._take(np.zeros(0, np.int64))
        position = int(self.index.position[min(event, len(self.index) - 1)])
        begun = int(np.searchsorted(self._start, np.int64(position), "right"))
        return self._take(np.flatnonzero(self._end[:begun] > position))

    def allocated_between(self, first: int, second: int) -> pl.DataFrame:
        """Return the blocks allocated after one event that are live after another."""
        first, second = sorted((first, second))
        live = self.live_at(second)
        if first < 0:
            return live
        position = int(self.index.position[min(first, len(self.index) - 1)])
        return live.filter(pl.col("start") > position)

    def blocks_of(self, layer: str) -> pl.DataFrame:
        """Return the blocks of a layer and of the modules inside it."""
        names = self._blocks["layer"].combine_chunks()
        found = [
            number
            for number, name in enumerate(names.dictionary.to_pylist())
            if name == layer or (name or "").startswith(f"{layer}.")
        ]
        codes = names.indices.cast(pa.int64()).fill_null(-1).to_numpy()
        return self._take(np.flatnonzero(np.isin(codes, found)))

    def block(self, allocation_id: int) -> dict[str, Any] | None:
        """Return one block, or None if there is no such."""
        ids = self._blocks["allocation_id"].to_numpy()
        at = np.flatnonzero(ids == allocation_id)
        return self._take(at[:1]).row(0, named=True) if len(at) else None

    def _take(self, rows: np.ndarray) -> pl.DataFrame:
        frame = pl.from_arrow(self._blocks.take(pa.array(rows)))
        assert isinstance(frame, pl.DataFrame)
        return frame.with_columns(
            pl.col("device", "phase", "layer", "op", "category", "role", "dtype").cast(pl.String)
        ).sort("size_bytes", "allocation_id", descending=[True, False])


def _map_table(file: Path) -> pa.Table:
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def _read_frame(file: Path) -> pl.DataFrame:
    frame = pl.from_arrow(_map_table(file))
    assert isinstance(frame, pl.DataFrame)
    return frame
