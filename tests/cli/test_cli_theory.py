"""``attnprof theory``: tables, JSON, and one line where a name or a length is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import ROOT, make_environment

from attnprof.cli import main
from attnprof.theory.activations import Setting
from attnprof.theory.cache import cache_bytes
from attnprof.theory.capacity import predict_inference
from attnprof.theory.devices import find_device
from attnprof.theory.models import find_model
from attnprof.units import format_bytes


def run_theory(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr."""
    code = main(["theory", *arguments])
    return code, *capsys.readouterr()


def test_theory_speaks_of_the_models_own_context(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_theory(capsys, "llama-3.1-8b", "--device", "H100")
    assert (code, err) == (0, "")
    assert out.startswith(
        "attnprof theory  Llama 3.1 8B\n32 layers of width 4096 · 32 heads of 128"
    )
    n = 128 * 1024
    assert f"At n = 128K one layer's scores are {format_bytes(32 * n * n * 2)} a copy" in out
    assert f"the KV cache\nis {format_bytes(2 * 32 * 8 * 128 * n * 2)};" in out
    for section in (
        "Scores, one copy in bfloat16",
        "Training: what attention holds between QKᵀ and PV",
        "Training: the whole model, AdamW",
        "Inference: KV cache and weights",
        "Inference: the whole model",
        "Flops of a forward",
        "Least times on one H100",
        "What fits one H100",
        "How far to trust this",
    ):
        assert f"\n{section}\n" in out
    assert all(line == line.rstrip() and len(line) <= 110 for line in out.splitlines())


@pytest.mark.parametrize(
    ("option", "kept", "gone"),
    [("--training", "Training:", "Inference:"), ("--inference", "Inference:", "Training:")],
)
def test_theory_shows_only_what_is_asked_for(
    option: str, kept: str, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run_theory(capsys, "gpt2", "--device", "T4", option)
    assert kept in out
    assert gone not in out


def test_theory_of_several_lengths_has_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--seq-len", "1M,8K", "--seq-len", "100"]
    _, out, _ = run_theory(capsys, "deepseek-v3", *lengths, "--inference")
    scores = out.split("Scores, one copy")[1].split("Inference: KV cache")[0]
    assert [line.split()[0] for line in scores.splitlines()[3:6]] == ["100", "8K", "1M"]
    assert "the model was made for n = 128K" in out


def test_theory_marks_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_theory(capsys, "llama-2-70b", "--device", "A100 40GB", "--inference")
    arch, n = find_model("Llama 2 70B"), 4096
    fused = predict_inference(arch, Setting(n)).total_bytes
    assert f"  ! {format_bytes(fused)}\n" in out
    given = format_bytes(find_device("A100 40GB").available_bytes)
    assert f"! more than the {given} that a program can have of its memory" in out
    assert "does not fit" in out


def test_theory_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_theory(
        capsys, "gemma-3-4b", "--seq-len", "8K", "--batch", "2", "--device", "L4", "--json"
    )
    found = json.loads(out)
    [at] = found["lengths"]
    gemma, n = find_model("Gemma 3 4B"), 8192
    assert code == 0
    assert found["architecture"]["name"] == "Gemma 3 4B"
    assert found["parameters"] == gemma.parameters
    assert (at["seq_len"], at["scores_per_head"]) == (n, n * n)
    assert at["score_bytes_per_layer"] == 2 * 8 * n * n * 2
    assert at["kv_cache_bytes"] == cache_bytes(gemma, seq_len=n, batch=2)
    assert at["paths"][-1] == at["paths"][-1] | {"path": "fused", "saved_bytes": 0}
    assert sum(at["flops"].values()) == at["total_flops"]
    assert at["decode"]["seconds"] == at["decode"]["memory_seconds"]
    assert found["walls"][-1]["inference_len"] > found["walls"][0]["inference_len"]


def test_theory_reads_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99,
             "hidden_act": "silu", "rms_norm_eps": 1e-6}
        )
    )  # fmt: skip
    code, out, _ = run_theory(capsys, str(tmp_path), "--seq-len", "1K")
    assert code == 0
    assert out.startswith(f"attnprof theory  {tmp_path.name}\n3 layers of width 64 · 4 heads of 16")
    # Two embeddings are one; per layer Q, K, V, O and the gated FFN of three times 64 · 256.
    assert f"{99 * 64 + 3 * (4 * 64**2 + 3 * 64 * 256):,} parameters" in " ".join(out.split())
    assert "assumed       the FFN is 4 times as wide as the model: no key gives a width" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama-3.1-8b"], "no model named 'lama-3.1-8b'; did you mean Llama 3.1 8B or"),
        (["gpt2", "--device", "H20"], "no device named 'H20'; did you mean H200 or"),
        (["gpt2", "--dtype", "int4"], "int4 can store a cache or weights, but attention does not"),
        (["gpt2", "--dtype", "half"], "no dtype named 'half'; expected one of float64"),
        (["gpt2", "--seq-len", "8Q"], "cannot read '8Q' as a sequence length; expected tokens"),
        (["gpt2", "--seq-len", "8K,"], "cannot read '' as a sequence length"),
        (["gpt2", "--batch", "0"], "Invalid value for '--batch'"),
        (["no/such/config.json"], "cannot open no/such/config.json: No such file or directory"),
        ([], "Missing argument 'MODEL'. (see 'attnprof theory --help')"),
    ],
)
def test_theory_says_in_one_line_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_theory(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"attnprof: {message}")
    assert len(err.splitlines()) == 1


def test_theory_of_a_model_without_context_asks_for_a_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    keys = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    file.write_text(json.dumps(keys))
    code, _, err = run_theory(capsys, str(file))
    assert code == 2
    assert err.endswith("does not say its context; give a length with --seq-len\n")


def test_theory_writes_the_lengths_of_a_sentence_alike(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_theory(capsys, "gpt2", "--seq-len", "1K")
    text = " ".join(out.split())
    assert "overtakes the FFN at n = 3,072 (at n = 6,143 where kernels skip" in text


def test_theory_calls_a_model_by_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.json"
    keys = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    file.write_text(json.dumps(keys))
    _, out, _ = run_theory(capsys, str(file), "--seq-len", "16")
    assert out.startswith("attnprof theory  tiny\n1 layer of width 8 · ")


def test_theory_needs_neither_torch_nor_polars() -> None:
    code = (
        "import sys; from attnprof.cli import main; main(['theory', 'gpt2', '--device', 'T4']); "
        "sys.exit(', '.join({'numpy', 'polars', 'pyarrow', 'torch'} & sys.modules.keys()) or 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=make_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
