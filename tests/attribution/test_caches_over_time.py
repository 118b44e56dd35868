"""Caches that are reset, cropped, handed on or filled elsewhere, against what the program holds."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from torch import Tensor, nn

import attnprof
from attnprof.run import Run
from tests.attribution.cache_programs import (
    BATCH,
    FLOAT,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    NEW,
    PROMPT,
    SIZES,
    VOCABULARY,
    WIDTH,
    Holding,
    Watch,
    build,
    generate,
    held_by_forward,
    make_llama,
    measure,
    prompt,
    reachable_by_forward,
)
from tests.attribution.test_caches_by_hand import Model, concatenate, embed

ATTENTION = "model.layers.0.self_attn"
ONE_ANSWER = ["prefill"] + ["decode"] * (NEW - 1)


def answer(model: nn.Module, **options: Any) -> Any:
    ids = prompt()
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, pad_token_id=0, return_dict_in_generate=True, **options,
    )  # fmt: skip


def list_phases(run: Run) -> list[str]:
    """Return the phase of every forward that leaves something."""
    return run.kv_cache().group_by("forward", maintain_order=True).first()["phase"].to_list()


def make_mamba() -> nn.Module:
    return build(
        "MambaForCausalLM", attention=None, vocab_size=VOCABULARY, hidden_size=WIDTH,
        num_hidden_layers=LAYERS, state_size=8, time_step_rank=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_llama, {}),
        (make_llama, {"cache_implementation": "static"}),
        (lambda: make_llama(attention="sdpa"), {"cache_implementation": "static"}),
        (make_mamba, {}),
    ],
)
def test_second_answer_begins_with_a_prefill(
    make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    watch = Watch(model := make())
    with attnprof.trace(samples_per_second=0) as tracer:
        answers = [answer(model, **options) for _ in range(2)]
    assert len(answers) == 2  # they hold the caches
    assert list_phases(tracer.run) == 2 * ONE_ANSWER
    held = [h.held_bytes for h in watch.holdings]
    # The first answer's cache is still there.
    assert held_by_forward(tracer.run) == held[:NEW] + [held[NEW - 1] + size for size in held[NEW:]]


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_cache_that_is_reset_counts_from_nothing_again(kind: str) -> None:
    model = make_llama()
    room = {"max_cache_len": 20} if kind == "StaticCache" else {}
    cache = getattr(transformers, kind)(config=model.config, **room)
    watch = Watch(model)
    with attnprof.trace(samples_per_second=0) as tracer:
        for _ in range(2):
            answer(model, past_key_values=cache)
            cache.reset()
    assert held_by_forward(tracer.run) == [h.held_bytes for h in watch.holdings]
    rows = tracer.run.kv_cache().filter(pl.col("layer") == ATTENTION)
    assert rows["tokens"].to_list() == 2 * list(range(PROMPT, PROMPT + NEW))
    assert rows["phase"].to_list() == 2 * ONE_ANSWER


def test_cache_that_is_cropped_goes_on_from_what_is_left() -> None:
    from transformers import DynamicCache

    model = make_llama()
    cache, ids, truth = DynamicCache(config=model.config), prompt(), []
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        for number in range(NEW):
            output = model(ids, past_key_values=cache)
            ids = output.logits[:, -1:].argmax(-1)
            del output
            truth.append(measure(cache))
            if number == 2:
                cache.crop(-4)
    assert held_by_forward(tracer.run) == [h.held_bytes for h in truth]
    assert reachable_by_forward(tracer.run) == [h.reachable_bytes for h in truth]
    tokens = tracer.run.kv_cache().filter(pl.col("layer") == ATTENTION)["tokens"].to_list()
    assert tokens == [PROMPT, PROMPT + 1, PROMPT + 2, PROMPT + 3 - 4, PROMPT + 4 - 4]


@pytest.mark.parametrize(
    ("make", "name", "has_room"),
    [
        (make_llama, "past_key_values", False),
        (lambda: make_llama(attention="sdpa"), "past_key_values", True),  # heads become queries
        (make_mamba, "cache_params", False),
    ],
)
def test_single_tokens_that_no_answer_chose_are_decode(
    make: Callable[[], nn.Module], name: str, has_room: bool
) -> None:
    """Benchmarks make up the tokens to go on with; a prompt comes in chunks of more than one."""
    model: Any = make()
    cache = transformers.StaticCache(config=model.config, max_cache_len=20) if has_room else None
    with torch.no_grad(), attnprof.trace(samples_per_second=0) as tracer:
        for tokens in (4, 3, 1, 1, 1):
            output = model(prompt(tokens), use_cache=True, **{name: cache})
            cache = getattr(output, name)
    assert list_phases(tracer.run) == ["prefill"] * 2 + ["decode"] * 3


def decode_on(model: nn.Module, cache: Any, ids: Tensor, forwards: int) -> Tensor:
    for _ in range(forwards):
        output = model(ids, past_key_values=cache)
        ids = output.logits[:, -1:].argmax(-1)
        del output
    return ids


def test_copies_of_a_prompts_cache_are_held_beside_it() -> None:
    """`copy.deepcopy` is how transformers' guide uses a prompt again; it copies bytes."""
    from transformers import DynamicCache

    model = make_llama(num_hidden_layers=1)
    first, truth = DynamicCache(config=model.config), []
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        ids = decode_on(model, first, prompt(), 1)
        caches = [first]
        truth.append(measure(caches).held_bytes)
        for _ in range(2):
            caches.append(copy.deepcopy(first))
            for _ in range(2):
                ids = decode_on(model, caches[-1], ids, 1)
                truth.append(measure(caches).held_bytes)
    frame = tracer.run.kv_cache()
    assert held_by_forward(tracer.run) == truth
    assert frame["tokens"].to_list() == [PROMPT, *2 * [PROMPT + 1, PROMPT + 2]]
    assert set(frame["bytes_per_token"]) == {2 * KV_HEADS * HEAD_DIM * FLOAT}
    assert set(frame["kind"]) == {"grown"}


def test_trace_that_begins_while_decoding_has_the_older_tokens_too() -> None:
    from transformers import DynamicCache

    model = make_llama(num_hidden_layers=1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        ids = decode_on(model, cache, prompt(), 1)
        with attnprof.trace(samples_per_second=0) as tracer:
            decode_on(model, cache, ids, 2)
    frame = tracer.run.kv_cache()
    part = BATCH * KV_HEADS * HEAD_DIM * FLOAT  # K, or V, of one token
    assert frame["phase"].to_list() == ["decode"] * 2
    assert frame["tokens"].to_list() == [PROMPT + 1, PROMPT + 2]
    assert frame["growing_bytes"].to_list() == [PROMPT * part, (PROMPT + 1) * part]


def test_room_that_was_filled_before_the_trace_does_not_say_how_far() -> None:
    from transformers import StaticCache

    model, room = make_llama(attention="sdpa", num_hidden_layers=1), 20
    cache = StaticCache(config=model.config, max_cache_len=room)
    with torch.no_grad():
        ids = decode_on(model, cache, prompt(), 1)
        with attnprof.trace(samples_per_second=0) as tracer:
            decode_on(model, cache, ids, 2)
        with attnprof.trace(samples_per_second=0) as later:
            cache.reset()
            decode_on(model, cache, ids, 2)
    token = BATCH * 2 * KV_HEADS * HEAD_DIM * FLOAT
    rows = tracer.run.kv_cache().select("phase", "tokens", "held_bytes", "used_bytes").rows()
    assert rows == 2 * [("decode", None, room * token, room * token)]
    rows = later.run.kv_cache().select("phase", "tokens", "used_bytes").rows()
    assert rows == [("prefill", 1, token), ("decode", 2, 2 * token)]


def test_frozen_model_decodes_without_no_grad_as_with_it() -> None:
    from transformers import DynamicCache

    model = make_llama(num_hidden_layers=1).requires_grad_(False)
    watch = Watch(model)
    with attnprof.trace(samples_per_second=0) as tracer:
        decode_on(model, DynamicCache(config=model.config), prompt(), NEW)
    assert held_by_forward(tracer.run) == [h.held_bytes for h in watch.holdings]
    assert list_phases(tracer.run) == ONE_ANSWER
    assert not tracer.run.allocations["saved"].any()


def test_cache_that_another_thread_fills_is_seen() -> None:
    watch = Watch(model := make_llama())
    kept = []
    with attnprof.trace(samples_per_second=0) as tracer:
        worker = threading.Thread(target=lambda: kept.append(answer(model)))
        worker.start()
        worker.join()
    assert held_by_forward(tracer.run) == [h.held_bytes for h in watch.holdings]
    assert list_phases(tracer.run) == ONE_ANSWER


def test_prompt_without_tokens_holds_nothing_until_there_are_some() -> None:
    model = Model(concatenate).eval()
    truth: list[Holding] = []
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        past: list[Any] = [None] * LAYERS
        for tokens in (0, 1, 1):
            _output, past = model(embed(tokens), past, 0)
            truth.append(measure(past))
    assert held_by_forward(tracer.run) == [h.held_bytes for h in truth if h.held_bytes]


def test_assisted_decoding_has_two_caches_and_crops_them() -> None:
    model, assistant = make_llama(), make_llama(num_hidden_layers=1)
    truth: list[tuple[str, int]] = []
    for name, one in (("main", model), ("assistant", assistant)):
        watch = Watch(one)
        one.register_forward_hook(
            lambda *_, name=name, watch=watch: truth.append((name, watch.holdings[-1].held_bytes))
        )
    run, _truth, _output = generate(model, prompt(batch=1), assistant_model=assistant)
    # Both classes are one: the second path is told by the model's number of layers.
    frame = run.kv_cache()
    paths = frame.group_by("layer").len().filter(pl.col("layer").str.contains(r"layers\.1\."))
    main = paths["layer"].str.replace(r"layers\.1\..*", "")[0]
    of_main = pl.col("layer").str.starts_with(main + "layers")
    for number, (name, held) in enumerate(truth):
        rows = frame.filter(
            (pl.col("forward") == number) & (of_main if name == "main" else ~of_main)
        )
        assert rows["held_bytes"].sum() == held, (number, name)


class Remembering(nn.Module):
    """Keeps K and V, or a running state, as attributes of its own."""

    def __init__(self, *, is_state: bool) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.is_state = is_state
        self.kept: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for part in self.project(x).chunk(3, -1)
        )
        mixed = self.scan(query, key, value) if self.is_state else self.attend(query, key, value)
        return x + self.out(mixed.transpose(1, 2).flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        new = (key.contiguous(), value.contiguous())
        pairs = zip(self.kept, new, strict=True) if self.kept else ()
        self.kept = tuple(torch.cat(pair, 2) for pair in pairs) or new
        key, value = self.kept
        return (query @ key.transpose(-1, -2) / HEAD_DIM**0.5).softmax(-1) @ value

    def scan(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        state = self.kept[0] if self.kept else torch.zeros(BATCH, HEADS, HEAD_DIM, HEAD_DIM)
        outputs = []
        for t in range(query.shape[2]):
            state = 0.9 * state + key[:, :, t, :, None] * value[:, :, t, None, :]
            outputs.append((query[:, :, t, :, None] * state).sum(-2))
        self.kept = (state,)
        return torch.stack(outputs, 2)


@pytest.mark.parametrize(("is_state", "kind"), [(False, "grown"), (True, "state")])
def test_what_modules_keep_as_attributes_is_theirs(is_state: bool, kind: str) -> None:
    model = nn.Sequential(*(Remembering(is_state=is_state) for _ in range(LAYERS))).eval()
    truth = []
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        output = embed()
        for _ in range(NEW):
            output = model(output)[:, -1:]
            truth.append(measure([layer.kept for layer in model]))
    assert held_by_forward(tracer.run) == [h.held_bytes for h in truth]
    assert set(tracer.run.kv_cache()["kind"]) == {kind}
    assert list_phases(tracer.run) == ONE_ANSWER


def test_states_that_transformers_keeps_as_attributes_are_found() -> None:
    model = build(
        "RecurrentGemmaForCausalLM", **SIZES, lru_width=WIDTH, attention_window_size=16,
        conv1d_width=4, block_types=["recurrent", "attention"],
    )  # fmt: skip
    truth = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        kept = [
            value
            for name, layer in module.named_modules()
            for key, value in vars(layer).items()
            if isinstance(value, Tensor) and "state" in key
        ]
        truth.append(measure(kept).held_bytes)

    model.register_forward_hook(look)
    run, _truth, _output = generate(model)
    states = run.kv_cache().filter(pl.col("category") == "recurrent_state")
    assert (
        states.group_by("forward")
        .agg(pl.col("held_bytes").sum())
        .sort("forward")["held_bytes"]
        .to_list()
        == truth
    )
    recurrence, convolution = BATCH * WIDTH * FLOAT, BATCH * WIDTH * 3 * FLOAT
    assert truth[0] == recurrence + convolution


def test_one_cache_is_followed_through_moves_and_stays_with_its_layers() -> None:
    """Moves are copies to another storage; here to a fresh one on the same device."""
    model = Model(concatenate).eval()
    truth = []
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        output, past = embed(), [None] * LAYERS
        for _ in range(NEW):
            output, past = model(output[:, -1:] if past[0] else output, past, 0)
            past = [tuple(part.to("cpu", copy=True) for part in own) for own in past]
            truth.append(measure(past))
    assert held_by_forward(tracer.run) == [h.held_bytes for h in truth]
    assert set(tracer.run.kv_cache()["layer"]) == {f"layers.{n}" for n in range(LAYERS)}


class Exposing(nn.Module):
    """Attention that leaves its last K and V where a tool can look at them; nothing reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.project(x).chunk(3, -1)
        self.last = keys, values
        mixed: Tensor = (queries @ keys.mT).softmax(-1) @ values
        return mixed


def test_keys_that_no_later_forward_reads_are_not_those_of_another_sequence() -> None:
    layer = Exposing()
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        for _ in range(3):
            layer(torch.randn(2, 9, 16))
    assert tracer.run.kv_cache()["kind"].to_list() == ["grown"] * 3
