"""Train a small GPT-2 with random weights on the text of Python's own library.

An ordinary training script that knows nothing of attnprof. ``attnprof demo`` runs it twice; to
record it by hand:

    attnprof run train_gpt2.py --attention eager
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from its configuration

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging


def read_text(size_bytes: int) -> bytes:
    """Return so many bytes of Python source: text that every machine has, in a fixed order."""
    text = b""
    while len(text) < size_bytes:
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            text += path.read_bytes()
            if len(text) >= size_bytes:
                break
    return text[:size_bytes]


def build_model(attention: str, *, layers: int, seq_len: int) -> GPT2LMHeadModel:
    """Return a GPT-2 over bytes, the same weights every time."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=384,
        n_head=6,
        n_positions=seq_len,
        vocab_size=256,
        # GPT-2's own GELU, as the one op it is today.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config)


def train(
    attention: str, *, layers: int = 6, seq_len: int = 512, batch: int = 4, steps: int = 3
) -> Iterator[float]:
    """Train and yield each step's loss.

    Args:
        attention: ``"eager"`` writes the score matrices out, ``"sdpa"`` fuses them away.
        layers: L.
        seq_len: n, in bytes of text.
        batch: B.
        steps: How often the optimizer steps.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a configuration without a tokenizer warns of nothing real
    try:
        model = build_model(attention, layers=layers, seq_len=seq_len)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.tensor(list(read_text(steps * batch * seq_len)))
        for batch_tokens in tokens.view(steps, batch, seq_len):
            loss = model(input_ids=batch_tokens, labels=batch_tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()
    finally:
        logging.set_verbosity(verbosity)


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager")
    for name, default in (("layers", 6), ("seq-len", 512), ("batch", 4), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for step, loss in enumerate(train(**vars(parser.parse_args()))):
        print(f"step {step}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
