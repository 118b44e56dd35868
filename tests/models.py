"""Small real models, built from configurations with random weights: no network, few seconds.

Each builder returns a `Case`: a model, and the keyword arguments of one forward. Sizes differ in
every dimension, so that a count of bytes can only come out right for the right reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH = 2
LENGTH = 24
VOCABULARY = 61


@dataclass
class Case:
    """A model and what it is called with."""

    model: nn.Module
    inputs: dict[str, Any]

    def loss(self) -> Tensor:
        """Run one forward and return its loss."""
        return loss_of(self.model(**self.inputs))

    def train(self) -> float:
        """Run one forward and one backward; gradients stay in ``.grad``."""
        loss = self.loss()
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def infer(self) -> None:
        """Run one forward without gradients and drop its result."""
        self.model(**self.inputs)

    def tensors(self) -> list[Tensor]:
        """Return parameters, buffers and inputs."""
        inputs = [value for value in self.inputs.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *inputs]


def loss_of(output: Any) -> Tensor:
    """Return a model's loss: its output, the loss in it, or its first tensor's mean square."""
    if isinstance(output, Tensor):
        return output.float().square().mean() if output.dim() else output
    loss = getattr(output, "loss", None)
    return loss if loss is not None else output[0].float().square().mean()


def storage_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of the distinct storages of ``tensors``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def tokens(*, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Return random token numbers of shape (B, n)."""
    return torch.randint(0, VOCABULARY, (batch, length))


def _language(model: nn.Module) -> Case:
    ids = tokens()
    return Case(model.train(), {"input_ids": ids, "labels": ids, "use_cache": False})


def make_gpt2(attention: str = "eager", *, dropout: float = 0.0) -> Case:
    """GPT-2: learned positions, a fused QKV projection, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
        attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
        bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    return _language(GPT2LMHeadModel(config))


def make_llama(attention: str = "eager") -> Case:
    """Llama with grouped queries: rotary positions, 4 heads on 2 key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attn_implementation=attention,
    )  # fmt: skip
    return _language(LlamaForCausalLM(config))


def make_bert() -> Case:
    """BERT with its dropout left on."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=56, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    ids = tokens()
    return Case(BertForMaskedLM(config).train(), {"input_ids": ids, "labels": ids})


def make_t5() -> Case:
    """T5: an encoder and a decoder, relative positions, cross attention, dropout on."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": tokens(), "labels": tokens(length=10), "use_cache": False}
    return Case(T5ForConditionalGeneration(config).train(), inputs)


def make_vit() -> Case:
    """ViT: a convolution cuts the image into patches."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        image_size=32, patch_size=8, num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.arange(BATCH)}
    return Case(ViTForImageClassification(config).train(), inputs)


def make_mamba() -> Case:
    """Mamba: no attention; a state-space scan, token by token on the CPU."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, use_cache=False
    )
    return _language(MambaForCausalLM(config))


def make_torch_encoder() -> Case:
    """PyTorch's own encoder, trained with dropout."""
    layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=56, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    return Case(model.train(), {"src": torch.randn(BATCH, LENGTH, 32)})


class NanoBlock(nn.Module):
    """The block everyone writes: layer norm, attention by hand, MLP."""

    def __init__(self, width: int = 32, heads: int = 4, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(x).split(width, dim=-1))
        scores = q @ k.transpose(-2, -1) / split[-1] ** 0.5  # (B, H, n, n)
        past = torch.ones(length, length, dtype=torch.bool).tril()
        weights = self.dropout(functional.softmax(scores.masked_fill(~past, -torch.inf), dim=-1))
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first_norm(x))
        return x + self.mlp(self.second_norm(x))


class NanoGPT(nn.Module):
    """A stack of `NanoBlock`, with or without gradient checkpointing."""

    def __init__(
        self, *, layers: int = 2, dropout: float = 0.0, checkpoint: str | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(NanoBlock(dropout=dropout) for _ in range(layers))
        self.head = nn.Linear(32, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.checkpoint = checkpoint
        """None, ``"reentrant"`` or ``"non-reentrant"``."""

    def forward(self, ids: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = self.embed(ids)
        for block in self.blocks:
            if self.checkpoint is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpoint == "reentrant")
        logits = self.head(x)  # (B, n, vocabulary)
        return functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def make_nano(*, dropout: float = 0.0, checkpoint: str | None = None) -> Case:
    """Return a hand-written GPT; its forward is its loss."""
    return Case(NanoGPT(dropout=dropout, checkpoint=checkpoint).train(), {"ids": tokens()})


CASES: dict[str, Callable[[], Case]] = {
    "gpt2-eager": lambda: make_gpt2("eager"),
    "gpt2-sdpa": lambda: make_gpt2("sdpa"),
    "llama-eager": lambda: make_llama("eager"),
    "llama-sdpa": lambda: make_llama("sdpa"),
    "bert": make_bert,
    "t5": make_t5,
    "vit": make_vit,
    "mamba": make_mamba,
    "torch-encoder": make_torch_encoder,
    "nano": make_nano,
}
