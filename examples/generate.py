"""Generate with a KV cache: what it holds, beside what the formula says.

A small Llama with grouped queries: 8 query heads share 2 key/value heads, so that the cache is a
quarter of what it would be. K and V of all past tokens cost

    2 · L · B · n · Hkv · D · bytes per element

whatever the number of query heads is. transformers' default cache appends with ``torch.cat``, which
for a moment holds the old and the new K of one layer: a growing cache needs a little more than it
holds.
"""

import argparse
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnprof
from attnprof.units import format_bytes, parse_length_argument

BATCH = 2
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 32
NEW_TOKENS = 8


def make_step(seq_len: int, device: str) -> Callable[[], None]:
    """Return a step that fills the cache with a prompt and decodes until ``seq_len`` tokens."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=4 * HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
        prompt = torch.randint(config.vocab_size, (BATCH, seq_len - NEW_TOKENS))

    @torch.no_grad()
    def step() -> None:
        tokens, cache = prompt, None
        for _ in range(NEW_TOKENS + 1):  # the prompt, then every new token
            output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            tokens = output.logits[:, -1:].argmax(-1)  # (B, 1): greedy

    return step


def main() -> None:
    """Generate under a trace and print the cache of each layer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seq-len", type=parse_length_argument, default=512, metavar="N", help="prompt and answer"
    )
    seq_len = parser.parse_args().seq_len
    if seq_len <= NEW_TOKENS:
        parser.error(f"--seq-len {seq_len} has no room for a prompt beside {NEW_TOKENS} new tokens")

    with attnprof.trace() as tracer:
        make_step(seq_len, "cpu")()

    run = tracer.run
    layers = run.layers().select("layer", "kind", "heads", "kv_heads", "kv_cache_bytes")
    print(layers)
    formula = 2 * LAYERS * BATCH * seq_len * KV_HEADS * HEAD_DIM * 4
    print(f"the formula says   {format_bytes(formula)}")
    for phase in ("prefill", "decode"):
        peak = run.peak(phase=phase)
        held = peak.by_category().get("kv_cache", 0)
        print(f"peak in {phase:8}   {format_bytes(peak.total_bytes)}, cache {format_bytes(held)}")


if __name__ == "__main__":
    main()
