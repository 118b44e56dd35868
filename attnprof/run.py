"""`Run`: a recorded run and the questions it answers."""

import os
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from attnprof.analysis.allocator import AllocatorSettings, Simulation, simulate_allocator
from attnprof.analysis.block_tables import list_blocks
from attnprof.analysis.device_history import AllocatorAttribution
from attnprof.analysis.imported import attribute_snapshot
from attnprof.analysis.kv_cache import describe_kv_cache
from attnprof.analysis.layers import describe_layers
from attnprof.analysis.memory_state import (
    FailedRequest,
    MemoryState,
    find_failed_request,
    find_state_at_peak,
)
from attnprof.analysis.peak import Peak, find_peak
from attnprof.analysis.reconcile import Reconciliation, reconcile
from attnprof.analysis.steps import describe_steps
from attnprof.analysis.timeline import sample_timeline
from attnprof.analysis.traced import attribute_traced
from attnprof.analysis.wall import read_capacity
from attnprof.analysis.what_if.advice import Advice, WhatIf, ask, find_advice
from attnprof.analysis.what_if.scenario import Options
from attnprof.attribution import Attribution
from attnprof.store import StoredRun, open_run
from attnprof.store.ranges import check_ranges
from attnprof.vocabulary import Status

NO_OPS = (
    "a run made of a memory snapshot has no ops, so that layers, caches and what a change would "
    "save are not known; record the program with attnprof.trace() or 'attnprof run'"
)
"""Why some questions have no answer for an imported run."""


class Run:
    """One recorded run and its answers; needs no torch.

    Facts are read from its directory when first asked for. Nothing derived is kept on disk, so a
    run recorded by an older attnprof is judged by the rules of this one.
    """

    def __init__(self, stored: StoredRun, *, keep_alive: object = None) -> None:
        """Wrap an opened run directory; use `load` to open one."""
        self._stored = stored
        self._keep_alive = keep_alive  # a tracer whose temporary directory holds the run

    @classmethod
    def load(cls, path: str | Path, *, keep_alive: object = None) -> "Run":
        """Open the run in ``path``; see `attnprof.load`."""
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"load() takes the directory of a run, got {type(path).__name__}; give a path, "
                "such as 'runs/name'"
            )
        return cls(open_run(path), keep_alive=keep_alive)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, status={self.status.value!r})"

    @property
    def path(self) -> Path:
        """The directory that holds the run."""
        return self._stored.path

    @property
    def status(self) -> Status:
        """How the run ended. A run whose process was killed is ``interrupted``."""
        return self._stored.status

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says: environment, writer, times, error."""
        return self._stored.info

    @cached_property
    def attribution(self) -> Attribution:
        """The run's facts and what they mean; `allocations` and the rest are views of it."""
        check_ranges(self._stored)
        return (
            attribute_snapshot(self._stored) if self.is_imported else attribute_traced(self._stored)
        )

    @cached_property
    def allocations(self) -> pl.DataFrame:
        """A row per allocation.

        Columns: allocation_id, device, address, size_bytes (what the allocator took),
        requested_bytes (what the tensor needed), start_ns, end_ns (null while live), step, phase,
        layer, op, category, role, shape, dtype, saved (live when the step's forward had ended and
        gradients were on), exact (false where a label is inferred).
        """
        return self.attribution.allocations.drop("start", "end")

    @property
    def is_dry(self) -> bool:
        """Whether the program ran on fake tensors; see `attnprof.dry_run`."""
        return "dry_run" in self.info

    @property
    def is_imported(self) -> bool:
        """Whether the run was made of a memory snapshot: it has stacks, and no ops or layers."""
        return "snapshot" in self.info

    @property
    def has_lost_commits(self) -> bool:
        """Whether the newest commits are missing from the run's files (truncated, half copied)."""
        return self._stored.lost

    @property
    def has_compiled_code(self) -> bool:
        """Whether compiled modules ran, inside which ops and their storages are not all seen."""
        return bool(self.attribution.facts.is_compiled.any())

    @property
    def has_uncompiled_code(self) -> bool:
        """Whether compiled modules ran op by op, as before torch 2.10 under a trace."""
        return self.attribution.facts.has_uncompiled_scope

    @cached_property
    def steps(self) -> pl.DataFrame:
        """A row per step: length and batch of its data, peak and reserved bytes, seconds.

        ``is_detailed`` is false for steps of a long loop that were only counted: of these there is
        what the allocator counted.
        """
        return describe_steps(self.attribution, is_dry=self.is_dry)

    def peak(
        self, *, step: int | None = None, device: str | None = None, phase: str | None = None
    ) -> Peak:
        """Return the instant of most live bytes.

        Args:
            step: Only within this step.
            device: ``"cpu"``, ``"cuda:0"``, …; without it the GPU that held most, else the CPU.
            phase: Only at allocations made in this phase.

        Raises:
            ValueError: The run has no such step, device or phase, or the step was only counted.
        """
        if step in np.flatnonzero(self.attribution.timeline.counted >= 0).tolist():
            raise ValueError(
                f"step {step} was only counted, so that it has no blocks; run.steps has what the "
                'allocator counted, and attnprof.trace(detail="full") records every step'
            )
        return find_peak(self.attribution.allocations, step=step, device=device, phase=phase)

    def simulate_allocator(
        self,
        *,
        device: str | None = None,
        settings: AllocatorSettings | None = None,
        capacity_bytes: int | str | None = None,
    ) -> Simulation:
        """Return what CUDA's caching allocator does with the run's allocations.

        Args:
            device: The device; without it the GPU that held most, else the CPU.
            settings: The allocator's options; without, torch's defaults.
            capacity_bytes: What the device has for the allocator: bytes, text such as
                ``"80 GB"``, or a device such as ``"H200"``; without, no limit.

        Raises:
            TypeError: The capacity is neither a whole number nor text.
            ValueError: It cannot be read, or the run has no such device.
        """
        return simulate_allocator(
            self.attribution.allocations,
            device=device,
            settings=settings,
            capacity_bytes=None if capacity_bytes is None else read_capacity(capacity_bytes),
        )

    def layers(self) -> pl.DataFrame:
        """Return a row per attention layer.

        Columns: layer, kind, calls, batch, heads, kv_heads, q_len, k_len, head_dim, dtype,
        softmax_bytes, saved_softmax_bytes, scores_peak_bytes, mask_bytes, kv_cache_bytes,
        predicted_saved_bytes, backend_reason.
        """
        return describe_layers(self.attribution)

    def kv_cache(self) -> pl.DataFrame:
        """Return what each layer's KV cache holds: a row per layer and step of a decoding loop.

        A step is an outermost forward without gradients, and the bytes are those that live when
        it has ended; over the layers of one category, ``held_bytes`` sums to that category then.

        Columns: step, forward, phase, layer, category, kind, dtype, batch, kv_heads, head_dim,
        value_dim, tokens, held_bytes, reachable_bytes, used_bytes, bytes_per_token,
        transient_bytes, growing_bytes, expanded_bytes, and for paged caches block_tokens,
        allocated_blocks, used_blocks, shared_blocks, free_blocks and last_block_slack_bytes.
        `describe_kv_cache` in ``attnprof.analysis.kv_cache`` says what each means.
        """
        return describe_kv_cache(self.attribution)

    def kv_blocks(self) -> pl.DataFrame:
        """Return the blocks of paged caches, as the engine noted them: a row per forward and block.

        Columns: forward, pool, layers, block, tokens, sequences, block_tokens, free_blocks,
        pool_blocks. `list_blocks` in ``attnprof.analysis.block_tables`` says what each means. Empty
        unless `attnprof.note_blocks` or an adapter of ``attnprof.integrations`` noted block tables.
        """
        return list_blocks(self.attribution)

    def require_ops(self) -> None:
        """Refuse an imported run, where layers, caches and changes are asked for.

        Raises:
            ValueError: The run was made of a memory snapshot.
        """
        if self.is_imported:
            raise ValueError(NO_OPS)

    def what_if(
        self,
        *scenarios: str,
        kv_heads: int | None = None,
        latent_dim: int | None = None,
        batch: float | None = None,
        seq_len: int | None = None,
        device: str | None = None,
    ) -> WhatIf:
        """Return what the run would have needed with some changes, by replaying its allocations.

        Args:
            scenarios: Names such as ``"fused_attention"`` and ``"checkpointing"``; several are
                replayed together. A number below adds the scenario that needs it.
            kv_heads: Key/value heads per layer (``"gqa"``).
            latent_dim: Elements per token and layer in place of K and V (``"cache_latent"``).
            batch: Factor on the batch size (``"batch"``).
            seq_len: The sequence length n (``"seq_len"``).
            device: As for `peak`.

        Raises:
            ValueError: A scenario does not apply to the run, or is unknown; a number is out of
                range; the run has no such device; or it is imported.
            TypeError: A scenario is no name, or a number is none.
        """
        self.require_ops()
        options = Options(kv_heads=kv_heads, latent_dim=latent_dim, batch=batch, seq_len=seq_len)
        return ask(self.attribution, scenarios, options, device=device)

    def advice(self, *, device: str | None = None) -> list[Advice]:
        """Return what would lower the peak by at least 1 %, the largest saving first.

        Args:
            device: As for `peak`.

        Raises:
            ValueError: The run has no such device.
        """
        if self.is_imported:  # what would change needs ops and their operands
            return []
        return find_advice(self.attribution, device=device)

    def out_of_memory(self) -> FailedRequest | None:
        """Return the last request that the device had no room for, and who held the rest.

        Runs on CUDA can tell, traced or imported; None for others, and where no request failed.
        """
        attribution = self.attribution
        if not isinstance(attribution, AllocatorAttribution):
            return None
        return find_failed_request(attribution)

    def memory_state(self, peak: Peak) -> MemoryState | None:
        """Return what the allocator had reserved at a peak, and in how many pieces it was free.

        Runs on CUDA can tell, traced or imported; None for others.

        Args:
            peak: One of this run's.
        """
        attribution = self.attribution
        if not isinstance(attribution, AllocatorAttribution):
            return None
        return find_state_at_peak(attribution, peak)

    def reconciliation(self) -> list[Reconciliation]:
        """Return torch's own counters of CUDA's memory beside what this run adds up to.

        Empty where the run was not traced, or has no history of an allocator.
        """
        attribution = self.attribution
        if self.is_imported or not isinstance(attribution, AllocatorAttribution):
            return []
        return reconcile(attribution, self.info.get("allocator", {}))

    def timeline(self, max_points: int = 2000, *, device: str | None = None) -> pl.DataFrame:
        """Return live bytes by category over time, at most ``max_points`` rows, extremes kept.

        Columns: time_ns, total_bytes, and one per category that occurs; they sum to the total.

        Args:
            max_points: At least 4.
            device: As for `peak`.

        Raises:
            ValueError: ``max_points`` is less, or the run has no such device.
        """
        return sample_timeline(self.attribution.allocations, device=device, max_points=max_points)

    def show(self, *, step: int | None = None, device: str | None = None) -> Any:
        """Return the report for a notebook; ``attnprof_dashboard.jupyter`` gives a live one.

        Args:
            step: Show the peak of one step only.
            device: As for `peak`.

        Raises:
            ValueError: The run has no such step or device.
        """
        # Reports are made from runs: only here does one ask for the other.
        return import_module("attnprof.report.notebook").show(self, step=step, device=device)


def load(path: str | Path) -> Run:
    """Open a recorded run.

    Args:
        path: A directory written by `attnprof.trace` or ``attnprof run``.

    Raises:
        RunFormatError: There is no run, it has another schema version, or it is damaged.
        TypeError: ``path`` is not a path.
    """
    return Run.load(path)
