"""Which kernel ``scaled_dot_product_attention`` takes on CUDA, and why not the others.

The rules are those of torch 2.13.0 built for CUDA 13, with the cuDNN it comes with (9.20); other
releases differ, above all in when cuDNN is tried. They follow the source and agree with what that
build chooses, asked on a machine without a GPU (``docs/cuda-model.md``). Sources:
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/sdp_utils_cpp.h
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp

Known limitations:
    Nested tensors, FA3 and FA4, ``torch.use_deterministic_algorithms``, a changed order of
    backends and views that start at an address no kernel can load from are not modelled.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum

Shape = tuple[int, ...]
Capability = tuple[int, int]


class Backend(StrEnum):
    """The kernels behind ``scaled_dot_product_attention``, named as in ``SDPBackend``."""

    FLASH = "flash"
    EFFICIENT = "efficient"
    CUDNN = "cudnn"
    MATH = "math"


@dataclass(frozen=True, slots=True)
class SdpaCall:
    """What the choice depends on: the arguments of one call."""

    dtype: str
    """Of Q, K and V, as in ``"bfloat16"``."""
    q_shape: Shape
    """(B, H, Tq, D); fewer or more dimensions are allowed and go to math."""
    k_shape: Shape
    """(B, Hkv, Tk, D)."""
    v_shape: Shape
    """(B, Hkv, Tk, Dv)."""
    mask_dtype: str | None = None
    """``"bool"`` or a floating-point type; None without a mask. The choice is the same for all."""
    mask_shape: Shape | None = None
    """Broadcastable to (B, H, Tq, Tk); None without a mask."""
    mask_requires_grad: bool = False
    dropout: float = 0.0
    """The probability, from 0 to 1."""
    is_causal: bool = False
    enable_gqa: bool = False
    requires_grad: bool = False
    """Whether gradients are on and Q, K or V require one."""
    last_dim_contiguous: bool = True
    """Whether the last dimension of Q, K and V has stride 1."""
    mask_last_dim_contiguous: bool = True
    """Whether the last dimension of the mask has stride 1."""

    def __post_init__(self) -> None:
        if (self.mask_dtype is None) != (self.mask_shape is None):
            raise ValueError(
                f"a mask has a dtype and a shape, got {self.mask_dtype!r} and {self.mask_shape!r}; "
                "give both, or neither for a call without a mask"
            )
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is a probability from 0 to 1, got {self.dropout}")


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The kernel that carries a call out."""

    backend: Backend
    reason: str
    """Why this one, in a line: what spoke against those that are tried before it."""
    rejected: dict[Backend, str]
    """Per backend that cannot carry the call out, the first rule against it, in a line."""


def choose_backend(
    call: SdpaCall,
    *,
    compute_capability: Capability = (9, 0),
    enabled: Collection[Backend] = frozenset(Backend),
) -> BackendChoice:
    """Return the kernel that CUDA takes for a call.

    Args:
        call: The arguments.
        compute_capability: The GPU's (major, minor).
        enabled: The backends that are switched on; all are by default.

    Raises:
        ValueError: No enabled backend can carry out the call; torch raises an error then, too.
    """
    rejected = {}
    for backend in Backend:
        rule = "is switched off" if backend not in enabled else None
        for check in _CHECKS[backend]:
            rule = rule or check(call, compute_capability)
        if rule:
            rejected[backend] = f"{backend} {rule}"
    order = _order_backends(compute_capability)
    for position, backend in enumerate(order):
        if backend not in rejected:
            name = ".".join(map(str, compute_capability))
            first = f"{backend} is tried first on compute capability {name}"
            reason = "; ".join(rejected[b] for b in order[:position]) or first
            return BackendChoice(backend, reason, rejected)
    raise ValueError(
        "no backend that is switched on can carry out this attention: "
        + "; ".join(rejected[backend] for backend in order)
    )


def _order_backends(capability: Capability) -> tuple[Backend, ...]:
    """Follow ``priority_order`` and ``check_prefer_cudnn_attention``."""
    rest = (Backend.FLASH, Backend.EFFICIENT, Backend.MATH)
    if capability[0] in (9, 10):
        return (Backend.CUDNN, *rest)
    return (*rest, Backend.CUDNN)


Check = Callable[[SdpaCall, Capability], str | None]
"""Returns what the backend does not do, to follow its name in a sentence; None if it does."""


def _check_dimensions(call: SdpaCall, _: Capability) -> str | None:
    dimensions = [len(shape) for shape in (call.q_shape, call.k_shape, call.v_shape)]
    if dimensions == [4, 4, 4]:
        return None
    return f"takes Q, K and V with 4 dimensions only, got {', '.join(map(str, dimensions))}"


def _check_lengths(call: SdpaCall, _: Capability) -> str | None:
    if call.q_shape[2] and call.k_shape[2]:
        return None
    return "takes no empty sequences"


def _check_no_mask(call: SdpaCall, _: Capability) -> str | None:
    return None if call.mask_shape is None else "takes no mask"


def _check_cudnn_mask(call: SdpaCall, _: Capability) -> str | None:
    """Follow ``check_attn_mask_shape``."""
    shape = call.mask_shape
    if shape is None:
        return None
    if call.mask_requires_grad:
        return "computes no gradient of a mask"
    full = (*call.q_shape[:3], call.k_shape[2])
    fits = len(shape) in (2, 4) and all(
        size in (1, whole) for size, whole in zip(shape, full[-len(shape) :], strict=True)
    )
    return None if fits else f"takes masks of shape (Tq, Tk) or (B, H, Tq, Tk) only, got {shape}"


def _check_half_dtype(call: SdpaCall, capability: Capability) -> str | None:
    """Follow ``check_dtypes_low_precision``."""
    return _check_dtype(call, ["float16", *(["bfloat16"] if capability[0] >= 8 else [])])


def _check_efficient_dtype(call: SdpaCall, capability: Capability) -> str | None:
    return _check_dtype(call, ["float16", "float32", *(["bfloat16"] if capability[0] >= 8 else [])])


def _check_dtype(call: SdpaCall, allowed: list[str]) -> str | None:
    return None if call.dtype in allowed else f"takes {', '.join(allowed)} only, got {call.dtype}"


def _check_capability(lowest: Capability) -> Check:
    def check(_: SdpaCall, capability: Capability) -> str | None:
        if lowest <= capability <= (12, 1):
            return None
        got = ".".join(map(str, capability))
        return f"runs on compute capability {lowest[0]}.{lowest[1]} to 12.1 only, got {got}"

    return check


def _check_strides(call: SdpaCall, _: Capability) -> str | None:
    """Follow ``check_last_dim_stride_equals_1_dense``."""
    is_ok = call.last_dim_contiguous and (call.mask_shape is None or call.mask_last_dim_contiguous)
    return None if is_ok else "needs the last dimension of Q, K, V and the mask contiguous"


def _check_strides_of_vectors(call: SdpaCall, capability: Capability) -> str | None:
    """Do not mind the stride where a head has one dimension."""
    if call.q_shape[3] == 1 and (call.mask_shape is None or call.mask_last_dim_contiguous):
        return None
    return _check_strides(call, capability)


def _check_heads(*, takes_gqa: bool, same_kv_heads: bool = True) -> Check:
    """Follow ``check_batch_size_and_num_heads_dense``."""

    def check(call: SdpaCall, _: Capability) -> str | None:
        batch, heads = zip(
            *(s[:2] for s in (call.q_shape, call.k_shape, call.v_shape)), strict=True
        )
        if len(set(batch)) > 1:
            return f"takes Q, K and V of one batch size only, got {', '.join(map(str, batch))}"
        if len(set(heads)) == 1:
            return None
        got = f"got {heads[0]} heads of Q, {heads[1]} of K, {heads[2]} of V"
        if not takes_gqa:
            return f"takes no grouped heads, {got}"
        if not call.enable_gqa:
            return f"takes grouped heads only with enable_gqa, {got}"
        if same_kv_heads and heads[1] != heads[2]:
            return f"takes as many heads of K as of V only, {got}"
        if not all(h and heads[0] % h == 0 for h in heads[1:]):
            return f"takes heads of K and V that divide those of Q only, {got}"
        return None

    return check


def _check_flash_head_dim(call: SdpaCall, _: Capability) -> str | None:
    """Follow ``check_head_dim_size_flash``: other sizes are padded to a multiple of 8."""
    q, k, v = call.q_shape[3], call.k_shape[3], call.v_shape[3]
    if q == k == v and q <= 256:
        return None
    return f"takes one head_dim up to 256 for Q, K and V, got {q}, {k} and {v}"


def _check_flash_training(call: SdpaCall, capability: Capability) -> str | None:
    """Follow ``check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120``."""
    is_small_chip = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    head_dim = call.q_shape[3]
    if (
        not call.requires_grad
        or not is_small_chip
        or head_dim <= 192
        or (head_dim > 224 and not call.dropout)
    ):
        return None
    return (
        f"does not train head_dim {head_dim} with dropout {call.dropout:g} on compute capability "
        f"{capability[0]}.{capability[1]}; it takes up to 192, and 225 to 256 without dropout"
    )


def _check_flash_causal(call: SdpaCall, _: Capability) -> str | None:
    """Follow ``check_flash_causal_non_square_seqlens``: its causal mask is aligned otherwise."""
    q_len, k_len = call.q_shape[2], call.k_shape[2]
    if not call.is_causal or q_len == k_len:
        return None
    return f"takes is_causal with as many queries as keys only, got {q_len} and {k_len}"


def _check_efficient_head_dim(call: SdpaCall, capability: Capability) -> str | None:
    """Follow ``check_head_dim_size_mem_efficient`` and ``minimum_gemm_alignment``."""
    is_half = call.dtype in ("float16", "bfloat16")
    has_tensor_cores = capability[0] >= 8 or (capability[0] == 7 and is_half)
    multiple = (8 if is_half else 4) if has_tensor_cores else 1
    q, k, v = call.q_shape[3], call.k_shape[3], call.v_shape[3]
    if q == k and all(d > 0 and d % multiple == 0 for d in (q, v)):
        return None
    return f"takes one head_dim for Q and K and multiples of {multiple} only, got {q}, {k} and {v}"


def _check_cudnn_dropout(call: SdpaCall, _: Capability) -> str | None:
    if (16 * call.dropout).is_integer():
        return None
    return f"takes dropout in sixteenths only, got {call.dropout:g}"


def _check_cudnn_shapes(call: SdpaCall, capability: Capability) -> str | None:
    """Follow ``check_cudnn_tensor_shapes``."""
    batch, heads, q_len, q = call.q_shape
    k_len, v = call.k_shape[2], call.v_shape[3]
    if max(batch, heads) > 65535:
        return f"takes batches and heads up to 65535 only, got {batch} and {heads}"
    largest = 256 if capability == (9, 0) else 128
    is_latent = capability[0] == 10 and (q, v) == (192, 128)  # as DeepSeek has it
    if max(q, v) > largest and not is_latent:
        return f"takes head_dim up to {largest} only, got {q} and {v}"
    if q % 8 or v % 8:
        return f"takes multiples of 8 as head_dim only, got {q} and {v}"
    if k_len == 1:
        return "takes no single key"
    if q_len == 1 and call.dropout:
        return "takes no single query with dropout"
    return None


_CHECKS: dict[Backend, tuple[Check, ...]] = {
    # In the order of torch's own checks, so that the first rule against a backend is torch's too.
    Backend.FLASH: (
        _check_dimensions,
        _check_no_mask,
        _check_flash_head_dim,
        _check_capability((8, 0)),
        _check_flash_training,
        _check_flash_causal,
        _check_half_dtype,
        _check_heads(takes_gqa=True),
        _check_lengths,
        _check_strides_of_vectors,
    ),
    Backend.EFFICIENT: (
        _check_capability((5, 0)),
        _check_dimensions,
        _check_efficient_head_dim,
        _check_lengths,
        _check_strides,
        _check_heads(takes_gqa=False),
        _check_efficient_dtype,
    ),
    Backend.CUDNN: (
        _check_dimensions,
        _check_half_dtype,
        _check_cudnn_mask,
        _check_capability((8, 0)),
        _check_cudnn_dropout,
        _check_lengths,
        _check_strides_of_vectors,
        _check_heads(takes_gqa=True, same_kv_heads=False),
        _check_cudnn_shapes,
    ),
    Backend.MATH: (),
}
