"""What tracing costs per decoded token, beside nothing and beside torch.profiler.

Run it with ``python benchmarks/kv_cache.py``.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from harness import (
    Variant,
    add_options,
    make_table,
    pair_ratio,
    save_results,
    show_machine,
    time_interleaved,
)
from overhead import NO_OP, make_profiler, tracing
from rich.console import Console
from workloads import NoOpMode

import attnprof
from attnprof.capture.tracer import Tracer

UNTRACED, ATTNPROF, PROFILER = "untraced", "attnprof", "torch.profiler"


def make_decoder(width: int, layers: int, prompt: int) -> Callable[[], None]:
    """Return a function that decodes one token of a Llama with grouped queries.

    Every 64 tokens the cache is cropped to the prompt, so that steps stay alike.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(0, 1000, (1, prompt))
    with torch.no_grad():
        kept = model(ids, past_key_values=DynamicCache(config=config)).past_key_values
    state: dict[str, Any] = {"cache": kept, "ids": ids[:, -1:], "count": 0}

    def step() -> None:
        with torch.no_grad():
            output = model(state["ids"], past_key_values=state["cache"])
        state["ids"] = output.logits[:, -1:].argmax(-1)
        state["count"] += 1
        if state["count"] % 64 == 0:
            state["cache"].crop(-64)

    return step


def read_cache(tracer: Tracer) -> None:
    """Ask what a user would: the cache, per layer and token."""
    attnprof.load(tracer.run.path).kv_cache()


def main() -> None:
    """Decode with every tracer and print what a token costs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, rounds=7)
    options = parser.parse_args()
    console = Console()
    show_machine(console)
    results = {}
    for title, width, layers, threads in (
        ("a small model: launching ops is all", 64, 4, 1),
        ("a larger one: 12 layers of width 768", 768, 12, 2),
    ):
        torch.set_num_threads(threads)
        results[title] = measure(make_decoder(width, layers, prompt=256), options.rounds)
        columns = ["tracer", "ms/token", "× untraced", "usable after, s"]
        table = make_table(f"Decoding, {title}", columns)
        for name, row in results[title].items():
            seconds, ratio, finish = (row[k] for k in ("seconds", "to_untraced", "usable"))
            table.add_row(name, f"{seconds * 1e3:.2f}", f"{ratio:.2f}", f"{finish:.2f}")
        console.print(table)
    save_results(options.json, "kv_cache", results, [])


def measure(step: Callable[[], None], rounds: int) -> dict[str, dict[str, float]]:
    """Time a decoding step under every tracer."""
    with tempfile.TemporaryDirectory() as directory:
        variants = [
            Variant(UNTRACED, nullcontext, steps=32),
            Variant(NO_OP, NoOpMode, steps=32),
            Variant(ATTNPROF, lambda: tracing(Path(directory)), steps=32, finish=read_cache),
            Variant(PROFILER, make_profiler, steps=32, finish=lambda p: p.key_averages()),
        ]
        timings = time_interleaved(step, variants, rounds)
    base = timings[UNTRACED].step_seconds
    return {
        name: {
            "seconds": timing.step,
            "to_untraced": pair_ratio(timing.step_seconds, base),
            "usable": timing.finish,
        }
        for name, timing in timings.items()
    }


if __name__ == "__main__":
    main()
