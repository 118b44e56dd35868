"""What each storage is for, from the most certain knowledge to the least."""

from typing import Any

import numpy as np

from attnprof.attribution.cache import Kept
from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts, Ints
from attnprof.attribution.flow import Flow
from attnprof.attribution.gradients import find_gradient_storages
from attnprof.attribution.operands import find_io_storages, find_mask_storages
from attnprof.attribution.pairs import Pattern
from attnprof.attribution.products import factors, is_product
from attnprof.vocabulary import Category, Role

CATEGORIES = list(Category)
"""Categories by code: `Labels.category` holds positions in this list."""
CODE = {category: code for code, category in enumerate(CATEGORIES)}

ROLE_CATEGORIES = {
    Role.PARAMETER: Category.PARAMETERS,
    Role.BUFFER: Category.BUFFERS,
    Role.GRADIENT: Category.GRADIENTS,
    Role.OPTIMIZER_STATE: Category.OPTIMIZER_STATE,
}


class Labels:
    """A category and a layer per storage; what was said first stands."""

    def __init__(self, storage_count: int) -> None:
        """Begin without labels."""
        self.category: Ints = np.full(storage_count, -1, np.int64)
        """Code of the category, or -1."""
        self.layer: Ints = np.full(storage_count, -1, np.int64)
        """Position in `layers`, or -1 where the op that made the storage says it."""
        self.layers: list[str] = []
        self._numbers: dict[str, int] = {}

    def put(self, storage: int, category: Category, layer: str) -> None:
        """Label a storage, unless it has a label."""
        if self.category[storage] < 0:
            self.category[storage] = CODE[category]
            self.layer[storage] = self.number_of(layer)

    def number_of(self, layer: str) -> int:
        """Return the position of a layer's path in `layers`, entering it if it is new."""
        number = self._numbers.get(layer)
        if number is None:
            number = self._numbers[layer] = len(self.layers)
            self.layers.append(layer)
        return number


def label_storages(
    facts: Facts,
    flow: Flow,
    calls: list[AttentionCall],
    kept: Kept,
    carried: dict[int, str],
    identities: list[dict[str, Any]],
    original: Ints,
) -> Labels:
    """Label storages: what the user said, then identity, then what data flow shows.

    Args:
        facts: The run's tables.
        flow: What its tensors are made from.
        calls: Its attention calls.
        kept: What outlives forwards: caches and states.
        carried: States of scans, with their layers.
        identities: What each storage is known to be.
        original: Per op, the one in forward that it repeats, or -1.
    """
    labels = Labels(facts.storage_count)
    for storage in kept.cache:  # also where a module registered it as a buffer
        labels.put(storage, Category.KV_CACHE, kept.layer_of(storage))
    _label_identities(facts, identities, labels)
    for storage in kept.state:
        labels.put(storage, Category.RECURRENT_STATE, kept.layer_of(storage))
    for storage, layer in carried.items():
        labels.put(storage, Category.RECURRENT_STATE, layer)
    for call in calls:
        _label_call(facts, flow, call, labels)
    _label_repeated(facts, original, labels)
    _label_backward(facts, calls, labels)
    _label_mask_gradients(facts, calls, labels)
    _label_sums(facts, calls, labels)
    return labels


def _label_identities(facts: Facts, identities: list[dict[str, Any]], labels: Labels) -> None:
    for row in identities:
        if row["role"] == Role.TAGGED and row["storage"] >= 0:
            labels.put(row["storage"], Category(row["category"]), row["layer"])
    layer_of: dict[int, str] = {}
    for row in identities:
        if row["role"] not in ROLE_CATEGORIES:
            continue
        owner = layer_of.get(row["owner"], "")
        layer = facts.module_paths[row["module"]] if row["module"] >= 0 else owner
        layer_of.setdefault(row["storage"], layer)
        labels.put(row["storage"], ROLE_CATEGORIES[Role(row["role"])], layer)
    for storage, parameter in find_gradient_storages(facts).items():
        labels.put(storage, Category.GRADIENTS, layer_of.get(parameter, ""))


def _label_call(facts: Facts, flow: Flow, call: AttentionCall, labels: Labels) -> None:
    stages = (
        (call.softmax_ops, Category.SOFTMAX),
        (call.score_ops, Category.ATTENTION_SCORES),
    )
    for ops, category in stages:
        for op in ops:
            for row in facts.rows_out(op):
                storage = int(facts.storage[row])
                # Compiled code hands kernels the memory that they write to.
                is_given = facts.born_by[storage] < 0 and facts.is_compiled[op]
                if facts.born_by[storage] == op or is_given:
                    labels.put(storage, category, call.layer)
    for row in call.softmax_rows:
        labels.put(int(facts.storage[row]), Category.SOFTMAX, call.layer)
    for storage in find_mask_storages(facts, flow, call):
        labels.put(storage, Category.ATTENTION_MASK, call.layer)
    if call.kind == "linear":
        for row in call.path_rows:
            labels.put(int(facts.storage[row]), Category.RECURRENT_STATE, call.layer)
    for storage in find_io_storages(facts, flow, call):
        labels.put(storage, Category.ATTENTION_IO, call.layer)
    for ops, category in stages:  # a room that scores are written to, query by query
        for op in ops:
            for row in facts.rows_out(op) if facts.mutates[facts.code[op]] else ():
                labels.put(int(facts.storage[row]), category, call.layer)


def _label_repeated(facts: Facts, original: Ints, labels: Labels) -> None:
    """Label what checkpointing makes again as it was in forward."""
    roles = {CODE[category] for category in ROLE_CATEGORIES.values()}
    for op in np.flatnonzero(original >= 0).tolist():
        pairs = zip(facts.rows_out(op), facts.rows_out(int(original[op])), strict=True)
        for row, row_before in pairs:
            storage, before = int(facts.storage[row]), int(facts.storage[row_before])
            is_born = facts.born_by[storage] == op and facts.born_by[before] == original[op]
            category = int(labels.category[before])
            if is_born and category >= 0 and category not in roles:
                labels.put(storage, CATEGORIES[category], labels.layers[labels.layer[before]])


def _label_backward(facts: Facts, calls: list[AttentionCall], labels: Labels) -> None:
    """Label gradients inside attention: of scores as scores, of softmax as softmax.

    A node's ops make gradients of its forward op's operands. Of those of PV, dP is as large as the
    scores and belongs to softmax; dV, which may be as large too, is the one made from P. The
    gradients of QKᵀ are dQ and dK. The softmax's own backward makes the gradient of its input: a
    score.
    """
    role: dict[int, tuple[AttentionCall, Category]] = {}
    for call in calls:
        results = {int(facts.row_op[row]) for row in call.result_rows}
        for op in call.ops:
            is_after = op in call.seconds or (op in call.softmax_ops and op not in results)
            role[op] = (call, Category.SOFTMAX if is_after else Category.ATTENTION_SCORES)
    for call in calls:
        for op in set(call.ops) - call.seconds:
            category = Category.SOFTMAX if op in call.softmax_ops else Category.ATTENTION_SCORES
            for view in facts.users_of(op):
                role.setdefault(view, (call, category))
    if not role:
        return
    is_wanted = np.zeros(facts.count + 1, np.bool_)  # the last entry is for ops without a node
    is_wanted[list(role)] = True
    for op in np.flatnonzero(is_wanted[facts.forward_op]).tolist():
        call, category = role[int(facts.forward_op[op])]
        # Products of QKᵀ's node are dQ and dK; a sum there is the gradient of a bias. Of a sum of
        # queries and keys it is dQ or dK.
        is_first = int(facts.forward_op[op]) in call.firsts and (
            is_product(facts, op) or call.pattern is Pattern.SUMS
        )
        for row in facts.rows_out(op):
            storage = int(facts.storage[row])
            if facts.born_by[storage] != op:
                continue
            is_score = bool(call.score_ops) and facts.signature_of(row).numel >= call.score_numel
            is_io = is_first or not is_score or _is_gradient_of_values(facts, call, op)
            if is_io and not is_first and _is_gradient_of_mask(facts, call, op, row):
                labels.put(storage, Category.ATTENTION_MASK, call.layer)
            labels.put(storage, Category.ATTENTION_IO if is_io else category, call.layer)


def _is_gradient_of_mask(facts: Facts, call: AttentionCall, op: int, row: int) -> bool:
    """Return whether a backward op sums gradients of scores up to the size of what was added."""
    joined = facts.rows_in(int(facts.forward_op[op]))
    shape = facts.signature_of(row).shape
    return facts.signature_of(row).numel >= max(2, call.q_len * call.k_len) and any(
        r in call.mask_rows and _strip(facts.signature_of(r).shape) == _strip(shape) for r in joined
    )


def _label_mask_gradients(facts: Facts, calls: list[AttentionCall], labels: Labels) -> None:
    """Label the gradients of what masks were made of, such as a bias that is learned."""
    least: dict[int, int] = {}
    for call in calls:
        layer, size = labels.number_of(call.layer), max(2, call.q_len * call.k_len)
        least[layer] = min(size, least.get(layer, size))
    masks = np.flatnonzero(labels.category == CODE[Category.ATTENTION_MASK])
    masks = masks[(facts.born_by[masks] >= 0) & np.isin(labels.layer[masks], list(least))]
    maker = dict(zip(facts.born_by[masks].tolist(), labels.layer[masks].tolist(), strict=True))
    for op in np.flatnonzero(np.isin(facts.forward_op, list(maker))).tolist():
        layer = maker[int(facts.forward_op[op])]
        for row in facts.rows_out(op):
            storage = int(facts.storage[row])
            if facts.born_by[storage] == op and facts.signature_of(row).numel >= least[layer]:
                labels.put(storage, Category.ATTENTION_MASK, labels.layers[layer])


def _strip(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without dimensions of size 1."""
    return tuple(size for size in shape if size > 1)


def _is_gradient_of_values(facts: Facts, call: AttentionCall, op: int) -> bool:
    """Return whether a backward op multiplies what the second product multiplied by V."""
    second = int(facts.forward_op[op])
    if second not in call.seconds or not is_product(facts, op):
        return False
    read = {int(facts.storage[row]) for row in facts.rows_in(op)}
    return any(
        int(facts.storage[row]) in read
        for row in factors(facts, second)
        if int(facts.row_op[facts.producer_row[row]]) in call.softmax_ops
    )


def _label_sums(facts: Facts, calls: list[AttentionCall], labels: Labels) -> None:
    """Label what backward makes of gradients of scores outside of any node: sums, and copies."""
    sizes = [call.score_numel for call in calls if call.score_ops and call.score_numel]
    if not sizes:
        return
    numel = np.where(facts.birth_row >= 0, facts.numel_of_rows(facts.birth_row), 0)
    large = np.flatnonzero((labels.category < 0) & (numel >= min(sizes)))
    large = large[facts.is_backward[facts.born_by[large]]]
    own = (Category.SOFTMAX, Category.ATTENTION_SCORES, Category.ATTENTION_MASK)
    scores = {CODE[category] for category in own}
    for storage in large[np.argsort(facts.born_by[large], kind="stable")].tolist():
        op = int(facts.born_by[storage])
        if is_product(facts, op):
            continue
        for row in facts.rows_in(op):
            source = int(facts.storage[row])
            is_score = int(labels.category[source]) in scores
            if is_score and facts.signature_of(row).numel == int(numel[storage]):
                labels.category[storage] = labels.category[source]
                labels.layer[storage] = labels.layer[source]
                break
