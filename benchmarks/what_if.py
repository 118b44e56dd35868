"""What-ifs against what is measured: predicted from one program, then the other one is run.

    python benchmarks/what_if.py [--steps N] [--json FILE]

Needs no GPU; models are made from configurations and nothing is downloaded.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness import Target, make_table, save_results, show_machine, show_targets
from rich.console import Console
from torch import nn
from torch.nn import functional

import attnprof
from attnprof.run import Run
from attnprof.units import format_bytes

VOCABULARY, LAYERS, WIDTH, HEADS = 8192, 6, 256, 8
_MOST_ERROR = 2.0
"""Per cent of the measured peak, for what is said to be exact."""


@dataclass(frozen=True)
class Setting:
    """A model and how it is run."""

    model: str
    attention: str = "eager"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    length: int = 256
    dropout: float = 0.0
    """On attention weights."""
    kv_heads: int = HEADS
    checkpoints: bool = False
    cache: str = ""
    """``"dynamic"`` or ``"static"``: decode with it instead of training."""
    chunks: bool = False
    """Whether the loss is taken in chunks of tokens."""


@dataclass(frozen=True)
class Question:
    """A change, predicted from one setting and measured in another."""

    before: Setting
    after: Setting
    scenarios: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


def make_model(setting: Setting) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model in training and the arguments of its forward, which gives a loss."""
    torch.manual_seed(0)
    model, inputs = _MAKERS[setting.model](setting)
    if setting.checkpoints:
        model.activation_checkpointing_enable()
    return model.to(setting.dtype).train(), inputs


def _make_tokens(setting: Setting) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (setting.batch, setting.length))


def _make_gpt2(setting: Setting) -> tuple[Any, dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=1024,
        attn_pdrop=setting.dropout, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0,
        eos_token_id=0, attn_implementation=setting.attention, loss_type="ForCausalLM",
    )  # fmt: skip
    ids = _make_tokens(setting)
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids, "use_cache": False}


def _make_llama(setting: Setting) -> tuple[Any, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=setting.kv_heads,
        attn_implementation=setting.attention,
    )  # fmt: skip
    ids = _make_tokens(setting)
    model = LlamaForCausalLM(config)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if setting.chunks:
        return _Chunked(model), {"input_ids": ids}
    return model, inputs


def _make_bert(setting: Setting) -> tuple[Any, dict[str, Any]]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, intermediate_size=4 * WIDTH, max_position_embeddings=1024,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=setting.dropout,
        attn_implementation=setting.attention,
    )  # fmt: skip
    ids = _make_tokens(setting)
    mask = torch.ones_like(ids)
    mask[:, -9:] = 0  # padded: fused attention is given a mask
    return BertForMaskedLM(config), {"input_ids": ids, "labels": ids, "attention_mask": mask}


def _make_vit(setting: Setting) -> tuple[Any, dict[str, Any]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=128,
        intermediate_size=4 * WIDTH, patch_size=8, num_labels=10,
        attn_implementation=setting.attention,
    )  # fmt: skip
    images = torch.randn(setting.batch, 3, 128, 128)
    labels = torch.arange(setting.batch)
    return ViTForImageClassification(config), {"pixel_values": images, "labels": labels}


def _make_t5(setting: Setting) -> tuple[Any, dict[str, Any]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=4 * WIDTH,
        num_layers=LAYERS // 2, num_heads=HEADS, decoder_start_token_id=0, dropout_rate=0.0,
        attn_implementation=setting.attention,
    )  # fmt: skip
    labels = _make_tokens(replace(setting, length=setting.length // 2))
    inputs = {"input_ids": _make_tokens(setting), "labels": labels, "use_cache": False}
    return T5ForConditionalGeneration(config), inputs


_MAKERS: dict[str, Callable[[Setting], tuple[Any, dict[str, Any]]]] = {
    "GPT-2": _make_gpt2,
    "Llama": _make_llama,
    "BERT": _make_bert,
    "ViT": _make_vit,
    "T5": _make_t5,
}


class _Chunked(nn.Module):
    """A language model whose head and loss are torch's, in chunks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.body(input_ids=input_ids, use_cache=False).last_hidden_state
        labels = functional.pad(input_ids[:, 1:], (0, 1), value=-100)
        return {
            "loss": functional.linear_cross_entropy(
                hidden.flatten(0, 1),
                self.lm_head.weight,
                labels.flatten(),
                options=nn.LinearCrossEntropyOptions(),
            )
        }


def record(directory: Path, setting: Setting, steps: int) -> Run:
    """Return the run of a setting: training steps with AdamW, or a prompt and its tokens."""
    model, inputs = make_model(setting)
    with attnprof.trace(directory, samples_per_second=0) as tracer:
        if setting.cache:
            _decode(model.eval(), inputs["input_ids"], setting.cache)
        else:
            _train(model, inputs, steps)
    return tracer.run


def _train(model: nn.Module, inputs: dict[str, Any], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(**inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _decode(model: Any, tokens: torch.Tensor, kind: str, count: int = 16) -> None:
    from transformers import DynamicCache, StaticCache

    length = tokens.shape[1] + count - 1
    cache = (
        StaticCache(config=model.config, max_cache_len=length)
        if kind == "static"
        else DynamicCache(config=model.config)
    )
    for _ in range(count):
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = output.logits[:, -1:].argmax(-1)


def list_questions() -> list[Question]:
    """Return what is asked."""
    gpt2, llama, bert = Setting("GPT-2"), Setting("Llama", kv_heads=2), Setting("BERT")
    half = replace(llama, dtype=torch.bfloat16)
    settings = [gpt2, llama, half, bert, Setting("ViT")]
    fused = [replace(setting, attention="sdpa") for setting in settings]
    questions = [
        Question(setting, other, ("fused_attention",))
        for setting, other in zip(settings, fused, strict=True)
    ]
    for setting in (*settings, *fused[:3], Setting("T5")):
        other = replace(setting, checkpoints=True)
        questions.append(Question(setting, other, ("checkpointing",)))
    both = ("fused_attention", "checkpointing")
    questions += [
        Question(s, replace(f, checkpoints=True), both)
        for s, f in zip(settings, fused, strict=True)
    ]
    for setting in (gpt2, bert):
        dropped = replace(setting, dropout=0.1)
        questions.append(Question(dropped, setting, ("no_attention_dropout",)))
        other = replace(setting, attention="sdpa")
        questions.append(Question(dropped, other, ("no_attention_dropout", "fused_attention")))
    for attention in ("eager", "sdpa"):
        whole = Setting("Llama", attention)
        questions.append(Question(whole, replace(whole, kv_heads=2), numbers={"kv_heads": 2}))
        decoding = replace(whole, cache="dynamic")
        static = "cache_static_masked" if attention == "eager" else "cache_static"
        questions.append(Question(decoding, replace(decoding, cache="static"), (static,)))
        questions.append(Question(decoding, replace(decoding, kv_heads=2), numbers={"kv_heads": 2}))
    for setting in (gpt2, half, bert, Setting("T5")):
        questions.append(Question(setting, replace(setting, batch=4), numbers={"batch": 2}))
        questions.append(Question(setting, replace(setting, length=512), numbers={"seq_len": 512}))
    questions.append(
        Question(gpt2, replace(fused[0], length=512), ("fused_attention",), {"seq_len": 512})
    )
    whole = Setting("Llama", "sdpa")
    questions.append(Question(whole, replace(whole, chunks=True), ("chunked_loss",)))
    return questions


def describe(setting: Setting) -> str:
    """Return a setting in a few words."""
    words = [setting.model, setting.attention]
    words += ["bf16"] if setting.dtype is torch.bfloat16 else []
    words += [f"Hkv {setting.kv_heads}"] if setting.kv_heads < HEADS else []
    words += [f"dropout {setting.dropout}"] if setting.dropout else []
    words += [f"{setting.cache} cache"] if setting.cache else []
    return ", ".join(words)


def ask(question: Question, before: Run, after: Run) -> dict[str, Any]:
    """Return what was predicted and what was measured."""
    begin = time.perf_counter()
    found = before.what_if(*question.scenarios, **question.numbers)
    seconds = time.perf_counter() - begin
    predicted, measured = found.after.total_bytes, after.peak().total_bytes
    numbers = [f"{name}={value}" for name, value in question.numbers.items()]
    return {
        "setting": describe(question.before),
        "change": ", ".join([*question.scenarios, *numbers]),
        "recorded_bytes": found.before.total_bytes,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error_percent": 100 * (predicted / measured - 1),
        "exact": found.exact,
        "seconds": seconds,
    }


def time_advice(directory: Path) -> dict[str, Any]:
    """Return how long advice takes in a run of about 100 000 allocations, median of five."""
    from workloads import count_ops, make_gpt2

    step = make_gpt2(layers=12, width=32, heads=2, seq_len=32, batch=2, vocabulary=64)
    step()
    steps = -(-270_000 // count_ops(step))
    with attnprof.trace(directory, samples_per_second=0):
        for _ in range(steps):
            step()
    seconds = []
    for _ in range(5):
        run = attnprof.load(directory)
        count = len(run.allocations)  # attributes the run, which is not timed here
        begin = time.perf_counter()
        run.advice()
        seconds.append(time.perf_counter() - begin)
    return {"allocations": count, "seconds": statistics.median(seconds)}


def show(console: Console, answers: list[dict[str, Any]]) -> None:
    """Print what was predicted beside what was measured."""
    columns = ["recorded program", "change", "recorded", "predicted", "measured", "error"]
    table = make_table("Predicted from one run, measured in another", columns)
    for answer in answers:
        mark = "" if answer["exact"] else "~"
        table.add_row(
            answer["setting"],
            answer["change"],
            format_bytes(answer["recorded_bytes"]),
            mark + format_bytes(answer["predicted_bytes"]),
            format_bytes(answer["measured_bytes"]),
            f"{answer['error_percent']:+.3f} %",
        )
    console.print(table)


def main() -> None:
    """Record every setting once, ask every question, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2, help="training steps per run; default: 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console(width=150)
    show_machine(console)
    runs: dict[Setting, Run] = {}
    answers = []
    with tempfile.TemporaryDirectory(prefix="attnprof-benchmark-") as scratch:
        advice = time_advice(Path(scratch) / "advice")  # first, while this process is small
        for question in list_questions():
            for setting in (question.before, question.after):
                if setting not in runs:
                    runs[setting] = record(Path(scratch) / str(len(runs)), setting, options.steps)
            answers.append(ask(question, runs[question.before], runs[question.after]))
    show(console, answers)
    fused = [a for a in answers if a["change"] == "fused_attention"]
    exact = [a for a in answers if a["exact"]]
    estimated = [a for a in answers if not a["exact"]]
    targets = [
        Target("eager to SDPA, largest error, %", _find_worst(fused), _MOST_ERROR),
        Target("all that is exact, largest error, %", _find_worst(exact), _MOST_ERROR),
        Target("all estimates, largest error, %", _find_worst(estimated), 5.0),
        Target(
            "advice, seconds per 100 000 allocations",
            advice["seconds"] * 100_000 / advice["allocations"],
            1.0,
        ),
    ]
    show_targets(console, targets)
    save_results(options.json, "what_if", {"answers": answers, "advice": advice}, targets)


def _find_worst(answers: list[dict[str, Any]]) -> float:
    return max(abs(answer["error_percent"]) for answer in answers)


if __name__ == "__main__":
    main()
