"""How well short sequences tell what a long one needs.

Sweeps small real models at lengths up to N/4, predicts N, and then runs N. Beside the prediction,
which replays every block of memory at its new size, stands what laws of the phases' peaks alone
say: a peak that moves between two instants follows neither's law. Run it with
``python benchmarks/growth.py``.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Target, add_options, make_table, save_results, show_machine, show_targets
from rich.console import Console

from attnprof.capture.sweep import sweep
from attnprof.capture.workload import MakeStep, record_workload

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Results = dict[str, Any]

VOCABULARY = 256
LIMIT = 0.01
"""The relative error that a prediction of N from n ≤ N/4 is held to."""


@dataclass(frozen=True)
class Case:
    """A model to be swept."""

    name: str
    build: Callable[[int], Any]
    """Makes the model for a length."""
    trains: bool = True
    """Whether a step is forward, backward and AdamW, or a greedy generation of 4 tokens."""
    longest: int = 1024
    """N."""

    def make_step(self, seq_len: int, device: str) -> Callable[[], None]:
        """Build the model and return its step."""
        torch.manual_seed(0)
        model = self.build(seq_len).to(device)
        tokens = torch.randint(2, VOCABULARY, (2, seq_len), device=device)
        if not self.trains:
            return lambda: _generate(model.eval(), tokens)
        optimizer = torch.optim.AdamW(model.train().parameters())

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


def _generate(model: Any, tokens: torch.Tensor) -> None:
    model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)


def _make_gpt2(attention: str, *, dropout: float = 0.0) -> Callable[[int], Any]:
    def build(seq_len: int) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=seq_len, n_embd=64, n_layer=2, n_head=4,
            attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, bos_token_id=0,
            eos_token_id=0, attn_implementation=attention, loss_type="ForCausalLM",
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    return build


def _make_llama(attention: str, *, vocabulary: int = VOCABULARY) -> Callable[[int], Any]:
    def build(seq_len: int) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=seq_len + 8,
            attn_implementation=attention,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    return build


def _make_longformer(seq_len: int) -> Any:
    from transformers import LongformerConfig, LongformerForMaskedLM

    config = LongformerConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, attention_window=32, max_position_embeddings=seq_len + 8,
        pad_token_id=1,
    )  # fmt: skip
    return LongformerForMaskedLM(config)


def _make_bigbird(seq_len: int) -> Any:
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    config = BigBirdConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, block_size=8, num_random_blocks=2, max_position_embeddings=seq_len,
        attention_type="block_sparse",
    )  # fmt: skip
    return BigBirdForMaskedLM(config)


def _make_mamba(seq_len: int) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, use_cache=False
    )
    return MambaForCausalLM(config)


CASES = (
    Case("GPT-2, eager", _make_gpt2("eager")),
    Case("GPT-2, eager, dropout", _make_gpt2("eager", dropout=0.1)),
    Case("Llama, eager", _make_llama("eager")),
    Case("Llama, eager, vocabulary 8192", _make_llama("eager", vocabulary=8192)),
    Case("GPT-2, sdpa", _make_gpt2("sdpa")),
    Case("GPT-2, sdpa, dropout", _make_gpt2("sdpa", dropout=0.1)),
    Case("Llama, sdpa", _make_llama("sdpa")),
    Case("Llama, sdpa, generating", _make_llama("sdpa"), trains=False),
    Case("Longformer, window 32", _make_longformer),
    Case("BigBird, blocks of 8", _make_bigbird),
    Case("Mamba, token by token", _make_mamba, longest=256),
)


def measure(case: Case) -> Results:
    """Sweep a case up to N/4, predict N, run N, and return the relative errors."""
    lengths = [case.longest * share // 64 for share in (4, 6, 8, 12, 16)]
    make_step: MakeStep = case.make_step
    growth = sweep(make_step, lengths)
    begin = time.perf_counter()
    predicted = growth.predict_peak(case.longest)
    seconds = time.perf_counter() - begin
    law = growth.fit().predict(case.longest)
    run = record_workload(make_step, case.longest)
    peak = run.peak()
    by_category = peak.by_category()
    missed = sum(
        abs(by_category.get(name, 0) - predicted.by_category.get(name, 0))
        for name in by_category.keys() | predicted.by_category.keys()
    )
    return {
        "case": case.name,
        "kinds": sorted(set(run.layers()["kind"])) or ["none"],
        "lengths": lengths,
        "longest": case.longest,
        "method": predicted.method,
        "peak_bytes": peak.total_bytes,
        "predicted_bytes": predicted.peak_bytes,
        "error": predicted.peak_bytes / peak.total_bytes - 1,
        "law_error": law / peak.total_bytes - 1,
        "category_error": missed / peak.total_bytes if predicted.by_category else None,
        "softmax": growth.fit("softmax").sentence,
        "blocks": len(run.allocations),
        "predict_seconds": seconds,
    }


def show(console: Console, results: list[Results]) -> None:
    """Print the errors of every case."""
    table = make_table(
        "N from n ≤ N/4, relative errors of the peak",
        ["model", "attention", "N", "peak, MiB", "by", "error", "by category", "laws alone", "s"],
    )
    for found in results:
        by_category = found["category_error"]
        table.add_row(
            found["case"],
            ", ".join(found["kinds"]),
            str(found["longest"]),
            f"{found['peak_bytes'] / 2**20:.1f}",
            found["method"],
            f"{found['error']:+.3%}",
            "" if by_category is None else f"{by_category:.3%}",
            f"{found['law_error']:+.1%}",
            f"{found['predict_seconds']:.2f}",
        )
    console.print(table)
    for found in results:
        console.print(f"{found['case']}: {found['softmax']}", style="dim", highlight=False)


def main() -> None:
    """Measure every case, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=1)
    parser.add_argument("--only", metavar="WORD", default="", help="cases with WORD in the name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=130)
    show_machine(console)
    cases = [case for case in CASES if options.only.lower() in case.name.lower()]
    results = [measure(case) for case in cases for _ in range(options.rounds)]
    show(console, results)
    targets = []
    for kind in ("materialised", "fused", "banded"):
        errors = [abs(found["error"]) for found in results if kind in found["kinds"]]
        if errors:
            targets.append(Target(f"largest error, {kind}", max(errors), LIMIT))
    seconds = statistics.median(found["predict_seconds"] for found in results)
    targets.append(Target("median seconds to predict", seconds, 1))
    show_targets(console, targets)
    save_results(options.json, "growth", {"cases": results}, targets)


if __name__ == "__main__":
    main()
