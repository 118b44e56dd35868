"""How attention gets from Q and K to its output: the ops, what each makes, what autograd keeps.

Symbols: B batch, H query heads, Tq and Tk query and key lengths, e bytes per element.

Source: torch 2.13, ``F.scaled_dot_product_attention`` (aten
``_scaled_dot_product_attention_math``), and the eager attention of transformers 5.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from attnprof.theory.dtypes import item_bytes

FLOAT32_BYTES = 4


class ScorePath(StrEnum):
    """How the way from Q and K to the output is computed."""

    MATERIALISED = "materialised"
    """Product, scale, mask, softmax, product: one op each, all in the model's dtype."""
    FP32_SOFTMAX = "fp32_softmax"
    """The same with the softmax in float32: the eager path of Hugging Face models."""
    MATH = "math"
    """``F.scaled_dot_product_attention`` without a fused kernel: float32 whatever the model's."""
    FUSED = "fused"
    """A kernel that keeps its scores on the chip (flash, memory-efficient, cuDNN)."""


class Mask(StrEnum):
    """What hides some keys from some queries: (Tq, Tk) elements, shared by all heads."""

    NONE = "none"
    CAUSAL = "causal"
    """Made where it is used: ``is_causal=True``, or a bool triangle built in the layer."""
    BOOL = "bool"
    """A bool mask that the caller made once for all layers."""
    FLOAT = "float"
    """An additive mask in the model's dtype that the caller made once for all layers."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor on the way from QKᵀ to PV."""

    name: str
    item_bytes: int
    is_mask: bool = False
    """(Tq, Tk) elements instead of B · H · Tq · Tk."""
    is_callers: bool = False
    """Made by the caller, once for all layers."""


@dataclass(frozen=True, slots=True)
class Op:
    """One op between QKᵀ and PV."""

    name: str
    makes: Copy | None = None
    """What the next op reads; None if it works in place, or makes what is linear in n."""
    beside: Copy | None = None
    """What it makes and uses besides: dropout's random mask."""
    saves: tuple[Copy, ...] = ()
    """What autograd keeps for its backward."""
    workspace: Copy | None = None
    """What it takes inside itself in forward."""
    copies_gradient: bool = True
    """Whether its backward makes a new tensor; adding a mask passes the gradient on."""
    within_next: bool = False
    """One call with the next op: what it reads lives until that one returns."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way from Q and K to the output, op by op."""

    ops: tuple[Op, ...]
    masks: tuple[Copy, ...] = ()
    """Masks that live until the forward ends, whatever reads them."""


def list_ops(
    path: ScorePath,
    *,
    dtype: str = "float32",
    mask: Mask = Mask.CAUSAL,
    dropout: bool = False,
    fused_dropout: bool = True,
) -> Recipe:
    """Return the ops of a path, with what each makes and saves.

    Raises:
        ValueError: The dtype is unknown or cannot be computed with.
    """
    item = item_bytes(dtype)
    if path is ScorePath.FUSED:
        return _fused(item, mask)
    if path is ScorePath.MATH:
        return _math(item, mask, dropout, fused_dropout)
    softmax_item = FLOAT32_BYTES if path is ScorePath.FP32_SOFTMAX else item
    return _eager(item, softmax_item, mask, dropout, fused_dropout)


def _eager(item: int, softmax_item: int, mask: Mask, dropout: bool, fused_dropout: bool) -> Recipe:
    """Q @ Kᵀ · scale, mask, softmax, dropout, @ V, one op each."""
    masked, masks = _eager_mask(item, mask)
    softmax = Copy("softmax", softmax_item)
    weights = softmax if softmax_item == item else Copy("weights", item)
    casts = softmax_item != item
    ops = [
        Op("QKᵀ", Copy("product", item)),
        Op("scale", Copy("scores", item)),
        *masked,
        *([Op("upcast", Copy("upcast", softmax_item), within_next=True)] if casts else []),
        Op("softmax", softmax, saves=(softmax,)),
        *([Op("downcast", weights)] if casts else []),
    ]
    return Recipe((*ops, *_values(weights, dropout, fused_dropout)), masks)


def _eager_mask(item: int, mask: Mask) -> tuple[list[Op], tuple[Copy, ...]]:
    """Return how an eager path masks, and the masks that live through its forward."""
    masked = Copy("masked", item)
    if mask is Mask.NONE:
        return [], ()
    if mask is Mask.FLOAT:
        given = Copy("mask", item, is_mask=True, is_callers=True)
        return [Op("add mask", masked, copies_gradient=False)], (given,)
    if mask is Mask.BOOL:
        hidden = Copy("mask", 1, is_mask=True, is_callers=True)
        return [Op("masked_fill", masked, saves=(hidden,))], (hidden,)
    past, hidden = Copy("past", 1, is_mask=True), Copy("mask", 1, is_mask=True)
    return [Op("masked_fill", masked, saves=(hidden,))], (past, hidden)


def _math(item: int, mask: Mask, dropout: bool, fused_dropout: bool) -> Recipe:
    """The fallback of aten: Q, K, V upcast before, mask added in place, a safe softmax.

    The safe softmax looks for rows without any key in a bool tensor of the scores' size. The
    weights are returned too, cast back, and nobody takes them.
    """
    wide = max(item, FLOAT32_BYTES)
    softmax = Copy("softmax", wide)
    bias = Copy("bias", wide if mask is Mask.CAUSAL else item, is_mask=True)
    masks = {
        Mask.NONE: (),
        Mask.CAUSAL: (bias,),
        Mask.BOOL: (Copy("mask", 1, is_mask=True, is_callers=True), bias),
        Mask.FLOAT: (replace(bias, is_callers=True),),
    }[mask]
    ops = (
        Op("QKᵀ", Copy("scores", wide)),
        *((Op("add mask", copies_gradient=False),) if masks else ()),
        Op("safe softmax", softmax, saves=(softmax,), workspace=Copy("is_hidden", 1)),
        *_values(softmax, dropout, fused_dropout),
        *((Op("downcast", Copy("returned", item), copies_gradient=False),) if wide > item else ()),
    )
    return Recipe(ops, masks)


def _values(weights: Copy, dropout: bool, fused_dropout: bool) -> tuple[Op, ...]:
    """Return the ops from the softmax's result to the product with V."""
    if not dropout:
        return (Op("PV", saves=(weights,)),)
    kept = Copy("dropout_mask", 1 if fused_dropout else weights.item_bytes)
    dropped = Copy("dropped", weights.item_bytes)
    return (
        Op("dropout", dropped, beside=kept, saves=(kept,)),
        Op("PV", saves=(dropped,)),
    )


def _fused(item: int, mask: Mask) -> Recipe:
    """One op that makes no scores; a mask it reads it also keeps, a bool one as a float copy."""
    if mask in (Mask.NONE, Mask.CAUSAL):
        return Recipe((Op("attention"),))
    if mask is Mask.FLOAT:
        given = Copy("mask", item, is_mask=True, is_callers=True)
        return Recipe((Op("attention", saves=(given,)),), (given,))
    given, bias = Copy("mask", 1, is_mask=True, is_callers=True), Copy("bias", item, is_mask=True)
    return Recipe((Op("attention", saves=(bias,)),), (given, bias))
