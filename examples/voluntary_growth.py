"""Growth without a sweep: batches of different lengths say how memory grows while one trains.

Most training data has sequences of many lengths. Every step is then a growth point, and the law
can be read from an ordinary run: no second program, no extra step.
"""

import argparse
import random

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import attnprof
from attnprof.units import format_bytes, parse_length_argument


def main() -> None:
    """Train on batches of different lengths; print the growth that this shows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--longest", type=parse_length_argument, default=512, metavar="N")
    parser.add_argument("--steps", type=parse_length_argument, default=8)
    options = parser.parse_args()

    config = GPT2Config(
        n_layer=2,
        n_embd=128,
        n_head=4,
        n_positions=options.longest,
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # as it assumes, but with a warning
    optimizer = torch.optim.AdamW(model.parameters())
    with attnprof.trace() as tracer:
        for _ in range(options.steps):
            length = random.randint(max(1, options.longest // 8), options.longest)
            tokens = torch.randint(config.vocab_size, (2, length))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    print(tracer.run.steps.select("step", "seq_len", "batch", "peak_bytes"))
    growth = attnprof.Growth.from_run(tracer.run)
    print(growth.fit().sentence)
    print(growth.fit("softmax").sentence)
    print(f"a batch of twice the longest: {format_bytes(growth.predict(2 * options.longest))}")


if __name__ == "__main__":
    main()
