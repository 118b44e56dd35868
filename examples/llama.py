"""A Llama of 8 billion parameters at any length, without running it.

    attnprof predict examples/llama.py:make_step --seq-len 128K --device H200
    attnprof predict examples/llama.py:make_inference_step --seq-len 1M --device H200

The model is built from transformers' configuration with the shape of Llama 3.1 8B: 32 layers,
grouped queries, bfloat16, `scaled_dot_product_attention`. Nothing is downloaded and, in a dry run,
nothing is allocated: the real program runs on tensors that have shapes and no memory.

Run as a script it prints dry runs at growing lengths.

Grattafiori et al., "The Llama 3 Herd of Models", 2024, https://arxiv.org/abs/2407.21783
"""

import argparse
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnprof
from attnprof.units import format_bytes, parse_length_argument

Step = Callable[[], None]


def build_model(device: str) -> LlamaForCausalLM:
    """Return a Llama with random weights in bfloat16."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config)


def make_step(seq_len: int, device: str) -> Step:
    """Return a training step with AdamW on one sequence."""
    model = build_model(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(model.config.vocab_size, (1, seq_len), device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_inference_step(seq_len: int, device: str) -> Step:
    """Return a prefill of ``seq_len`` tokens and the decoding of one more."""
    model = build_model(device).eval()
    tokens = torch.randint(model.config.vocab_size, (1, seq_len), device=device)

    @torch.no_grad()
    def step() -> None:
        prefilled = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        following = prefilled.logits.argmax(-1)
        model(input_ids=following, past_key_values=prefilled.past_key_values, use_cache=True)

    return step


def main() -> None:
    """Print the peaks of dry runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "seq_lens",
        type=parse_length_argument,
        nargs="*",
        default=[2**13, 2**17, 2**20],
        metavar="N",
    )
    seq_lens = parser.parse_args().seq_lens
    for make in (make_step, make_inference_step):
        print(f"{make.__name__} on an H200:")
        for seq_len in seq_lens:
            peak = attnprof.dry_run(make, seq_len, target="H200").peak()
            most = ", ".join(
                f"{category} {format_bytes(size)}"
                for category, size in list(peak.by_category().items())[:3]
            )
            total = format_bytes(peak.total_bytes)
            print(f"  n = {seq_len:>9}: {total:>10} in {peak.phase}; {most}")


if __name__ == "__main__":
    main()
