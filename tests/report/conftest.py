"""Runs to report on: a real one, recorded once, and one made by hand, the same for ever."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from report_runs import MIB, make_advice, make_layers, make_peak, record

from attnprof.cli.program import load_own_script
from attnprof.report.notes import Note
from attnprof.report.summary import LayerGroup, Summary, find_holders
from attnprof.report.verdict import measure_quadratic, write_verdict
from attnprof.run import Run
from attnprof.vocabulary import Status


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite-golden", action="store_true", help="write the golden files anew")


@pytest.fixture
def overwrite_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written; False where pytest was not started in this folder."""
    return bool(request.config.getoption("--overwrite-golden", default=False))


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two layers of materialised attention, trained for two steps."""
    import torch

    attention = load_own_script("check_torch").Attention
    model = torch.nn.Sequential(attention(32), attention(32))
    return record(tmp_path_factory.mktemp("runs") / "real", model)


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose layer names try to be markup, script and terminal codes."""
    import torch

    attention = load_own_script("check_torch").Attention
    model = torch.nn.Sequential()
    model.add_module("</script><script>alert(1)</script>", attention(32))
    model.add_module("[bold]\x1b[31m&amp;\n", attention(32))
    return record(tmp_path_factory.mktemp("runs") / "hostile", model, steps=1)


@pytest.fixture
def summary() -> Summary:
    """A summary made by hand: four layers, nine steps, a run that failed."""
    peak = make_peak(
        [("", "inputs", 1), ("embed", "parameters", 30), ("embed", "optimizer_state", 60)]
        + [(f"h.{n}.attn", "softmax", 64) for n in range(4)]
        + [("h.3.attn", "attention_scores", 64)]
        + [(f"h.{n}.mlp.{part}", "activations", 16) for n in range(4) for part in (0, 2)]
    )
    layers = make_layers(["materialised"] * 3 + ["banded"])
    steps = pl.DataFrame(
        {
            "step": list(range(9)),
            "begin_ns": [n * 10**9 for n in range(9)],
            "end_ns": [(n + 1) * 10**9 for n in range(9)],
            "wall_seconds": [1.0 + n / 100 for n in range(9)],
            "seq_len": [1024] * 9,
            "batch": [2] * 9,
            "ops": [1234] * 9,
            "peak_bytes": [(500 - n) * MIB for n in range(9)],
            "peak_phase": ["backward"] * 9,
            "reserved_bytes": [600 * MIB] * 9,
            "is_detailed": [True] * 9,
        }
    )
    groups = [
        LayerGroup("h.[0-2].attn", 3, layers.drop("layer").row(0, named=True)),
        LayerGroup("h.3.attn", 1, layers.drop("layer").row(3, named=True)),
    ]
    info = {
        "created": "2026-01-02T03:04:05+00:00",
        "environment": {"torch": "2.13.0", "python": "3.11.7", "gpus": ["NVIDIA H200"]},
    }
    run: Any = SimpleNamespace(
        path=Path("runs/gpt2"),
        status=Status.FAILED,
        info=info,
        is_imported=False,
        has_lost_commits=False,
    )
    return Summary(
        run=run,
        peak=peak,
        step=None,
        categories=peak.by_category(),
        quadratic=measure_quadratic(peak, layers),
        holders=find_holders(peak),
        layers=groups,
        steps=steps,
        advice=[
            make_advice(
                "Gradient checkpointing", 300, "torch.utils.checkpoint.checkpoint(block, x)"
            ),
            make_advice("Optimizer states in 8 bits", 45, "an 8-bit <AdamW>", exact=False),
            make_advice("One mask for all layers", 20, "make the mask once"),
            make_advice("The fourth", 10, "is left to attnprof what-if"),
        ],
        notes=[
            Note("status", "failed; the numbers cover what ran until then", is_warning=True),
            Note("unattributed", "0 B, 0 % of the peak"),
        ],
        verdict=write_verdict(peak, layers),
    )
