"""How much of the memory reserved for KV caches holds tokens: rooms of fixed length against pages.

One synthetic trace of requests is served twice on the CPU. Contiguous: every request is given a
room for as many tokens as a request may have, as engines did before paging. PagedAttention (arXiv
2309.06180, section 1 and figure 2) found 20.4 to 38.2 % of such memory holding tokens. Paged: by
transformers' continuous batching, traced, with its real block table; there waste is the empty part
of the last page of each sequence (under 4 % in the paper's figure 2).

Run it with ``python benchmarks/paged_waste.py``.
"""

import argparse
import json
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
from harness import Target, add_options, make_table, save_results, show_machine, show_targets
from rich.console import Console

import attnprof
from attnprof.integrations.transformers import paged_cache

MAX_TOKENS = 2048
"""Tokens a request may have, prompt and answer: the length of a contiguous room."""
PAGE_TOKENS = 16


@dataclass(frozen=True)
class Request:
    """One request of a trace."""

    prompt_tokens: int
    new_tokens: int


def draw_trace(count: int, *, seed: int = 0) -> list[Request]:
    """Return requests whose lengths are spread as chat logs' are: log-normal, and cut off.

    The medians, 130 and 200 tokens, are near those of ShareGPT in the paper's section 6.1 (means of
    161 and 338 tokens), with a tail up to `MAX_TOKENS`.
    """
    drawn = random.Random(seed)
    requests = []
    for _ in range(count):
        prompt = min(int(drawn.lognormvariate(4.87, 0.7)) + 1, MAX_TOKENS // 2)
        new = min(int(drawn.lognormvariate(5.3, 1.0)) + 1, MAX_TOKENS - prompt)
        requests.append(Request(prompt, new))
    return requests


def fill_rooms(requests: list[Request], *, rooms: int) -> float:
    """Return the share of reserved memory that holds tokens, averaged over decoded tokens.

    Requests come in order and wait for one of the rooms; each step every running one grows by a
    token. A room is reserved in full as long as its request runs.
    """
    waiting, running = list(requests), list[list[int]]()
    used = reserved = 0
    while waiting or running:
        while waiting and len(running) < rooms:
            request = waiting.pop(0)
            running.append([request.prompt_tokens, request.prompt_tokens + request.new_tokens])
        for state in running:
            state[0] += 1
        used += sum(state[0] for state in running)
        reserved += MAX_TOKENS * len(running)
        running = [state for state in running if state[0] < state[1]]
    return used / reserved


def serve_pages(requests: list[Request], *, rooms: int, directory: Path) -> pl.DataFrame:
    """Serve requests with transformers' continuous batching, traced; return the cache's rows."""
    import torch
    from transformers import (
        ContinuousBatchingConfig,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=MAX_TOKENS,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    batching = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=rooms * MAX_TOKENS // PAGE_TOKENS,  # as much memory as the rooms
        max_batch_tokens=512,
        max_requests_per_batch=rooms,
        use_cuda_graph=False,
        allow_block_sharing=False,
    )
    with attnprof.trace(directory, samples_per_second=0) as tracer, paged_cache():
        manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=batching,
        )
        manager.start()
        for request in requests:
            ids = torch.randint(3, 64, (request.prompt_tokens,)).tolist()
            manager.add_request(ids, max_new_tokens=request.new_tokens)
        left = len(requests)
        while left:
            answer = manager.get_result(timeout=600)
            if answer is None:
                raise RuntimeError(f"{left} requests were not answered within ten minutes")
            left -= answer.is_finished()
        manager.stop(block=True)
    return tracer.run.kv_cache().drop_nulls("block_tokens")


def measure_waste(frame: pl.DataFrame) -> tuple[float, float]:
    """Return the shares that hold tokens: of the pages in use, and of the pages that belong to one.

    Averaged over the forwards of a run, weighted by pages.
    """
    sums = frame.select(
        tokens=pl.col("tokens").sum(),
        used=(pl.col("used_blocks") * pl.col("block_tokens")).sum(),
        allocated=(pl.col("allocated_blocks") * pl.col("block_tokens")).sum(),
    ).row(0, named=True)
    return sums["tokens"] / sums["used"], sums["tokens"] / sums["allocated"]


def main() -> None:
    """Serve one trace in both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, rounds=1)
    parser.add_argument("--requests", type=int, default=40, help="default: 40")
    parser.add_argument("--rooms", type=int, default=8, help="running at a time; default: 8")
    parser.add_argument("--write-trace", type=Path, metavar="FILE", help="the requests as JSON")
    options = parser.parse_args()
    requests = draw_trace(options.requests)
    if options.write_trace is not None:
        options.write_trace.write_text(json.dumps([asdict(request) for request in requests]))
    console = Console()
    show_machine(console)
    contiguous = fill_rooms(requests, rooms=options.rooms)
    with tempfile.TemporaryDirectory() as directory:
        frame = serve_pages(requests, rooms=options.rooms, directory=Path(directory) / "run")
    used, allocated = measure_waste(frame)
    table = make_table(
        f"{len(requests)} requests, at most {options.rooms} at a time, {MAX_TOKENS} tokens each",
        ["memory", "holds tokens", "wasted"],
    )
    for name, share in (
        ("rooms of the longest length", contiguous),
        (f"pages of {PAGE_TOKENS} tokens that belong to a request", allocated),
        ("pages with at least one token", used),
    ):
        table.add_row(name, f"{share:.1%}", f"{1 - share:.1%}")
    console.print(table)
    targets = [
        Target("contiguous, share that holds tokens", contiguous, 0.382),
        Target("paged, share that is wasted", 1 - allocated, 0.04),
    ]
    show_targets(console, targets)
    results = {"contiguous": contiguous, "paged_allocated": allocated, "paged_used": used}
    save_results(options.json, "paged_waste", results, targets)


if __name__ == "__main__":
    main()
