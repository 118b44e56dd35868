"""The vocabulary head and its cross entropy, in chunks of tokens."""

import re
from dataclasses import dataclass

import numpy as np

from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.products import is_product
from attnprof.vocabulary import Category, Role

_LOG_SOFTMAX = re.compile(r"^_?log_softmax$")
_LOSS = re.compile(r"nll_loss")
_LEAST_PART = 0.5
"""A tensor counts as one of logits if it has at least this part of their elements: shifting the
labels by one leaves out a token, padding to a multiple adds some."""
_FIRST_FORM = ((2, 13), (2, 15))
"""The releases, the last left out, whose function takes chunks of half the size and makes zeros.

2.13 and 2.15 were read; 2.14 is taken for the former. Runs of older releases, which have no such
function, are told what the newest would do. Nothing in a run but torch's version says it."""
_ITEM_BYTES = 4
"""Chunks of logits are float32."""


@dataclass(frozen=True, slots=True)
class _Head:
    """A product with a parameter whose result goes into a cross entropy."""

    product: int
    """The op that makes the logits."""
    ops: list[int]
    """The ops of forward from the logits to the loss."""
    tokens: int
    vocabulary: int
    features: int
    """What the product contracts."""


def chunk_loss(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Compute logits and their cross entropy for a chunk of tokens at a time.

    Logits, their casts, their log-softmax and all of their gradients become one buffer for a
    chunk, which is gone when the loss is known. The gradients of the head's input and weight are
    made there and then, and wait for backward.
    """
    heads = _find_heads(scene)
    if not heads:
        raise DoesNotApply("no cross entropy follows a product with a parameter")
    lost = {s for head in heads for s in _list_logits(scene, head)}
    gone = scene.is_storage(table, lost) & ~table.is_of(*_KEPT)
    held = scene.size_of_held(table, gone)
    largest = max(heads, key=lambda head: head.tokens * head.vocabulary)
    is_first_form = _has_first_form(scene)
    result = _make_gradients_early(scene, table.drop(gone), heads, makes_zeros=is_first_form)
    sizes = [_chunk_tokens(head, is_first_form=is_first_form) for head in heads]
    result = result.add(_make_buffers(scene, table, heads, sizes))
    change = Change(
        title="Cross entropy in chunks",
        evidence=f"logits of {largest.tokens} tokens × {largest.vocabulary} words, with their "
        f"log-softmax and gradients, hold {scene.say_share(held)} of the peak",
        how="torch.nn.functional.linear_cross_entropy(x, head.weight, labels, "
        "options=torch.nn.LinearCrossEntropyOptions()) from torch 2.13 on; in transformers: "
        "use_liger_kernel=True",
        assumes=(f"chunks are of {sizes[heads.index(largest)]} tokens, as torch chooses them",),
        exact=False,
    )
    return result, change


_KEPT = (Category.GRADIENTS, Category.PARAMETERS)


def _find_heads(scene: Scene) -> list[_Head]:
    facts = scene.facts
    codes = [i for i, name in enumerate(facts.short_names) if _LOG_SOFTMAX.search(name)]
    ops = np.flatnonzero(np.isin(facts.code, codes) & ~facts.is_backward)
    return [head for op in ops.tolist() if (head := _trace_head(scene, op)) is not None]


def _trace_head(scene: Scene, log_softmax: int) -> _Head | None:
    """Follow the input of a log-softmax back to the product with a parameter that made it."""
    facts = scene.facts
    losses = [
        user
        for user in facts.users_of(log_softmax)
        if _LOSS.search(facts.short_names[facts.code[user]])
    ]
    if not losses:
        return None
    row = facts.rows_in(log_softmax)[0]
    logits = facts.signature_of(row)
    vocabulary = logits.shape[-1] if logits.numel else 0
    ops = [log_softmax, *losses]
    while (made := int(facts.producer_row[row])) >= 0 and vocabulary:
        op = int(facts.row_op[made])
        rows = facts.rows_in(op)
        if is_product(facts, op):
            owned = [r for r in rows if scene.roles.get(int(facts.storage[r])) == Role.PARAMETER]
            weight = max((facts.signature_of(r).numel for r in owned), default=0)
            features = weight // vocabulary
            tokens = logits.numel // vocabulary
            return _Head(op, ops, tokens, vocabulary, features) if features else None
        ops.append(op)
        if not rows:
            break
        row = max(rows, key=lambda r: facts.signature_of(r).numel)
    return None


def _list_logits(scene: Scene, head: _Head) -> set[int]:
    """Return the storages that hold a number per token and word, gradients included."""
    facts = scene.facts
    least = _LEAST_PART * head.tokens * head.vocabulary
    ops = [head.product, *head.ops, *scene.ops_differentiating(head.ops)]
    return {
        int(facts.storage[row])
        for op in ops
        for row in facts.rows_out(op)
        if facts.signature_of(row).numel >= least and facts.born_by[facts.storage[row]] == op
    }


def _make_gradients_early(
    scene: Scene, table: Table, heads: list[_Head], *, makes_zeros: bool
) -> Table:
    """Let the gradients of a head's input and weight begin where its logits did.

    When torch's function is differentiated, its first form also has zeros of their shapes for a
    moment, in place of the gradients of those gradients.
    """
    facts = scene.facts
    made_at = np.full(facts.storage_count, facts.count, np.int64)
    used_at = made_at.copy()
    """Per storage of a gradient, the op that makes the logits and the first of backward."""
    for head in heads:
        backward = scene.ops_differentiating([head.product, *head.ops])
        for op in scene.ops_differentiating([head.product]):
            made = facts.storage[list(facts.rows_out(op))]
            made = made[facts.born_by[made] == op]
            made_at[made], used_at[made] = head.product, backward[0]
    early = made_at[table.storage] < facts.count
    zeros = table.take(early)
    used = used_at[zeros.storage]
    zeros = zeros.move(table.at(scene.event_before(used)), table.at(scene.event_after(used)))
    zeros = zeros.relabel(np.ones(len(zeros), np.bool_), category=Category.TEMPORARIES)
    begin = table.at(scene.event_before(made_at))[table.storage]
    start = np.where(early, np.minimum(table.start, begin), table.start)
    moved = table.move(start, table.end)
    return moved.add(zeros) if makes_zeros else moved


def _make_buffers(scene: Scene, table: Table, heads: list[_Head], tokens: list[int]) -> Table:
    """Return the buffers for a chunk of logits, each from where its logits began to the loss."""
    facts = scene.facts
    number = np.full(facts.storage_count, -1, np.int64)
    number[[facts.storage[facts.rows_out(head.product)[0]] for head in heads]] = range(len(heads))
    logits = table.take(number[table.storage] >= 0)
    of = number[logits.storage]
    end = table.at(scene.event_after(np.array([max(head.ops) for head in heads])))
    words = [head.vocabulary for head in heads]
    size = _ITEM_BYTES * np.array(tokens) * np.array(words)
    everything = np.ones(len(logits), np.bool_)
    buffers = logits.move(logits.start, end[of]).resize(everything, size[of])
    return buffers.relabel(everything, category=Category.TEMPORARIES)


def _has_first_form(scene: Scene) -> bool:
    """Return whether the torch that recorded a run has the function's first form."""
    recorded = str((scene.facts.stored.info.get("environment") or {}).get("torch", ""))
    number = re.match(r"(\d+)\.(\d+)", recorded)
    first, end = _FIRST_FORM
    return number is not None and first <= (int(number[1]), int(number[2])) < end


def _chunk_tokens(head: _Head, *, is_first_form: bool) -> int:
    """Return how many tokens torch takes at a time.

    So many that their logits are as large as the head's input, rounded up to a power of 2, but
    no more than a quarter of all logits divided by the features, rounded down to one; in the
    first form half as many, without that limit:
    https://github.com/pytorch/pytorch/blob/v2.15.0/torch/nn/modules/linear_cross_entropy_options.py
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/linear_cross_entropy_options.py
    """
    wanted = -(-head.tokens // -(-head.vocabulary // head.features))
    power: int = 1 << (wanted - 1).bit_length()
    if is_first_form:
        return max(1, min(power // 2, head.tokens))
    most = max(1, head.tokens * head.vocabulary // (4 * head.features))
    return min(power, head.tokens, 1 << (most.bit_length() - 1))
