"""How many sequences keys are from: a model need not be given first what a layer works on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.esm.configuration_esm import TrunkConfig
from transformers.models.esm.modeling_esmfold import EsmFoldTriangularSelfAttentionBlock

import attnprof

WIDTH, HEADS, TOKENS = 60, 5, 22
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 70, "num_attention_heads": HEADS,
    "num_hidden_layers": 1, "vocab_size": 101,
}  # fmt: skip
IMAGES: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4}


def list_rows(model: nn.Module, **inputs: Tensor) -> list[tuple[object, ...]]:
    with attnprof.trace(samples_per_second=0) as tracer:
        output = model(**inputs)
        first = output if isinstance(output, Tensor) else output[0]
        first.float().square().mean().backward()
    columns = ("layer", "kind", "batch", "heads", "q_len", "k_len")
    return tracer.run.layers().select(columns).rows()


def test_towers_have_batches_of_their_own() -> None:
    config = transformers.CLIPConfig(
        text_config=SIZES | {"max_position_embeddings": 30}, vision_config=IMAGES, projection_dim=7
    )
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager")
    rows = list_rows(
        model, input_ids=torch.randint(3, 101, (7, 9)), pixel_values=torch.randn(2, 3, 16, 16)
    )
    assert [row[1:] for row in rows] == [
        ("materialised", 2, HEADS, 17, 17),
        ("materialised", 7, HEADS, 9, 9),
    ]


def test_choices_are_sequences() -> None:
    config = transformers.BertConfig(**SIZES)
    model = transformers.BertForMultipleChoice._from_config(config, attn_implementation="eager")
    (row,) = list_rows(model, input_ids=torch.randint(3, 101, (3, 4, TOKENS)))
    assert row[1:] == ("materialised", 12, HEADS, TOKENS, TOKENS)


class ByImage(nn.Module):
    """A ViT over every image of a sample, whose tokens meet those of no other image."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.ViTConfig(**IMAGES)
        self.vision = transformers.ViTModel._from_config(config, attn_implementation="eager")

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.vision(images.flatten(0, 1)).last_hidden_state
        return hidden


def test_images_of_a_sample_are_sequences() -> None:
    (row,) = list_rows(ByImage(), images=torch.randn(2, 5, 3, 16, 16))
    assert row[1:] == ("materialised", 10, HEADS, 17, 17)


class Attention(nn.Module):
    """Attention with a bias to its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        parts = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (parts[0] @ parts[1].mT + bias).softmax(-1)
        return (weights @ parts[2]).transpose(1, 2).flatten(2)


class Views(nn.Module):
    """Two views of a batch put together, as for contrastive losses and guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(torch.cat([x, -x]))
        return mixed


def test_views_are_sequences() -> None:
    (row,) = list_rows(Views(), x=torch.randn(3, TOKENS, WIDTH))
    assert row[1:] == ("materialised", 6, HEADS, TOKENS, TOKENS)


class LearnedQueries(nn.Module):
    """Queries that are a parameter, repeated for every sequence; tokens first, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.queries = nn.Linear(11, WIDTH), nn.Parameter(torch.randn(7, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.project(x).transpose(0, 1)
        queries = self.queries[:, None].repeat(1, len(x), 1)
        mixed: Tensor = self.attention(queries, keys, keys)[0]
        return mixed


def test_repeated_queries_do_not_hide_the_batch() -> None:
    (row,) = list_rows(LearnedQueries(), x=torch.randn(3, TOKENS, 11))
    assert row[1:] == ("materialised", 3, HEADS, 7, TOKENS)


class SharedBias(nn.Module):
    """Products of tokens with tokens, made once and added to the scores of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(WIDTH, 6)
        self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        bias = (features @ features.mT)[:, None]
        for layer in self.layers:
            x = x + layer(x, bias)
        return x


def test_bias_that_a_model_makes_for_all_layers_is_a_mask() -> None:
    with attnprof.trace(samples_per_second=0) as tracer:
        SharedBias()(torch.randn(3, TOKENS, WIDTH)).square().mean().backward()
    frame = tracer.run.layers()
    assert frame["layer"].to_list() == ["layers.0", "layers.1"]
    assert frame["head_dim"].to_list() == [WIDTH // HEADS] * 2
    assert set(frame["softmax_bytes"]) == {4 * 3 * HEADS * TOKENS * TOKENS}


class Trunk(nn.Module):
    """Blocks of ESMFold: attention over residues and over pairs, and updates of pairs by pairs."""

    def __init__(self) -> None:
        super().__init__()
        config = TrunkConfig(
            sequence_state_dim=40, pairwise_state_dim=24, sequence_head_width=10,
            pairwise_head_width=8, dropout=0.0,
        )  # fmt: skip
        self.residues, self.pairs = nn.Linear(5, 40), nn.Linear(6, 24)
        blocks = [EsmFoldTriangularSelfAttentionBlock(config) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x, z = self.residues(x), self.pairs(z)
        for block in self.blocks:
            x, z = block(x, z)
        return torch.cat([x.flatten(), z.flatten()])


def test_a_residual_stream_of_pairs_keeps_layers_apart() -> None:
    rows = list_rows(Trunk(), x=torch.randn(2, 13, 5), z=torch.randn(2, 13, 13, 6))
    assert [row[0] for row in rows] == [
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("seq_attention", "tri_att_start.mha", "tri_att_end.mha")
    ]
    assert {row[1:] for row in rows if "tri" not in str(row[0])} == {("materialised", 2, 4, 13, 13)}


@pytest.mark.parametrize("frames", [4, 5], ids=["a divisor of the patches", "no divisor of them"])
def test_frames_that_other_layers_attend_across_are_no_sequences(frames: int) -> None:
    config = transformers.TimesformerConfig(**IMAGES, num_frames=frames)
    model = transformers.TimesformerModel(config)
    rows = list_rows(model, pixel_values=torch.randn(2, frames, 3, 16, 16))
    assert sorted(row[1:] for row in rows) == [
        ("banded", 2 * frames, HEADS, 17, 17),
        ("banded", 32, HEADS, frames, frames),
    ]


class SummedUp(nn.Module):
    """Linear attention that keeps the sum of keys times values, over all tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, past: Tensor | float) -> tuple[Tensor, Tensor]:
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1)
        )
        state = past + k.exp().mT @ v
        return (q.exp() @ state).transpose(1, 2).flatten(2), state


class Recurrence(nn.Module):
    """A language model of one such layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = (
            nn.Embedding(31, WIDTH),
            SummedUp(),
            nn.Linear(WIDTH, 31),
        )

    def forward(self, ids: Tensor, past: Tensor | float) -> tuple[Tensor, Tensor]:
        mixed, past = self.layer(self.embed(ids), past)
        return self.head(mixed[:, -1:]).argmax(-1), past


def test_sums_of_keys_and_values_are_kept_while_decoding() -> None:
    model, past = Recurrence(), 0.0
    ids = torch.randint(31, (2, 13))
    with attnprof.trace(samples_per_second=0) as tracer, torch.no_grad():
        for _ in range(4):
            ids, past = model(ids, past)
    frame = tracer.run.kv_cache()
    assert frame["phase"].to_list() == ["prefill", "decode", "decode", "decode"]
    assert set(frame["kind"]) == {"state"}


class Stem(nn.Module):
    """Attention over what ``stem`` makes of the data; within windows of so many tokens, if any."""

    def __init__(self, stem: Callable[["Stem", Tensor], Tensor], window: int) -> None:
        super().__init__()
        self.stem, self.window = stem, window
        self.embed, self.project, self.attention = (
            nn.Embedding(31, WIDTH), nn.Linear(48, WIDTH), Attention()
        )  # fmt: skip
        self.mix, self.join = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, data: Tensor) -> Tensor:
        x = self.stem(self, data)
        mixed: Tensor = self.attention(x.reshape(-1, self.window, WIDTH) if self.window else x)
        return mixed


def share_an_image(layer: Stem, ids: Tensor) -> Tensor:
    image = layer.project(torch.ones(1, 70, 48)).expand(len(ids), -1, -1)
    return torch.cat([image, layer.embed(ids)], 1)


def draw_several(layer: Stem, ids: Tensor) -> Tensor:
    return layer.embed(ids).repeat(4, 1, 1)


def draw_each_thrice(layer: Stem, ids: Tensor) -> Tensor:
    return layer.embed(ids).repeat_interleave(3, 0)


def draw_each_token_thrice(layer: Stem, ids: Tensor) -> Tensor:
    return layer.embed(ids).repeat_interleave(3, 1)


def repeat_prompts(layer: Stem, ids: Tensor) -> Tensor:
    return layer.embed(ids).repeat(1, 3, 1).view(3 * len(ids), -1, WIDTH)


def stack_prompts(layer: Stem, ids: Tensor) -> Tensor:
    return torch.stack([layer.embed(ids)] * 3, 1).flatten(0, 1)


def stack_windows(layer: Stem, ids: Tensor) -> Tensor:
    return torch.stack(layer.embed(ids).split(8, 1), 1).flatten(0, 1)


def take_neighbours(layer: Stem, ids: Tensor) -> Tensor:
    x = layer.embed(ids)
    nearest = torch.cdist(x, x).topk(6, largest=False).indices[..., None].expand(-1, -1, -1, WIDTH)
    near = torch.gather(x[:, None].expand(-1, x.shape[1], -1, -1), 2, nearest)
    return layer.mix(near).flatten(0, 1)


def put_pairs(layer: Stem, ids: Tensor) -> Tensor:
    x = layer.embed(ids)
    tokens = x.shape[1]
    sides = x[:, None].expand(-1, tokens, -1, -1), x[:, :, None].expand(-1, -1, tokens, -1)
    return layer.join(torch.cat(sides, -1)).flatten(0, 1)


def choose(layer: Stem, ids: Tensor) -> Tensor:
    return layer.embed(ids)[torch.tensor([0, 0, 2, 1, 3, 3, 2, 0])]


def add_one(layer: Stem, ids: Tensor) -> Tensor:
    return torch.cat([layer.embed(ids), layer.embed(ids[:1])])


def add_to_each_of_five(layer: Stem, ids: Tensor) -> Tensor:
    return layer.embed(ids[:1]) + layer.project(torch.ones(5, 1, 48))


def put_together(layer: Stem, ids: Tensor) -> Tensor:
    return torch.cat([layer.embed(ids), layer.embed(30 - ids)])


def cut_up(layer: Stem, ids: Tensor) -> Tensor:
    return torch.cat(layer.embed(ids).split(8, 1))


def sum_codebooks(layer: Stem, codes: Tensor) -> Tensor:
    return layer.embed(codes).sum(2)


def make_waves(layer: Stem, points: Tensor) -> Tensor:
    return layer.project((points[..., None] * torch.arange(16)).sin().flatten(2))


@pytest.mark.parametrize(
    ("stem", "window", "data", "row"),
    [
        (share_an_image, 0, torch.randint(31, (4, 6)), ("materialised", 4, HEADS, 76, 76)),
        (draw_several, 0, torch.randint(31, (4, 64)), ("materialised", 16, HEADS, 64, 64)),
        (draw_each_thrice, 0, torch.randint(31, (4, 64)), ("materialised", 12, HEADS, 64, 64)),
        (draw_each_thrice, 8, torch.randint(31, (4, 64)), ("banded", 96, HEADS, 8, 8)),
        (draw_each_token_thrice, 64, torch.randint(31, (4, 64)), ("banded", 12, HEADS, 64, 64)),
        (repeat_prompts, 0, torch.randint(31, (4, 64)), ("materialised", 12, HEADS, 64, 64)),
        (stack_prompts, 0, torch.randint(31, (4, 64)), ("materialised", 12, HEADS, 64, 64)),
        (stack_windows, 0, torch.randint(31, (4, 64)), ("banded", 32, HEADS, 8, 8)),
        (take_neighbours, 0, torch.randint(31, (4, 20)), ("banded", 80, HEADS, 6, 6)),
        (put_pairs, 0, torch.randint(31, (4, 7)), ("banded", 28, HEADS, 7, 7)),
        (cut_up, 0, torch.randint(31, (1, 64)), ("banded", 8, HEADS, 8, 8)),
        (choose, 0, torch.randint(31, (4, 64)), ("materialised", 8, HEADS, 64, 64)),
        (add_one, 0, torch.randint(31, (4, 64)), ("materialised", 5, HEADS, 64, 64)),
        (add_to_each_of_five, 0, torch.randint(31, (4, 64)), ("materialised", 5, HEADS, 64, 64)),
        (put_together, 0, torch.randint(31, (4, 64)), ("materialised", 8, HEADS, 64, 64)),
        (cut_up, 0, torch.randint(31, (4, 64)), ("banded", 32, HEADS, 8, 8)),
        (sum_codebooks, 8, torch.randint(31, (4, 64, 3)), ("banded", 32, HEADS, 8, 8)),
        (make_waves, 8, torch.randn(4, 64, 3), ("banded", 32, HEADS, 8, 8)),
    ],
)
def test_what_is_repeated_is_more_sequences_and_what_is_wider_is_not(
    stem: Callable[[Stem, Tensor], Tensor], window: int, data: Tensor, row: tuple[object, ...]
) -> None:
    (found,) = list_rows(Stem(stem, window), data=data)
    assert found[1:] == row
