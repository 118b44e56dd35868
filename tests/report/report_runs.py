"""Runs, peaks and layers for the tests of reports."""

from pathlib import Path
from typing import Any

import polars as pl

import attnprof
from attnprof.analysis.peak import Peak
from attnprof.analysis.what_if.advice import Advice
from attnprof.run import Run

MIB = 2**20


def record(directory: Path, model: Any, *, steps: int = 2) -> Run:
    """Train ``model`` for some steps of batch 2, n 64 and width 32 under a trace."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters())
    with attnprof.trace(directory, samples_per_second=0) as tracer:
        for _ in range(steps):
            model(torch.randn(2, 64, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracer.run


def make_peak(rows: list[tuple[str, str, int]]) -> Peak:
    """Return a peak of blocks given as layer, category and MiB."""
    allocations = pl.DataFrame(
        {
            "layer": [layer for layer, _, _ in rows],
            "category": [category for _, category, _ in rows],
            "size_bytes": [mib * MIB for _, _, mib in rows],
            "exact": [category != "optimizer_state" for _, category, _ in rows],
        },
        schema={"layer": pl.String, "category": pl.String, "size_bytes": pl.Int64, "exact": bool},
    )
    return Peak(
        device="cuda:0",
        total_bytes=sum(mib for _, _, mib in rows) * MIB,
        step=1,
        phase="backward",
        layer="h.3.attn",
        op="aten::_softmax_backward_data",
        time_ns=1_500_000_000,
        allocations=allocations,
    )


def make_advice(title: str, saves_mib: int, how: str, *, exact: bool = True) -> Advice:
    """Return advice that lowers a peak of 539 MiB by so many."""
    return Advice(
        kind=title.lower().replace(" ", "_"),
        title=title,
        evidence="something holds something",
        how=how,
        layers=("h.0.attn",),
        saves_bytes=saves_mib * MIB,
        new_peak_bytes=(539 - saves_mib) * MIB,
        new_peak_step=1,
        new_peak_phase="backward",
        new_peak_layer="h.0.mlp",
        assumes=(),
        exact=exact,
        scenarios=("x",),
    )


def make_layers(kinds: list[str]) -> pl.DataFrame:
    """Return what `Run.layers` returns, for layers h.0.attn, h.1.attn, … of some kinds."""
    row = {
        "calls": 2, "batch": 2, "heads": 8, "kv_heads": 2, "q_len": 1024, "k_len": 1024,
        "head_dim": 64, "dtype": "float32", "softmax_bytes": 64 * MIB,
        "saved_softmax_bytes": 64 * MIB, "scores_peak_bytes": 128 * MIB, "mask_bytes": 0,
        "kv_cache_bytes": 0, "predicted_saved_bytes": 64 * MIB,
    }  # fmt: skip
    return pl.DataFrame(
        [
            {"layer": f"h.{n}.attn", "kind": kind, **row, "backend_reason": f"it is {kind}"}
            for n, kind in enumerate(kinds)
        ]
    )
