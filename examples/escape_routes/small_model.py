"""The small language model that the escape routes share: only the way tokens mix differs.

Every route is trained with the same width, heads, layers, batch and vocabulary, so that one plot
compares them. There are no position embeddings: they add nothing but terms linear in n.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import attnprof
from attnprof.units import parse_length_argument

BATCH = 2
LAYERS = 2
HEADS = 4
HEAD_DIM = 32
WIDTH = HEADS * HEAD_DIM
VOCABULARY = 256

REACH = 64
"""How many keys, projections or features a query meets in the routes that limit them."""

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From Q, K and V, each (B, H, n, D), what every token takes from the others, (B, H, n, D)."""
Step = Callable[[], None]
MakeStep = Callable[[int, str], Step]


def split_heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """Return Q, K and V, each (B, H, n, D), from (B, n, 3 × width)."""
    return qkv.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind()


def join_heads(x: Tensor) -> Tensor:
    """Return (B, n, width) from (B, H, n, D)."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Projections around the function that mixes tokens."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix = mix
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, width) -> (B, n, width)
        """Project, mix, project back."""
        q, k, v = split_heads(self.qkv(x))
        return self.out(join_heads(self.mix(q, k, v)))


class Block(nn.Module):
    """A pre-norm Transformer block around a mixer of tokens."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, n, width) -> (B, n, width)
        """Mix tokens, then channels."""
        x = x + self.mixer(self.first_norm(x))
        return x + self.mlp(self.second_norm(x))


class LanguageModel(nn.Module):
    """An embedding, the blocks, a vocabulary head and the loss."""

    def __init__(self, make_mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(make_mixer()) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # (B, n) -> ()
        """Return the loss of predicting each token's successor."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)  # (B, n, vocabulary)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def make_attention_step(mix: Mix, seq_len: int, device: str) -> Step:
    """Return a training step of `LanguageModel` whose attention is ``mix``."""
    return make_training_step(lambda: Attention(mix), seq_len, device)


def make_training_step(make_mixer: Callable[[], nn.Module], seq_len: int, device: str) -> Step:
    """Return a training step of `LanguageModel` with the mixers that ``make_mixer`` makes."""
    with torch.device(device):
        model = LanguageModel(make_mixer)
        ids = torch.randint(0, VOCABULARY, (BATCH, seq_len))

    def step() -> None:
        model(ids).backward()
        model.zero_grad()

    return step


def make_transformers_step(make_model: Callable[[], nn.Module], seq_len: int, device: str) -> Step:
    """Return a training step of a whole model from transformers, which computes its own loss."""
    with torch.device(device):
        model = make_model().train()
        ids = torch.randint(0, VOCABULARY, (BATCH, seq_len))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def show_growth(*makers: MakeStep) -> None:
    """Sweep the lengths on the command line and print by which laws memory grows."""
    parser = argparse.ArgumentParser(description="Print how a training step's memory grows.")
    parser.add_argument(
        "seq_lens", type=parse_length_argument, nargs="*", default=[256, 512, 1024], metavar="N"
    )
    seq_lens = parser.parse_args().seq_lens
    torch.set_num_threads(1)  # more would spend their time waiting: the ops are small
    for make_step in makers:
        growth = attnprof.sweep(make_step, seq_lens)
        kinds = growth.run(max(seq_lens)).layers()["kind"].to_list()
        print(f"{make_step.__name__}: {make_step.__doc__}")
        print(f"  attention layers: {', '.join(kinds) or 'none found'}")
        for category in ("total", "attention_scores", "softmax"):
            fit = growth.fit(category)
            if fit.predict(max(seq_lens)):
                print(f"  {fit.sentence}")
