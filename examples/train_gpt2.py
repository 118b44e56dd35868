"""Trace a training loop: a GPT-2 with random weights, trained on random tokens.

    python examples/train_gpt2.py                        # materialised attention
    python examples/train_gpt2.py --attention sdpa       # the same without score matrices
    attnprof report runs/gpt2-eager --html report.html   # the run stays on disk

The two lines of attnprof are the import and the ``with``. All that follows reads the recorded run,
which any process can do later with ``attnprof.load``.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import attnprof
from attnprof.units import format_bytes, parse_length_argument


def main() -> None:
    """Train, then say where the memory went."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager")
    parser.add_argument("--out", metavar="DIR", help="default: runs/gpt2-ATTENTION")
    for name, default in (("layers", 4), ("seq-len", 512), ("batch", 2), ("steps", 3)):
        parser.add_argument(f"--{name}", type=parse_length_argument, default=default)
    options = parser.parse_args()

    config = GPT2Config(
        n_layer=options.layers,
        n_embd=256,
        n_head=8,
        n_positions=options.seq_len,
        vocab_size=1000,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=options.attention,
    )
    directory = Path(options.out or f"runs/gpt2-{options.attention}")
    if directory.exists():
        parser.error(
            f"{directory} exists, and a run is never written over; name another with --out"
        )
    with attnprof.trace(directory) as tracer:
        model = GPT2LMHeadModel(config).train()
        model.loss_type = "ForCausalLM"  # as it assumes, but with a warning
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(options.steps):
            tokens = torch.randint(config.vocab_size, (options.batch, options.seq_len))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    run = tracer.run
    peak = run.peak()
    print(f"peak {format_bytes(peak.total_bytes)}, in {peak.phase} of step {peak.step}:")
    for category, size_bytes in peak.by_category().items():
        print(f"  {format_bytes(size_bytes):>12}  {category}")
    print(run.layers().select("layer", "kind", "heads", "q_len", "k_len", "saved_softmax_bytes"))
    print(f"recorded in {run.path}")


if __name__ == "__main__":
    main()
