"""Caches without any class: what a program keeps from one forward to the next, and when it lets go.

Every store is given what the layer kept and the new K and V, (B, H, T, D); it returns what to keep
and the K and V to attend to.
"""

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import attnprof
from attnprof.run import Run
from tests.attribution.cache_programs import (
    BATCH,
    FLOAT,
    HEAD_DIM,
    HEADS,
    LAYERS,
    NEW,
    PROMPT,
    WIDTH,
    Holding,
    held_by_forward,
    measure,
    reachable_by_forward,
)

Store = Callable[[Any, Tensor, Tensor, int], tuple[Any, Tensor, Tensor]]
TOKEN = BATCH * WIDTH * FLOAT
"""Bytes of K, or of V, of one token of every sequence."""
ROOM = 24
SHORT = 4
"""Tokens that `drop_older` keeps."""


class Layer(nn.Module):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Any, start: int) -> tuple[Tensor, Any]:
        query, key, value = (
            part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for part in self.project(x).chunk(3, -1)
        )
        past, key, value = self.store(past, key, value, start)
        weights = (query @ key.transpose(-1, -2) / HEAD_DIM**0.5).softmax(-1)
        return x + self.out((weights @ value).transpose(1, 2).flatten(2)), past


class Model(nn.Module):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(store) for _ in range(LAYERS))

    def forward(self, x: Tensor, past: list[Any], start: int) -> tuple[Tensor, list[Any]]:
        kept = []
        for layer, own in zip(self.layers, past, strict=True):
            x, own = layer(x, own, start)
            kept.append(own)
        return x, kept


def concatenate(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    if past is not None:
        key, value = (torch.cat(pair, 2) for pair in zip(past, (key, value), strict=True))
    else:
        key, value = key.contiguous(), value.contiguous()
    return (key, value), key, value


def keep_views(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    """Keep K and V of a prompt as they are, views of what was projected, and Q with them."""
    if past is not None:
        return concatenate(past, key, value, start)
    return (key, value), key, value


def stack_presents(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    """Keep K and V as one tensor, as OpenAI's GPT-2 did."""
    if past is not None:
        key, value = (torch.cat(pair, 2) for pair in zip(past[0], (key, value), strict=True))
    return [torch.stack([key, value])], key, value


def write_slice(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    end = start + key.shape[2]
    past[0][:, :, start:end], past[1][:, :, start:end] = key, value
    return past, past[0][:, :, :end], past[1][:, :, :end]


def store_fp8(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    new = [part.to(torch.float8_e4m3fn) for part in (key, value)]
    # float8 has no kernel for cat on the CPU; its bytes have.
    kept = [
        torch.cat([old.view(torch.uint8), part.view(torch.uint8)], 2).view(torch.float8_e4m3fn)
        for old, part in zip(past, new, strict=True)
    ] if past is not None else new  # fmt: skip
    return kept, kept[0].to(torch.float32), kept[1].to(torch.float32)


def store_int8(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    new = []
    for part in (key, value):
        scale = part.abs().amax(-1, keepdim=True) / 127
        new.append(((part / scale).round().to(torch.int8), scale))
    if past is not None:
        new = [
            (torch.cat([old[0], part[0]], 2), torch.cat([old[1], part[1]], 2))
            for old, part in zip(past, new, strict=True)
        ]
    key, value = (packed * scale for packed, scale in new)
    return new, key, value


def store_int4(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    """Pack two numbers into a byte, one after the other into a new one, and all anew each time."""
    if past is not None:
        older = [_unpack(*part) for part in past]
        key, value = (torch.cat(pair, 2) for pair in zip(older, (key, value), strict=True))
    kept = []
    for part in (key, value):
        least, most = part.aminmax(dim=-1, keepdim=True)
        scale = (most - least) / 15
        levels = ((part - least) / scale).round().to(torch.uint8)
        packed = torch.zeros_like(levels[..., ::2])
        packed |= levels[..., ::2]
        packed |= levels[..., 1::2] << 4
        kept.append((packed, scale, least))
    return kept, key, value


def _unpack(packed: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    levels = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return levels * scale + least


def offload(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    """Fetch, extend, attend, and send back; the copies stand for moves between devices."""
    if past is not None:
        fetched = [part.to("cpu", copy=True) for part in past]
        key, value = (torch.cat(pair, 2) for pair in zip(fetched, (key, value), strict=True))
    return [part.to("cpu", copy=True) for part in (key, value)], key, value


def drop_older(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    """Attend to all, and keep the first token and the last ones."""
    _past, key, value = concatenate(past, key, value, start)
    kept = [torch.cat([part[:, :, :1], part[:, :, 1 - SHORT :]], 2) for part in (key, value)]
    return kept, key, value


def store_half(past: Any, key: Tensor, value: Tensor, start: int) -> tuple[Any, Tensor, Tensor]:
    kept, _key, _value = concatenate(past, key.bfloat16(), value.bfloat16(), start)
    return kept, kept[0].float(), kept[1].float()


def embed(tokens: int = PROMPT) -> Tensor:
    return torch.randn(BATCH, tokens, WIDTH)


def make_room() -> list[Any]:
    return [tuple(torch.zeros(BATCH, HEADS, ROOM, HEAD_DIM) for _ in "kv") for _ in range(LAYERS)]


def decode(
    store: Store,
    past: list[Any] | None = None,
    *,
    between: Callable[[list[Any]], Any] | None = None,
) -> tuple[Run, list[Holding]]:
    """Trace a prompt and single tokens; return the run and what was held after each forward."""
    model = Model(store).eval()
    past = [None] * LAYERS if past is None else past
    truth = []
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        output = embed()
        start = 0
        for _ in range(NEW):
            tokens = output[:, -1:] if start else output
            output, past = model(tokens, past, start)
            truth.append(measure(past))
            start += tokens.shape[1]
            if between is not None:
                past = between(past)
    return tracer.run, truth


@pytest.mark.parametrize(
    ("store", "room", "kind"),
    [
        (concatenate, None, "grown"),
        (keep_views, None, "grown"),
        (stack_presents, None, "grown"),
        (write_slice, make_room, "preallocated"),
        (store_fp8, None, "quantised"),
        (store_int8, None, "quantised"),
        (store_int4, None, "quantised"),
        (offload, None, "grown"),
    ],
)
def test_held_bytes_are_what_the_program_keeps(
    store: Store, room: Callable[[], list[Any]] | None, kind: str
) -> None:
    run, truth = decode(store, room() if room else None)
    assert held_by_forward(run) == [h.held_bytes for h in truth]
    assert reachable_by_forward(run) == [h.reachable_bytes for h in truth]
    frame = run.kv_cache()
    assert set(frame["kind"]) == {kind}
    assert frame.filter(pl.col("layer") == "layers.0")["tokens"].to_list() == list(
        range(PROMPT, PROMPT + NEW)
    )
    if kind != "preallocated":  # all that is kept is full of tokens
        assert frame["used_bytes"].to_list() == frame["reachable_bytes"].to_list()


def test_slices_of_a_room_say_how_much_of_it_is_used() -> None:
    run, _truth = decode(write_slice, make_room())
    rows = run.kv_cache().filter(pl.col("layer") == "layers.1")
    assert rows["used_bytes"].to_list() == [2 * n * TOKEN for n in range(PROMPT, PROMPT + NEW)]
    assert set(rows["held_bytes"]) == {2 * ROOM * TOKEN}


@pytest.mark.parametrize(
    ("store", "bytes_per_number"), [(store_fp8, 1), (concatenate, FLOAT), (keep_views, FLOAT)]
)
def test_bytes_per_token_follow_the_dtype_that_is_kept(store: Store, bytes_per_number: int) -> None:
    run, _truth = decode(store)
    assert set(run.kv_cache()["bytes_per_token"]) == {2 * WIDTH * bytes_per_number}


@pytest.mark.parametrize(
    ("store", "bytes_per_token"),
    [
        (concatenate, 2 * WIDTH * FLOAT),
        (offload, 2 * WIDTH * FLOAT),
        (store_fp8, 2 * WIDTH),
        (store_int8, 2 * HEADS * (HEAD_DIM + FLOAT)),
    ],
)
def test_bytes_per_token_are_those_of_the_newer_cache_where_the_older_one_is_held_too(
    store: Store, bytes_per_token: int
) -> None:
    model = Model(store).eval()
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        _output, past = model(embed(), [None] * LAYERS, 0)
        for accepted in range(PROMPT, PROMPT + NEW):
            _output, new = model(embed(3), past, accepted)  # drafted tokens, verified together
            past = crop(new, accepted + 1)
            torch.ones(1).add(1)
    frame = tracer.run.kv_cache()
    assert frame["held_bytes"][-1] > 1.5 * frame["tokens"][-1] * BATCH * bytes_per_token
    assert set(frame["bytes_per_token"]) == {bytes_per_token}


def crop(kept: Any, tokens: int) -> Any:
    """Return views of the first tokens of all tensors in a cache."""
    if isinstance(kept, Tensor):
        return kept[:, :, :tokens]
    return [crop(part, tokens) for part in kept]


def test_tokens_that_were_attended_to_and_dropped_are_not_counted() -> None:
    run, truth = decode(drop_older)
    assert held_by_forward(run) == [h.held_bytes for h in truth]
    assert set(run.kv_cache()["tokens"]) == {SHORT}
    assert set(run.kv_cache()["bytes_per_token"]) == {2 * WIDTH * FLOAT}


def test_heads_are_those_that_are_kept_in_a_shorter_dtype() -> None:
    run, _truth = decode(store_half)
    assert set(run.kv_cache().select("dtype", "kv_heads").rows()) == {("bfloat16", HEADS)}


def test_dequantised_copies_are_transient() -> None:
    run, _truth = decode(store_fp8)
    for row in run.kv_cache().iter_rows(named=True):
        assert row["expanded_bytes"] >= 2 * row["tokens"] * TOKEN


def test_crop_by_slice_reaches_less_and_crop_by_copy_holds_less() -> None:
    def crop(past: list[Any]) -> list[Any]:
        return [tuple(part[:, :, :-1] for part in own) for own in past]

    def crop_and_copy(past: list[Any]) -> list[Any]:
        return [tuple(part[:, :, :-1].clone() for part in own) for own in past]

    for between in (crop, crop_and_copy):
        run, truth = decode(concatenate, between=between)
        assert held_by_forward(run) == [h.held_bytes for h in truth]
        tokens = run.kv_cache().filter(pl.col("layer") == "layers.0")["tokens"].to_list()
        assert tokens == [PROMPT] * NEW  # one is cropped after each forward


def test_room_that_is_cleared_counts_from_nothing_again() -> None:
    def attend_to_all(past: Any, key: Tensor, value: Tensor, start: int) -> Any:
        start %= 9
        where = torch.arange(start, start + key.shape[2])
        for part, new in zip(past, (key, value), strict=True):
            part.index_copy_(2, where, new)
        return past, past[0], past[1]

    forwards = 0

    def clear_once(past: list[Any]) -> list[Any]:
        nonlocal forwards
        forwards += 1
        for part in (part for own in past if forwards == 2 for part in own):
            part.zero_()
        return past

    run, _truth = decode(attend_to_all, make_room(), between=clear_once)
    tokens = run.kv_cache().filter(pl.col("layer") == "layers.0")["tokens"].to_list()
    assert tokens == [PROMPT, PROMPT + 1, 1, 2, 3]


def test_cache_dropped_before_the_trace_ends_has_no_rows_after_that() -> None:
    model = Model(concatenate).eval()
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        for _conversation in range(2):
            output, past = model(embed(), [None] * LAYERS, 0)
            output, past = model(output[:, -1:], past, PROMPT)
            output.argmax()
            del past
        nn.Linear(WIDTH, 1)(output)
    one, two = (LAYERS * 2 * tokens * TOKEN for tokens in (PROMPT, PROMPT + 1))
    assert held_by_forward(tracer.run) == [one, two, one, two]
    forwards = tracer.run.kv_cache().group_by("forward", maintain_order=True).first()
    assert forwards["phase"].to_list() == ["prefill", "decode", "prefill", "decode"]


def test_keys_and_values_that_nobody_keeps_are_no_cache() -> None:
    model = Model(concatenate).eval()
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        for _ in range(2):
            model(embed(), [None] * LAYERS, 0)
    assert tracer.run.kv_cache().is_empty()


def test_caller_that_hands_the_old_cache_in_holds_both_until_it_returns() -> None:
    run, _truth = decode(concatenate)
    for row in run.kv_cache().filter(pl.col("phase") == "decode").iter_rows(named=True):
        assert row["growing_bytes"] == 2 * (row["tokens"] - 1) * TOKEN


def test_tagged_memory_of_an_engine_is_told_by_its_layer() -> None:
    pool = torch.zeros(3, 5)
    model = Model(concatenate).eval()
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        attnprof.tag(pool, "kv_cache", layer="engine")
        _output, _past = model(embed(), [None] * LAYERS, 0)
    rows = tracer.run.kv_cache().filter(pl.col("layer") == "engine")
    assert rows["held_bytes"].to_list() == [pool.numel() * FLOAT]


def test_training_holds_no_cache() -> None:
    model = Model(concatenate)
    with attnprof.trace(samples_per_second=0) as tracer:
        output, _past = model(embed(1), [None] * LAYERS, 0)  # one query is no decoding
        output.square().mean().backward()
    assert tracer.run.kv_cache().is_empty()
    assert "decode" not in tracer.run.allocations["phase"].cast(pl.String).to_list()
