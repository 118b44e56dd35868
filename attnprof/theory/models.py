"""Shapes of public models, to reckon with what everybody knows.

Numbers are those of each model's published configuration. A model that is not here is read from its
``config.json`` by `attnprof.theory.config`.
"""

from difflib import get_close_matches

from attnprof.theory.architecture import Architecture, Experts, Latent

__all__ = ["MODELS", "Architecture", "find_model"]

_K = 1024


def _gpt(
    name: str, layers: int, width: int, heads: int, *, context: int, source: str
) -> Architecture:
    """Return a GPT: every head has its own keys, FFN of 4 d, learned positions, tied head."""
    return Architecture(
        name=name, layers=layers, width=width, heads=heads, kv_heads=heads,
        head_dim=width // heads, ffn_width=4 * width, ffn_gated=False, rms_norm=False,
        vocabulary=50257,
        context_len=context, learned_positions=context, tied_embeddings=True, source=source,
    )  # fmt: skip


def _llama(
    name: str, layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocabulary: int,
    context: int, source: str, *, head_dim: int = 128, tied: bool = False,
    window: int | None = None, windowed: int = 0, experts: Experts | None = None,
    latent: Latent | None = None,
) -> Architecture:  # fmt: skip
    """Return a model built as Llama is: rotary positions, gated FFN."""
    return Architecture(
        name=name, layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        ffn_width=ffn, vocabulary=vocabulary, context_len=context, tied_embeddings=tied,
        window=window, windowed_layers=windowed, experts=experts, latent=latent, source=source,
    )  # fmt: skip


_GPT2 = "Radford et al. 2019; huggingface.co/openai-community"
_LLAMA2, _LLAMA3 = "arXiv 2307.09288; config.json", "arXiv 2407.21783; config.json"
_GEMMA2, _GEMMA3 = "arXiv 2408.00118; config.json", "arXiv 2503.19786; config.json (text model)"
_QWEN25, _QWEN3 = "arXiv 2412.15115; config.json", "arXiv 2505.09388; config.json"

MODELS: tuple[Architecture, ...] = (
    _gpt("GPT-2", 12, 768, 12, context=_K, source=_GPT2),
    _gpt("GPT-2 Medium", 24, 1024, 16, context=_K, source=_GPT2),
    _gpt("GPT-2 Large", 36, 1280, 20, context=_K, source=_GPT2),
    _gpt("GPT-2 XL", 48, 1600, 25, context=_K, source=_GPT2),
    _gpt("GPT-3", 96, 12288, 96, context=2 * _K, source="arXiv 2005.14165, table 2.1"),
    _llama("Llama 2 7B", 32, 4096, 32, 32, 11008, 32000, 4 * _K, _LLAMA2),
    _llama("Llama 2 13B", 40, 5120, 40, 40, 13824, 32000, 4 * _K, _LLAMA2),
    _llama("Llama 2 70B", 80, 8192, 64, 8, 28672, 32000, 4 * _K, _LLAMA2),
    _llama("Llama 3.1 8B", 32, 4096, 32, 8, 14336, 128256, 128 * _K, _LLAMA3),
    _llama("Llama 3.1 70B", 80, 8192, 64, 8, 28672, 128256, 128 * _K, _LLAMA3),
    _llama("Llama 3.1 405B", 126, 16384, 128, 8, 53248, 128256, 128 * _K, _LLAMA3),
    _llama("Llama 3.2 1B", 16, 2048, 32, 8, 8192, 128256, 128 * _K, "config.json", head_dim=64,
           tied=True),
    _llama("Llama 3.2 3B", 28, 3072, 24, 8, 8192, 128256, 128 * _K, "config.json", tied=True),
    _llama("Mistral 7B", 32, 4096, 32, 8, 14336, 32000, 32 * _K, "arXiv 2310.06825; config.json",
           window=4096, windowed=32),
    _llama("Mixtral 8x7B", 32, 4096, 32, 8, 14336, 32000, 32 * _K,
           "arXiv 2401.04088; config.json", experts=Experts(8, 2, 14336)),
    _llama("Gemma 2 2B", 26, 2304, 8, 4, 9216, 256000, 8 * _K, _GEMMA2, head_dim=256, tied=True,
           window=4096, windowed=13),
    _llama("Gemma 2 9B", 42, 3584, 16, 8, 14336, 256000, 8 * _K, _GEMMA2, head_dim=256, tied=True,
           window=4096, windowed=21),
    _llama("Gemma 2 27B", 46, 4608, 32, 16, 36864, 256000, 8 * _K, _GEMMA2, tied=True,
           window=4096, windowed=23),
    _llama("Gemma 3 1B", 26, 1152, 4, 1, 6912, 262144, 32 * _K, _GEMMA3, head_dim=256, tied=True,
           window=512, windowed=22),
    _llama("Gemma 3 4B", 34, 2560, 8, 4, 10240, 262208, 128 * _K, _GEMMA3, head_dim=256, tied=True,
           window=1024, windowed=29),
    _llama("Gemma 3 12B", 48, 3840, 16, 8, 15360, 262208, 128 * _K, _GEMMA3, head_dim=256,
           tied=True, window=1024, windowed=40),
    _llama("Gemma 3 27B", 62, 5376, 32, 16, 21504, 262208, 128 * _K, _GEMMA3, tied=True,
           window=1024, windowed=52),
    _llama("Qwen2.5 0.5B", 24, 896, 14, 2, 4864, 151936, 32 * _K, _QWEN25, head_dim=64, tied=True),
    _llama("Qwen2.5 7B", 28, 3584, 28, 4, 18944, 152064, 128 * _K, _QWEN25),
    _llama("Qwen2.5 32B", 64, 5120, 40, 8, 27648, 152064, 128 * _K, _QWEN25),
    _llama("Qwen2.5 72B", 80, 8192, 64, 8, 29568, 152064, 128 * _K, _QWEN25),
    _llama("Qwen3 0.6B", 28, 1024, 16, 8, 3072, 151936, 32 * _K, _QWEN3, tied=True),
    _llama("Qwen3 8B", 36, 4096, 32, 8, 12288, 151936, 128 * _K, _QWEN3),
    _llama("Qwen3 32B", 64, 5120, 64, 8, 25600, 151936, 128 * _K, _QWEN3),
    _llama("Qwen3 30B-A3B", 48, 2048, 32, 4, 6144, 151936, 128 * _K, _QWEN3,
           experts=Experts(128, 8, 768)),
    _llama("Qwen3 235B-A22B", 94, 4096, 64, 4, 12288, 151936, 128 * _K, _QWEN3,
           experts=Experts(128, 8, 1536)),
    _llama("gpt-oss 20B", 24, 2880, 64, 8, 2880, 201088, 128 * _K, "arXiv 2508.10925; config.json",
           head_dim=64, window=128, windowed=12, experts=Experts(32, 4, 2880)),
    _llama("gpt-oss 120B", 36, 2880, 64, 8, 2880, 201088, 128 * _K,
           "arXiv 2508.10925; config.json", head_dim=64, window=128, windowed=18,
           experts=Experts(128, 4, 2880)),
    _llama("DeepSeek-V2", 60, 5120, 128, 128, 12288, 102400, 128 * _K,
           "arXiv 2405.04434; config.json", latent=Latent(512, 64, 128, 128, 1536),
           experts=Experts(160, 6, 1536, shared_width=2 * 1536, dense_layers=1)),
    _llama("DeepSeek-V3", 61, 7168, 128, 128, 18432, 129280, 128 * _K,
           "arXiv 2412.19437; config.json", latent=Latent(512, 64, 128, 128, 1536),
           experts=Experts(256, 8, 2048, shared_width=2048, dense_layers=3)),
)  # fmt: skip
"""The models known, by family and size."""

_ALIASES = {"deepseekr1": "deepseekv3", "gpt3175b": "gpt3"} | {
    "mistral7bv0.1": "mistral7b",
    "mixtral8x7bv0.1": "mixtral8x7b",
}
_NOISE = {"instruct", "chat", "hf", "base", "it", "pt", "text", "meta"}
"""Words in names of checkpoints that say nothing about the shape."""


def find_model(name: str) -> Architecture:
    """Return a public model's architecture by name.

    Case, spaces and dashes do not matter, and names of checkpoints work:
    ``"meta-llama/Llama-3.1-8B-Instruct"``.

    Raises:
        ValueError: No model has that name; the message says which are near and which there are.
    """
    wanted = _fold(name)
    wanted = _ALIASES.get(wanted, wanted)
    by_key = {_fold(model.name): model for model in MODELS}
    if wanted in by_key:
        return by_key[wanted]
    near = get_close_matches(wanted, by_key, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(by_key[key].name for key in near)}? " if near else ""
    raise ValueError(
        f"no model named {name!r}; {hint}known are {', '.join(m.name for m in MODELS)}; "
        "for any other, give the path of its config.json"
    )


def _fold(name: str) -> str:
    words = name.rsplit("/", 1)[-1].lower().replace("-", " ").replace("_", " ").split()
    return "".join(word for word in words if word not in _NOISE)
