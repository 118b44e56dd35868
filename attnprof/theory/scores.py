"""What lies between QKᵀ and PV, copy by copy, in bytes: every instant of a training step.

Symbols: B batch, H query heads, Tq and Tk query and key lengths (n each in self-attention). One
*score* is one of the B · H · Tq · Tk elements of QKᵀ.

Three rules of eager PyTorch say what is live while each op of a recipe (`list_ops`) runs:

1. A copy dies when the op that reads it returns, unless autograd saved it. This is what rebinding
   a name does (``scores = scores + mask``); a program that keeps the name keeps the copy.
2. Backward runs the ops in reverse. Each makes the gradient of its input in the input's dtype while
   the gradient of its output lives, then gives back what it had saved.
3. What an op takes inside itself is gone when it returns (workspace).

The tests run the recipes as PyTorch and compare bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from attnprof.theory.recipes import Copy, Mask, Op, Recipe, ScorePath, list_ops
from attnprof.vocabulary import Phase


@dataclass(frozen=True, slots=True)
class Instant:
    """What is live while one op runs."""

    phase: Phase
    op: str
    tensors: dict[str, int]
    """Bytes by copy."""
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.tensors.values()) + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class ScoreMemory:
    """What one attention layer holds between QKᵀ and PV."""

    scores: int
    """B · H · Tq · Tk."""
    instants: tuple[Instant, ...]
    """One per op, in the order in which they run."""
    saved: dict[str, int]
    """Bytes that autograd keeps from forward to backward, by copy; the layer's own."""
    saved_of_caller: dict[str, int]
    """The same for masks that all layers share: once per model."""

    def peak_bytes(self, phase: Phase, *, workspace: bool = True) -> int:
        """Return the most bytes live at an instant of a phase; 0 if nothing is.

        Args:
            phase: Forward or backward.
            workspace: Count what ops take inside themselves. An allocator sees it; a trace
                without an allocator's history (on the CPU) does not.
        """
        return max(
            (i.total_bytes if workspace else sum(i.tensors.values()) for i in self.instants
             if i.phase is phase),
            default=0,
        )  # fmt: skip

    @property
    def saved_bytes(self) -> int:
        """What one layer keeps for backward, shared masks included."""
        return sum(self.saved.values()) + sum(self.saved_of_caller.values())

    def saved_by_layers(self, layers: int) -> int:
        """Return what so many layers keep for backward; masks of the caller count once."""
        return layers * sum(self.saved.values()) + sum(self.saved_of_caller.values())

    def per_score(self, size_bytes: int) -> float:
        """Return bytes per score."""
        return size_bytes / self.scores


def predict_scores(
    path: ScorePath,
    *,
    batch: int,
    heads: int,
    q_len: int,
    k_len: int,
    dtype: str = "float32",
    mask: Mask = Mask.CAUSAL,
    dropout: bool = False,
    training: bool = True,
    mask_count: int = 1,
    fused_dropout: bool = True,
) -> ScoreMemory:
    """Return what one attention layer holds between QKᵀ and PV, in bytes.

    With grouped or shared keys (GQA, MQA) there are as many scores as query heads demand. For a
    banded implementation give the keys that each query meets as ``k_len`` (`keys_per_query`); a
    window that is only a mask saves nothing.

    Args:
        path: How it is computed.
        batch: B.
        heads: H, query heads.
        q_len: Tq.
        k_len: Tk.
        dtype: What Q, K and V are in.
        mask: What hides keys.
        dropout: Whether softmax results are dropped.
        training: Whether autograd keeps what backward needs.
        mask_count: How many different masks there are: 1, or B when sequences are padded.
        fused_dropout: Whether dropout is one op that keeps a bool mask (CUDA) or a product with a
            float mask (CPU).

    Raises:
        ValueError: A size is below 1, or the dtype is unknown.
    """
    for name, size in (("batch", batch), ("heads", heads), ("q_len", q_len), ("k_len", k_len)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    ops = list_ops(path, dtype=dtype, mask=mask, dropout=dropout, fused_dropout=fused_dropout)
    scores = batch * heads * q_len * k_len
    return follow_ops(ops, scores=scores, mask_size=mask_count * q_len * k_len, training=training)


def keys_per_query(*, before: int, after: int = 0, block: int = 1) -> int:
    """Return how many keys each query's row of scores has in a banded implementation.

    Queries are taken in blocks, and each block is multiplied with the keys of the whole window of
    all its queries: ``block + before + after``. Longformer takes blocks as wide as one side of its
    window (arXiv 2004.05150), so 3 w keys for w on each side, or 2 w for the past only.

    Args:
        before: Past keys that a query may see, itself not counted.
        after: Future keys that it may see.
        block: Queries per block.
    """
    return block + before + after


def follow_ops(
    recipe: Recipe, *, scores: int, mask_size: int, training: bool = True
) -> ScoreMemory:
    """Run a path's ops in thought, forward and (in training) backward.

    Args:
        recipe: The ops.
        scores: Elements of the scores.
        mask_size: Elements of a mask.
        training: Whether autograd keeps what backward needs.
    """

    def size_of(copy: Copy) -> int:
        return copy.item_bytes * (mask_size if copy.is_mask else scores)

    moments = _run_forward(recipe, training=training)
    moments += _run_backward(recipe) if training else []
    instants = tuple(
        Instant(
            moment.phase,
            moment.op.name,
            {copy.name: size_of(copy) for copy in moment.live},
            0 if moment.workspace is None else size_of(moment.workspace),
        )
        for moment in moments
    )
    # a softmax's result is saved by the softmax and by the product, and counts once
    kept = dict.fromkeys(copy for op in recipe.ops for copy in op.saves) if training else {}
    return ScoreMemory(
        scores=scores,
        instants=instants,
        saved={copy.name: size_of(copy) for copy in kept if not copy.is_callers},
        saved_of_caller={copy.name: size_of(copy) for copy in kept if copy.is_callers},
    )


class _Moment(NamedTuple):
    phase: Phase
    op: Op
    live: list[Copy]
    workspace: Copy | None = None


def _run_forward(recipe: Recipe, *, training: bool) -> list[_Moment]:
    """Return what is live while each op runs."""
    moments = []
    saved: list[Copy] = []
    current = held = None
    for op in recipe.ops:
        live = (*recipe.masks, *saved, held, current, op.makes, op.beside)
        moments.append(_Moment(Phase.FORWARD, op, _drop_none(live), op.workspace))
        saved += op.saves if training else ()
        held = current if op.within_next else None
        current = op.makes or current
    return moments


def _run_backward(recipe: Recipe) -> list[_Moment]:
    """Return what is live while each op is differentiated, the last one first."""
    saved = [copy for op in recipe.ops for copy in op.saves]
    made = [op.makes for op in recipe.ops]
    moments = []
    gradient: Copy | None = None
    for number, op in reversed(list(enumerate(recipe.ops))):
        incoming = gradient
        if op.copies_gradient:
            entered = next((copy for copy in reversed(made[:number]) if copy is not None), None)
            gradient = None if entered is None else replace(entered, name=f"∂{entered.name}")
        moments.append(_Moment(Phase.BACKWARD, op, _drop_none((*saved, incoming, gradient))))
        del saved[len(saved) - len(op.saves) :]
    return moments


def _drop_none(copies: Iterable[Copy | None]) -> list[Copy]:
    return [copy for copy in copies if copy is not None]
