"""Programs that decode with every kind of cache, and what their real cache objects hold."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

import attnprof
from attnprof.run import Run

VOCABULARY = 61
BATCH = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 12
WIDTH = HEADS * HEAD_DIM
LAYERS = 2
PROMPT = 7
NEW = 5
FLOAT = 4  # bytes

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of decoder-only models in transformers; every size differs from the others."""

ENCODER_DECODER = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Holding:
    """What a cache object holds when a forward has ended."""

    held_bytes: int
    """All distinct storages behind its tensors."""
    reachable_bytes: int
    """Its tensors themselves: views may show less than their storage holds."""


def measure(cache: object) -> Holding:
    """Return what is reachable from a cache object."""
    tensors = [t for t in find_tensors(cache, set()) if t.numel() > 1]  # no counters
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return Holding(
        held_bytes=sum(storages.values()),
        reachable_bytes=sum(t.numel() * t.element_size() for t in tensors),
    )


def find_tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield the plain tensors reachable from ``value``; of a subclass, what it is made of."""
    if id(value) in seen or isinstance(value, (nn.Module, str, torch.dtype, torch.device)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if type(value) is Tensor:
            yield value
            return
        names, _ = value.__tensor_flatten__()
        children: list[object] = [getattr(value, name) for name in names]
    elif isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    else:
        children = list(getattr(value, "__dict__", {}).values())
    for child in children:
        yield from find_tensors(child, seen)


class Watch:
    """Measures a model's cache after each of its forwards, and keeps none of it alive."""

    def __init__(self, model: nn.Module) -> None:
        self.holdings: list[Holding] = []
        model.register_forward_hook(self._measure, with_kwargs=True)

    def _measure(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for name in ("past_key_values", "cache_params", "state"):  # the last one is RWKV's
            cache = getattr(output, name, None)
            if cache is not None:
                break
        self.holdings.append(measure(cache))


def build(name: str, *, attention: str | None = "eager", **options: Any) -> nn.Module:
    """Build the model class ``name`` of transformers with random weights, for inference."""
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**options)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model: nn.Module = model_class._from_config(config, **chosen).eval()
    return model


def make_llama(**options: Any) -> nn.Module:
    """Return a Llama with grouped queries."""
    return build("LlamaForCausalLM", **(SIZES | options))


def prompt(tokens: int = PROMPT, batch: int = BATCH) -> Tensor:
    """Return random token numbers, (B, n)."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def generate(
    model: nn.Module, ids: Tensor | None = None, **options: Any
) -> tuple[Run, list[Holding], Any]:
    """Trace ``model.generate``; return the run, the cache after each forward, and the output."""
    watch = Watch(model)
    ids = prompt() if ids is None else ids
    defaults = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    with attnprof.trace(samples_per_second=0) as tracer:
        output = model.generate(ids, **(defaults | options))
    return tracer.run, watch.holdings, output


def held_by_forward(run: Run) -> list[int]:
    """Return the bytes that all layers hold after each forward that leaves any."""
    return _sum_by_forward(run, "held_bytes")


def reachable_by_forward(run: Run) -> list[int]:
    """Return the bytes that all layers reach after each forward that leaves any."""
    return _sum_by_forward(run, "reachable_bytes")


def _sum_by_forward(run: Run, column: str) -> list[int]:
    frame = run.kv_cache().group_by("forward").agg(pl.col(column).sum()).sort("forward")
    sums: list[int] = frame[column].to_list()
    return sums
