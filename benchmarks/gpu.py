"""What tracing costs and moves on a GPU: peak, time and reconciliation, as one JSON.

Needs CUDA, transformers and nothing from a network. Each figure is measured here and now; the
untraced and the traced program run in turn.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import attnprof


def build_gpt2(seq_len: int, implementation: str, dtype: torch.dtype) -> Callable[[], None]:
    """Return one training step of a GPT-2 medium with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=1024, n_layer=24, n_head=16, n_positions=seq_len, attn_pdrop=0.0,
        attn_implementation=implementation,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).cuda().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, config.vocab_size, (1, seq_len), device="cuda")

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[], None]) -> tuple[int, float]:
    """Return the allocator's peak in bytes and the seconds of one step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return torch.cuda.memory_stats()["allocated_bytes.all.peak"], seconds


def compare(step: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Measure a step untraced and traced in turn."""
    for _ in range(3):
        step()
    plain, traced = [], []
    for _ in range(rounds):
        plain.append(measure(step))
        with attnprof.trace() as tracer:
            step()  # the first step of a trace names modules and operators
            traced.append(measure(step))
    peak = tracer.run.peak(step=1)
    return {
        "untraced_peak_bytes": plain[-1][0],
        "traced_peak_bytes": traced[-1][0],
        "peak_moved_bytes": traced[-1][0] - plain[-1][0],
        "ledger_peak_bytes": peak.total_bytes,
        "by_category": peak.by_category(),
        "time_ratio": statistics.median(t[1] / p[1] for p, t in zip(plain, traced, strict=True)),
    }


def main() -> int:
    """Run all cases and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 1
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cases": {},
    }
    for implementation in ("eager", "sdpa"):
        for seq_len in (1024, 2048, 4096):
            name = f"gpt2-medium {implementation} bf16 n={seq_len}"
            step = build_gpt2(seq_len, implementation, torch.bfloat16)
            results["cases"][name] = compare(step, arguments.rounds)
            print(name, json.dumps(results["cases"][name]))
            del step
            torch.cuda.empty_cache()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
