"""Every example runs as a script and prints what it promises."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import attnprof

EXAMPLES = Path(__file__).parents[2] / "examples"

RunExample = Callable[..., str]

pytestmark = pytest.mark.filterwarnings(
    # performer-pytorch compares versions with it when it is imported.
    "ignore:distutils Version classes are deprecated:DeprecationWarning"
)

SHARED = {"compare.py", "small_model.py"}
ROUTES = sorted(
    path.name for path in (EXAMPLES / "escape_routes").glob("*.py") if path.name not in SHARED
)


@pytest.mark.parametrize("file", ROUTES)
def test_route_prints_its_law(run_example: RunExample, file: str) -> None:
    printed = run_example(f"escape_routes/{file}", "64", "128")
    assert "make_step: " in printed
    assert "total grows as n^" in printed


def test_compare_draws_every_route_it_is_asked_for(run_example: RunExample, tmp_path: Path) -> None:
    routes = ["materialised", "SDPA", "sliding window, masked"]
    printed = run_example(
        "escape_routes/compare.py", "--seq-lens", "128", "256", "512", "--routes", *routes
    )
    page = (tmp_path / "escape-routes.html").read_text()
    for route in routes:
        assert route in printed
        assert f"{route}: n^" in page
    assert '<script src="http' not in page  # it opens offline


def test_compare_says_why_a_route_cannot_be_dry_run(
    run_example: RunExample,
    load_route: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make_step(seq_len: int, device: str) -> Callable[[], torch.Tensor]:
        values = torch.randn(seq_len, device=device)
        return lambda: values[values.exp() > 1].sum()  # so many, that nobody knows without values

    monkeypatch.setattr(load_route("linformer_attention"), "make_step", make_step)
    printed = run_example(
        "escape_routes/compare.py",
        "--seq-lens", "1K", "2K", "4K",
        "--dry-run",
        "--routes", "SDPA", "Linformer",
    )  # fmt: skip
    assert "Linformer is left out: " in printed
    assert "test_example_scripts.py" in printed
    assert "fused" in printed


def test_compare_is_a_program_of_its_own(tmp_path: Path) -> None:
    """What runs in a fresh interpreter needs nothing that the tests put in place."""
    script = EXAMPLES / "escape_routes" / "compare.py"
    finished = subprocess.run(
        [sys.executable, str(script), "--seq-lens", "64", "128", "--routes", "SDPA"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "fused" in finished.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "abacus"), "--device: no device named 'abacus'"),
        (("--html", "nowhere/page.html"), "--html: nowhere/page.html is not a file in"),
        (("--html", "."), "--html: . is not a file in"),
    ],
)
def test_compare_refuses_before_it_works(
    run_example: RunExample,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    said: str,
) -> None:
    with pytest.raises(SystemExit):
        run_example("escape_routes/compare.py", *options)
    assert said in capsys.readouterr().err


def test_train_gpt2_leaves_a_run(
    run_example: RunExample, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ("--layers", "1", "--seq-len", "64", "--batch", "1", "--steps", "2")
    printed = run_example("train_gpt2.py", *small)
    assert "softmax" in printed
    assert attnprof.load(tmp_path / "runs" / "gpt2-eager").steps.height == 2
    with pytest.raises(SystemExit):  # once more
        run_example("train_gpt2.py", *small)
    assert "runs/gpt2-eager exists" in capsys.readouterr().err


def test_generate_holds_the_cache_that_the_formula_says(run_example: RunExample) -> None:
    printed = run_example("generate.py", "--seq-len", "64")
    # K and V of 4 layers, 2 sequences, 64 tokens, 2 heads, 32 dimensions, in float32
    assert f"the formula says   {2 * 4 * 2 * 64 * 2 * 32 * 4 // 1024}.0 KiB" in printed
    assert "peak in decode" in printed


def test_voluntary_growth_finds_the_quadratic_law(run_example: RunExample) -> None:
    printed = run_example("voluntary_growth.py", "--longest", "256")
    assert "softmax grows as n^2.0" in printed


def test_llama_runs_dry_at_a_million_tokens(run_example: RunExample) -> None:
    printed = run_example("llama.py", "1M")
    assert "make_inference_step on an H200:" in printed
    assert "kv_cache 128." in printed  # GiB: 2 · 32 layers · 2^20 tokens · 8 heads · 128 · 2 bytes


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("escape_routes/compare.py", ["--seq-lens", "0"]),
        ("escape_routes/sdpa.py", ["0"]),
        ("generate.py", ["--seq-len", "0"]),
        ("llama.py", ["0"]),
        ("train_gpt2.py", ["--seq-len", "0"]),
        ("voluntary_growth.py", ["--longest", "0"]),
    ],
)
def test_length_that_is_none_is_refused_with_the_reason(
    run_example: RunExample,
    capsys: pytest.CaptureFixture[str],
    script: str,
    arguments: list[str],
) -> None:
    with pytest.raises(SystemExit):
        run_example(script, *arguments)
    reason = "a sequence length must be a whole number from 1 on, got '0'"
    assert capsys.readouterr().err.splitlines()[-1].endswith(f": {reason}")
