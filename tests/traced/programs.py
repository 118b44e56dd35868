"""Small programs on "cuda", as they are traced: for recordings on stand-ins, and on real GPUs.

Each takes a function that traces what it is given and returns what that returned. What a program
does before it calls that function, the trace has not seen.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

Traced = Callable[[Callable[[], Any]], Any]

VOCABULARY, WIDTH, LAYERS, HEADS, BATCH, LENGTH = 300, 96, 2, 4, 3, 80
MIB = 2**20


def make_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH,
            attn_implementation="eager", use_cache=False,
        )
    )  # fmt: skip


def make_llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
            attn_implementation="sdpa", **options,
        )
    )  # fmt: skip


def make_tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, length)).cuda()


class Trainer:
    """Training steps of a model that returns logits, with AdamW."""

    def __init__(self, model: nn.Module, *, autocast: bool = False) -> None:
        self.model, self.autocast = model, autocast
        self.optimizer = torch.optim.AdamW(model.parameters())
        self.tokens = make_tokens()

    def step(self) -> None:
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            logits = self.model(self.tokens)
            logits = getattr(logits, "logits", logits)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, count: int = 2) -> None:
        for _ in range(count):
            self.step()


def gpt2(traced: Traced) -> None:
    traced(Trainer(make_gpt2().cuda()).steps)


def gpt2_autocast(traced: Traced) -> None:
    traced(Trainer(make_gpt2().cuda(), autocast=True).steps)


def gqa(traced: Traced) -> None:
    traced(Trainer(make_llama(use_cache=False).cuda()).steps)


def gqa_autocast(traced: Traced) -> None:
    traced(Trainer(make_llama(use_cache=False).cuda(), autocast=True).steps)


def warmed_up(traced: Traced) -> None:
    """Gradients and optimizer states are there when the trace begins."""
    trainer = Trainer(make_gpt2().cuda())
    trainer.steps()
    trainer.model(trainer.tokens).logits.sum().backward()
    traced(trainer.steps)


def long_loop(traced: Traced) -> None:
    """Ten steps of one length, but for the sixth, whose sequences are twice as long."""
    trainer = Trainer(make_gpt2().cuda())

    def loop() -> None:
        for number in range(10):
            trainer.tokens = make_tokens(LENGTH if number == 5 else LENGTH // 2)
            trainer.step()

    traced(loop)


def first_use(traced: Traced) -> None:
    """CUDA is used inside the trace only."""
    traced(lambda: Trainer(make_gpt2().cuda()).steps())


def decoding(traced: Traced) -> None:
    """A prompt and three tokens more, with a KV cache."""
    model, prompt = make_llama().cuda().eval(), make_tokens()
    kept = []

    @torch.no_grad()
    def decode() -> None:
        tokens, cache = prompt, None
        for _ in range(4):
            output = model(tokens, past_key_values=cache, use_cache=True)
            tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        kept.append(cache)

    traced(decode)


class Checkpointed(nn.Module):
    """Two layers with attention written out, of which each is run again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


def checkpointed(traced: Traced) -> None:
    traced(Trainer(Checkpointed().cuda()).steps)


class Sdpa(nn.Module):
    """`scaled_dot_product_attention` of 4 heads with 24 elements, and how it is called."""

    def __init__(
        self, *, kv_heads: int = HEADS, value_dim: int = WIDTH // HEADS, is_flat: bool = False,
        dtype: torch.dtype = torch.bfloat16, backend: SDPBackend | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out = nn.Linear(value_dim, WIDTH, dtype=dtype)
        self.kv_heads, self.value_dim, self.is_flat = kv_heads, value_dim, is_flat
        self.dtype, self.backend, self.options = dtype, backend, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.to(self.dtype).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k = q[:, : self.kv_heads] * 2
        v = (q[:, : self.kv_heads, :, : self.value_dim] * 3).contiguous()
        if self.is_flat:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        with sdpa_kernel(self.backend) if self.backend else nullcontext():
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, **self.options)
        return x + self.out(mixed).sum().float()


def kernels(traced: Traced) -> None:
    """Calls of scaled_dot_product_attention, most of which no fused kernel carries out."""
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bfloat16).cuda()
    layers = {
        "causal": Sdpa(is_causal=True),
        "masked": Sdpa(attn_mask=mask),
        "grouped": Sdpa(kv_heads=2, enable_gqa=True),
        "grouped_masked": Sdpa(kv_heads=2, enable_gqa=True, attn_mask=mask),
        "narrow_values": Sdpa(value_dim=12),
        "flat": Sdpa(is_flat=True),
        "in_double": Sdpa(dtype=torch.float64),
        "off": Sdpa(backend=SDPBackend.MATH, is_causal=True),
    }
    model = nn.Sequential(OrderedDict(layers)).cuda()
    x = torch.ones(BATCH, LENGTH, WIDTH, device="cuda")
    traced(lambda: model(x).sum().backward())


def two_devices(traced: Traced) -> None:
    """A layer on each of two devices."""
    first, second = Attention().cuda(0), Attention().cuda(1)
    x = torch.ones(BATCH, LENGTH, WIDTH, device="cuda:0")

    def train() -> None:
        for _ in range(2):
            second(first(x).to("cuda:1")).square().sum().backward()

    traced(train)


def private_pool(traced: Traced) -> None:
    """A layer whose results come from a pool of their own."""
    model, pool = Attention().cuda(), torch.cuda.MemPool()
    x = torch.ones(BATCH, LENGTH, WIDTH, device="cuda")

    def infer() -> None:
        with torch.no_grad(), torch.cuda.use_mem_pool(pool):
            model(x)
        model(x)

    traced(infer)


def two_streams(traced: Traced) -> None:
    """Blocks of a second stream, which the first one uses too."""
    model, side = Attention().cuda(), torch.cuda.Stream()

    @torch.no_grad()
    def infer() -> None:
        for _ in range(3):
            with torch.cuda.stream(side):
                x = torch.ones(BATCH, LENGTH, WIDTH, device="cuda")
            torch.cuda.current_stream().wait_stream(side)
            x.record_stream(torch.cuda.current_stream())
            model(x)
            del x

    traced(infer)


def out_of_memory(traced: Traced) -> None:
    """A second half that is too large for what the first left of 240 MiB."""
    trainer = Trainer(Checkpointed().cuda())
    held = []

    def fill() -> None:
        trainer.steps(1)
        while True:
            held.append(torch.empty(12 * MIB + 1, device="cuda", dtype=torch.uint8))

    traced(fill)


def late_out_of_memory(traced: Traced) -> None:
    """The same after so many steps that they are only counted."""
    trainer = Trainer(Checkpointed().cuda())
    held = []

    def fill() -> None:
        trainer.steps(5)
        while True:
            held.append(torch.empty(12 * MIB + 1, device="cuda", dtype=torch.uint8))

    traced(fill)


def pool_out_of_memory(traced: Traced) -> None:
    """A request for less than is free, of which most is in a pool of its own."""
    model, pool = Attention().cuda(), torch.cuda.MemPool()
    held = []

    @torch.no_grad()
    def fill() -> None:
        with torch.cuda.use_mem_pool(pool):
            model(torch.ones(60 * BATCH, LENGTH, WIDTH, device="cuda"))
        sizes = (60 * MIB, 60 * MIB, 50 * MIB)
        held.extend(torch.empty(size, device="cuda", dtype=torch.uint8) for size in sizes)

    traced(fill)


def compiled(traced: Traced) -> None:
    """Attention written out, made into fused kernels in the first step."""
    traced(Trainer(torch.compile(make_gpt2().cuda())).steps)


def compiled_gqa(traced: Traced) -> None:
    """Grouped heads and SDPA, compiled and run before the trace begins."""
    trainer = Trainer(torch.compile(make_llama(use_cache=False).cuda()), autocast=True)
    trainer.steps(1)
    traced(trainer.steps)


def graphs(traced: Traced) -> None:
    """CUDA graphs of compiled code: the first step warms up, the second records, two replay."""
    trainer = Trainer(torch.compile(make_gpt2().cuda(), mode="reduce-overhead"))
    traced(lambda: trainer.steps(4))


def replayed_graphs(traced: Traced) -> None:
    """CUDA graphs of compiled code that were recorded before the trace begins."""
    trainer = Trainer(torch.compile(make_gpt2().cuda(), mode="reduce-overhead"))
    trainer.steps(3)
    traced(trainer.steps)


def own_graph(traced: Traced) -> None:
    """A graph that the program itself records and replays."""
    model = Attention().cuda()
    x = torch.ones(BATCH, LENGTH, WIDTH, device="cuda")

    @torch.no_grad()
    def infer() -> None:
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(3):
            graph.replay()
        y.sum()

    traced(infer)


COMPILED: dict[str, Callable[[Traced], None]] = {
    program.__name__: program for program in (compiled, compiled_gqa, graphs, replayed_graphs)
}
"""Those that Triton compiles."""

PROGRAMS: dict[str, Callable[[Traced], None]] = {
    program.__name__: program
    for program in (
        gpt2, gpt2_autocast, gqa, gqa_autocast, warmed_up, first_use, decoding, checkpointed,
        two_streams, long_loop, private_pool, kernels, own_graph,
    )
}  # fmt: skip
"""All others that end well."""
