"""What a model carries from token to token: KV cache, latent cache, recurrent state.

Symbols: L layers, n tokens so far, Hkv key and value heads, D head dimension, w window, r latent
rank, e bytes per element.
"""

from attnprof.theory.architecture import Architecture
from attnprof.theory.dtypes import count_bytes


def cached_elements_per_token(arch: Architecture) -> int:
    """Return how many numbers one layer caches for one token.

    2 · Hkv · D: a key and a value per head (GQA: arXiv 2305.13245, MQA with Hkv = 1: 1911.02150).
    With latent attention r + D_rope: the latent and the shared rotary key (DeepSeek-V2, arXiv
    2405.04434, section 2.1). Programs that cache the expanded keys and values instead, as the eager
    model in transformers does, cache H · (D_qk + D_v): `expanded_elements_per_token`.
    """
    if arch.latent is not None:
        return arch.latent.kv_rank + arch.latent.rope_dim
    return 2 * arch.kv_heads * arch.head_dim


def expanded_elements_per_token(arch: Architecture) -> int:
    """Return how many numbers one layer caches for a token if every head has its own: H (D + D)."""
    return arch.heads * (arch.qk_dim + arch.value_dim)


def cache_bytes_per_token(arch: Architecture, *, dtype: str = "bfloat16") -> int:
    """Return the bytes that one more token adds to the cache while it is in every window.

    L · 2 · Hkv · D · e.
    """
    return count_bytes(arch.layers * cached_elements_per_token(arch), dtype)


def cache_bytes(
    arch: Architecture,
    *,
    seq_len: int,
    batch: int = 1,
    dtype: str = "bfloat16",
    block_tokens: int = 1,
    windows_kept: bool = True,
) -> int:
    """Return the bytes of the KV cache: B · e · elements · Σ over layers of the tokens kept.

    A layer keeps n tokens, a windowed one min(n, w) of them.

    Args:
        arch: The model.
        seq_len: n, tokens so far.
        batch: B, sequences of that length.
        dtype: How it is stored: ``"float8"`` and ``"int4"`` count their scales not.
        block_tokens: Tokens per block of a paged cache, each sequence rounded up to whole blocks
            (PagedAttention, arXiv 2309.06180, uses 16).
        windows_kept: Whether windowed layers drop what left the window; a plain cache does not.
    """
    full = _round_up(seq_len, block_tokens)
    windowed = full
    if windows_kept and arch.window is not None:
        windowed = _round_up(min(seq_len, arch.window), block_tokens)
    tokens = arch.full_layers * full + arch.windowed_layers * windowed
    return count_bytes(batch * tokens * cached_elements_per_token(arch), dtype)


def recurrent_state_bytes(
    *, batch: int, heads: int, key_dim: int, value_dim: int, layers: int = 1, dtype: str = "float32"
) -> int:
    """Return the state of linear attention, RetNet or RWKV: L · B · H · Dk · Dv · e, whatever n is.

    Sources: Katharopoulos et al. (arXiv 2006.16236, equations 18 to 20: with the normaliser, take
    Dv + 1), RetNet (arXiv 2307.08621, equation 6).
    """
    return count_bytes(layers * batch * heads * key_dim * value_dim, dtype)


def state_space_bytes(
    *,
    batch: int,
    inner_width: int,
    state_size: int,
    conv_width: int,
    layers: int = 1,
    dtype: str = "float32",
) -> int:
    """Return the state of a Mamba layer: B · inner · (state + convolution window) · e.

    Source: Mamba (arXiv 2312.00752), section 3.4; as transformers keeps it, the whole window.
    """
    return count_bytes(layers * batch * inner_width * (state_size + conv_width), dtype)


def _round_up(tokens: int, block: int) -> int:
    return -(-tokens // block) * block
