"""Why ``scaled_dot_product_attention`` took the kernel it took, as far as ops can tell.

On CUDA the rules of `attnprof.theory.sdpa` are asked about the arguments, which are read off the
ops: of a fused kernel its operands, of the math path what its first ops were given.

Known limitations:
    Numbers are no operands: the probability of dropout is not known, nor ``is_causal`` of a fused
    kernel. Which kernels the program had switched off is not recorded.
"""

from dataclasses import dataclass, replace

import numpy as np

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts, Signature
from attnprof.attribution.pairs import Pattern
from attnprof.attribution.products import factors, is_distance
from attnprof.store.schema import GRAD_ENABLED
from attnprof.theory.sdpa import Backend, Capability, SdpaCall, choose_backend
from attnprof.vocabulary import AttentionKind, Role

MATH_SOFTMAX = "_safe_softmax"
"""torch uses it nowhere but in the math path of scaled_dot_product_attention, and where
flex_attention is not compiled."""

_KERNELS = {
    "_scaled_dot_product_flash_attention": Backend.FLASH,
    "_scaled_dot_product_efficient_attention": Backend.EFFICIENT,
    "_scaled_dot_product_cudnn_attention": Backend.CUDNN,
}
_FLEX_OPS = 12
"""flex_attention runs at most so many ops from its log-sum-exp to its softmax."""
_MASK_OPS = 16
"""The math path makes a causal mask at most so many ops before its first product."""


def explain_backend(facts: Facts, call: AttentionCall) -> str:
    """Return in a line how an attention call was carried out, and why so.

    Args:
        facts: The run's facts.
        call: One of its calls.
    """
    if call.kind is AttentionKind.OPAQUE:
        return f"{call.backend} is one op; its scores live and die inside it, unseen"
    if call.kind is AttentionKind.FUSED:
        return _explain_fused(facts, call)
    if call.pattern is Pattern.SUMS:
        return f"written out: sums of queries and keys around {call.backend}"
    if call.pattern is Pattern.LEARNED:
        made = "projected from queries alone" if call.firsts else "that are a parameter"
        return f"written out: scores {made}, around {call.backend}"
    if any(is_distance(facts, op) for op in call.firsts):
        return f"written out: distances of queries and keys around {call.backend}"
    if call.backend != MATH_SOFTMAX:
        return f"written out: products around {call.backend}"
    if _is_flex(facts, call):
        return (
            "flex_attention without torch.compile: products around a softmax, all scores in memory"
        )
    return f"scaled_dot_product_attention fell back to math{_explain_math(facts, call)}"


def _is_flex(facts: Facts, call: AttentionCall) -> bool:
    """Return whether a log-sum-exp is made of the scores too, as flex_attention alone does."""
    softmax = int(facts.row_op[call.result_rows[0]])
    scores = {int(facts.storage[row]) for row in facts.rows_in(softmax)}
    around = range(max(0, softmax - _FLEX_OPS), softmax)
    return any(
        facts.short_names[facts.code[op]] == "logsumexp"
        and any(int(facts.storage[row]) in scores for row in facts.rows_in(op))
        for op in around
    )


def _explain_fused(facts: Facts, call: AttentionCall) -> str:
    text = f"fused: {call.backend}"
    kernel, capability = _KERNELS.get(call.backend), _find_capability(facts, call)
    if kernel is None or capability is None or len(call.io_rows) < 3:
        return text
    q, k, v = (facts.signature_of(row) for row in call.io_rows[:3])
    mask = facts.signature_of(call.mask_rows[0]) if call.mask_rows else None
    choice = choose_backend(
        _describe(q, k.shape, v.shape, mask, is_training=_has_grad(facts, call)),
        compute_capability=capability,
    )
    return f"{text} ({choice.reason})" if choice.backend is kernel else text


def _explain_math(facts: Facts, call: AttentionCall) -> str:
    """Return what follows the words that a call fell back to math."""
    found = _read_math(facts, call)
    capability = _find_capability(facts, call)
    if found is None:
        return ": dropout on the attention weights" if call.has_dropout else ""
    if capability is None:
        return _explain_math_on_cpu(found, has_dropout=call.has_dropout)
    # A mask of the program's own, made right before the call, looks like that of is_causal.
    masked = replace(found, is_causal=False, mask_dtype=found.dtype, mask_shape=_whole(found))
    readings = [found, masked] if found.is_causal else [found]
    choices = [choose_backend(each, compute_capability=capability) for each in readings]
    for choice in choices:
        if choice.backend is Backend.MATH:
            return f": {choice.reason}"
    return _explain_unforced(f"the {choices[0].backend} kernel", found)


def _explain_math_on_cpu(call: SdpaCall, *, has_dropout: bool) -> str:
    """Follow ``use_flash_attention_cpp``, the CPU's rules for its one fused kernel.

    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/sdp_utils_cpp.cpp
    """
    if has_dropout:
        return ": dropout on the attention weights"
    if len(call.q_shape) != 4:
        return f": the CPU's kernel takes 4 dimensions only, got {len(call.q_shape)}"
    if call.q_shape[-1] != call.v_shape[-1]:
        got = f"got {call.q_shape[-1]} and {call.v_shape[-1]}"
        return f": the CPU's kernel takes one head_dim for Q, K and V only, {got}"
    if call.mask_requires_grad:
        return ": the CPU's kernel computes no gradient of a mask"
    if not call.last_dim_contiguous:
        return ": the CPU's kernel needs the last dimension of Q contiguous"
    return _explain_unforced("the CPU's kernel", call)


def _explain_unforced(kernel: str, call: SdpaCall) -> str:
    """Return what may have kept a kernel away that no rule speaks against."""
    why = "it was switched off, as torch.nn.attention.sdpa_kernel does"
    if call.mask_shape is not None:
        why += ", or the mask needs a gradient"
    return f", though {kernel} could carry it out: {why}"


def _whole(call: SdpaCall) -> tuple[int, ...]:
    return (*call.q_shape[:-1], call.k_shape[-2])


def _describe(
    q: Signature,
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    mask: Signature | None,
    *,
    is_training: bool,
) -> SdpaCall:
    return SdpaCall(
        dtype=q.dtype,
        q_shape=q.shape,
        k_shape=k_shape,
        v_shape=v_shape,
        mask_dtype=mask.dtype if mask else None,
        mask_shape=mask.shape if mask else None,
        enable_gqa=len(q.shape) == 4 and q.shape[1] != k_shape[1],
        requires_grad=is_training,
        last_dim_contiguous=q.stride[-1:] in ((1,), ()) or q.shape[-1] == 1,
    )


def _read_math(facts: Facts, call: AttentionCall) -> SdpaCall | None:
    """Return the arguments of a call that took the math path; None if they are not found.

    It casts half precision to float32, repeats heads of K and V, and scales Q and K.
    """
    first, second = min(call.score_ops, default=-1), min(call.seconds, default=-1)
    if first < 0 or second < 0:
        return None
    left, right = factors(facts, first)
    q, k = _find_given(facts, call, left), _find_given(facts, call, right)
    if q is None or k is None:
        return None
    kv_heads = call.kv_heads if k.is_repeated else call.heads
    *outer, _, head_dim = q.signature.shape
    rest = (outer[0], kv_heads, call.k_len) if len(outer) == 2 else (*outer, call.k_len)
    mask, is_causal = _find_mask(facts, call)
    found = _describe(
        q.signature,
        (*rest, head_dim),
        (*rest, facts.signature_of(factors(facts, second)[1]).shape[-1]),
        mask,
        is_training=_has_grad(facts, call),
    )
    return replace(found, is_causal=is_causal, mask_requires_grad=_learns_mask(facts, call))


@dataclass(frozen=True, slots=True)
class _Given:
    """What the math path was given for Q or K."""

    signature: Signature
    is_repeated: bool
    """It repeats its heads for those of Q: ``enable_gqa``."""


def _find_given(facts: Facts, call: AttentionCall, row: int) -> _Given | None:
    """Return the argument that a factor of the first product was made from."""
    is_scaled = is_repeated = False
    for _ in range(6):
        made = int(facts.producer_row[row])
        op = int(facts.row_op[made]) if made >= 0 else -1
        name = facts.short_names[facts.code[op]] if made >= 0 else ""
        if name == "clone" and (not is_scaled or _repeats(facts, op)):
            is_repeated |= is_scaled
        elif name == "mul" and not is_scaled:
            is_scaled = True
        elif name == "_to_copy" and is_scaled and _casts_back(facts, call, op):
            return _Given(facts.signature_of(facts.rows_in(op)[0]), is_repeated)
        else:
            break
        row = facts.rows_in(op)[0]
    return _Given(facts.signature_of(row), is_repeated) if is_scaled else None


def _repeats(facts: Facts, op: int) -> bool:
    """Return whether a copy writes out what an expanded view repeats."""
    signature = facts.signature_of(facts.rows_in(op)[0])
    return any(s == 0 and n > 1 for s, n in zip(signature.stride, signature.shape, strict=True))


def _casts_back(facts: Facts, call: AttentionCall, cast: int) -> bool:
    """Return whether a cast is the math path's own: then it casts its weights back as well."""
    dtype = facts.signature_of(facts.rows_in(cast)[0]).dtype
    after = range(max(call.score_ops) + 1, max(call.seconds))
    return any(
        facts.short_names[facts.code[op]] == "_to_copy"
        and facts.signature_of(facts.rows_out(op)[0]).dtype == dtype
        for op in after
    )


def _find_mask(facts: Facts, call: AttentionCall) -> tuple[Signature | None, bool]:
    """Return the mask that a call was given, and whether it made a causal one itself."""
    if not call.mask_rows:
        return None, False
    first = max(min(call.ops) - _MASK_OPS, 0)
    names = {facts.short_names[facts.code[op]] for op in range(first, max(call.ops))}
    if "tril" in names:
        return None, True
    return facts.signature_of(call.mask_rows[0]), False


def _learns_mask(facts: Facts, call: AttentionCall) -> bool:
    """Return whether a mask is a parameter."""
    table = facts.stored.table("identities")
    learned = {
        storage
        for storage, role in zip(
            table["storage"].to_pylist(), table["role"].to_pylist(), strict=True
        )
        if role == Role.PARAMETER
    }
    return any(int(facts.storage[row]) in learned for row in call.mask_rows)


def _has_grad(facts: Facts, call: AttentionCall) -> bool:
    return bool(facts.scope_flags[facts.scope[call.ops[0]]] & GRAD_ENABLED)


def _find_capability(facts: Facts, call: AttentionCall) -> Capability | None:
    """Return the compute capability of the GPU that a call ran on; None if it is not known."""
    events = facts.events
    at = np.flatnonzero(events["storage"] == facts.storage[call.io_rows[0]])[:1]
    device = facts.devices[int(events["device"][at[0]])] if len(at) else ""
    if not device.startswith("cuda"):
        return None
    info = facts.stored.info
    known = (info.get("environment") or {}).get("compute_capabilities") or []
    number = int(device.partition(":")[2] or 0)
    if "dry_run" in info:
        known, number = [info["dry_run"].get("compute_capability")], 0
    major, minor = (known[number] if number < len(known) else None) or (0, 0)
    return (major, minor) if major else None
