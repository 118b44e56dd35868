"""How many bytes cross the memory bus, and the least time that and the products take.

Every time here is a lower bound: peak bandwidth and peak flops, perfectly overlapped. Programs
reach 60 to 95 % of the one and 30 to 80 % of the other.

Symbols: n sequence length, D head dimension, e bytes per element, M bytes of on-chip memory.
"""

from dataclasses import dataclass

from attnprof.theory.architecture import Architecture
from attnprof.theory.cache import cache_bytes
from attnprof.theory.devices import Device
from attnprof.theory.dtypes import count_bytes, item_bytes
from attnprof.theory.flops import Flops, count_decode, count_forward


@dataclass(frozen=True, slots=True)
class TimeBound:
    """The least time something takes on a device."""

    moved_bytes: int
    """What must be read or written at least once."""
    flops: int
    memory_seconds: float
    """Time to move the bytes."""
    compute_seconds: float
    """Time for the products."""
    seconds: float
    """The larger of the two: they overlap at best."""

    @property
    def limit(self) -> str:
        """Which of the two it is: ``"memory"`` or ``"compute"``."""
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"


def seconds_to_move(size_bytes: int, *, bandwidth_bytes_per_second: int, times: int = 1) -> float:
    """Return the least time to move bytes over a memory bus so many times.

    One (32 768, 32 768) score matrix in FP16 is 2.147 GB; at the 2.0 TB/s of an A100 that is
    1.07 ms one way, and 2.15 ms in and out (``times=2``).
    """
    return times * size_bytes / bandwidth_bytes_per_second


def standard_attention_bytes(
    *, q_len: int, k_len: int, head_dim: int, dtype: str = "bfloat16"
) -> int:
    """Return what one head's attention moves when scores go through memory: Θ(n D + n²).

    Read Q, K and write S; read S and write P; read P, V and write O: 4 n D + 4 n² elements
    (FlashAttention, arXiv 2205.14135, algorithm 0 and theorem 2). Scale, mask and casts as ops of
    their own add 2 n² each.
    """
    linear = 2 * (q_len + k_len) * head_dim
    return item_bytes(dtype) * (linear + 4 * q_len * k_len)


def flash_attention_bytes(
    *, q_len: int, k_len: int, head_dim: int, sram_bytes: int, dtype: str = "bfloat16"
) -> int:
    """Return what one head's attention moves when scores stay on the chip: Θ(n² D² / M).

    Blocks of M / 4 D keys stay on the chip while all of Q passes, and O is read and written for
    each of them: 2 n D + ⌈n / (M / 4 D)⌉ · (3 n D + 4 n) elements, the last for the running maximum
    and sum (FlashAttention, arXiv 2205.14135, algorithm 1 and theorem 2).

    Args:
        q_len: Queries.
        k_len: Keys.
        head_dim: D.
        sram_bytes: M, on-chip memory of one multiprocessor (192 KiB on an A100).
        dtype: What Q, K, V and O are in.

    Raises:
        ValueError: Not one block of keys fits on the chip.
    """
    item = item_bytes(dtype)
    block = sram_bytes // (4 * head_dim * item)
    if block < 1:
        raise ValueError(
            f"{sram_bytes} bytes on the chip hold no block of keys of {head_dim} elements; "
            f"expected at least {4 * head_dim * item}"
        )
    passes = -(-k_len // block)
    return item * (2 * k_len * head_dim + passes * (3 * q_len * head_dim + 4 * q_len))


def bound_prefill(
    arch: Architecture,
    device: Device,
    *,
    seq_len: int,
    batch: int = 1,
    dtype: str = "bfloat16",
    skip_masked: bool = False,
) -> TimeBound:
    """Return the least time from a prompt of n tokens to the first token after it.

    Every weight is read once and the cache written once; flops are those of one forward, logits of
    the last token only. Scores are taken to stay on the chip.
    """
    flops = count_forward(
        arch, seq_len=seq_len, batch=batch, skip_masked=skip_masked, last_logits_only=True
    )
    cache = cache_bytes(arch, seq_len=seq_len, batch=batch, dtype=dtype, windows_kept=False)
    weights = count_bytes(_touched_parameters(arch, tokens=batch * seq_len), dtype)
    return _bound(device, weights + cache, flops)


def bound_decode(
    arch: Architecture, device: Device, *, past_len: int, batch: int = 1, dtype: str = "bfloat16"
) -> TimeBound:
    """Return the least time of one more token for each of B sequences with a cache.

    Every weight and the whole cache are read once: (weights + B · cache) / bandwidth.
    """
    flops = count_decode(arch, past_len=past_len, batch=batch)
    cache = cache_bytes(arch, seq_len=past_len + 1, batch=batch, dtype=dtype)
    weights = count_bytes(_touched_parameters(arch, tokens=batch), dtype)
    return _bound(device, weights + cache, flops)


def _touched_parameters(arch: Architecture, *, tokens: int) -> int:
    """Return how many parameters some tokens read: of experts, at most what tokens can choose."""
    if arch.experts is None:
        return arch.active_parameters
    unchosen = max(0, arch.experts.count - tokens * arch.experts.active)
    column = (3 if arch.ffn_gated else 2) * arch.width
    untouched = arch.expert_layers * unchosen * column * arch.experts.width
    embedding = 0 if arch.tied_embeddings else arch.head_parameters
    return arch.parameters - embedding - untouched


def _bound(device: Device, moved_bytes: int, flops: Flops) -> TimeBound:
    memory = seconds_to_move(
        moved_bytes, bandwidth_bytes_per_second=device.bandwidth_bytes_per_second
    )
    compute = flops.total / device.flops_per_second
    return TimeBound(moved_bytes, flops.total, memory, compute, max(memory, compute))
