"""Which modules the ops inside compiled code work for.

`torch.compile` makes one region of many modules: their element-wise ops become kernels that no op
shows, and what is left are calls of other kernels, such as matrix products. Those read parameters,
and whose they are is known; in backward they write parameters' gradients. An op that touches no
parameter works for the innermost module that contains its neighbours: the product of scores,
between the projections of Q, K and V and that of the output, for their attention layer.

Weights that fused code casts first (autocast) are read by no visible op. What products multiply by
is lined up with the parameters by size and order, as far as that leaves no choice. Backward
multiplies by the same casts, and beside it makes the weights' gradients.

Known limitations:
    The order of kernels is the compiler's. Where it moves one far from its place, its module is
    wrong; nothing that is concluded here is called exact.
"""

import numpy as np

from attnprof.attribution.alignment import align, count_matches
from attnprof.attribution.facts import ITEM_BYTES, Facts, Ints
from attnprof.attribution.gradients import find_gradient_storages
from attnprof.attribution.paths import common_path, is_inside
from attnprof.attribution.products import factors, is_matrix_product
from attnprof.vocabulary import Role


def locate_ops(facts: Facts) -> Ints:
    """Return per op the module whose forward it ran in; in compiled code, the one it works for."""
    own = facts.op_module
    if not facts.is_compiled.any():
        return own
    result = own.copy()
    parameters, gradients = _find_owners(facts)
    casts: dict[int, int] = {}
    numbers = {path: number for number, path in enumerate(facts.module_paths[:-1])}
    for ops in _list_regions(facts):
        root = facts.module_paths[own[_first_forward(facts, int(ops[0]))]]
        modules = _read_modules(facts, ops.tolist(), parameters | casts, gradients)
        if facts.is_backward[ops[0]]:
            _find_weight_gradients(facts, ops.tolist(), modules, casts)
        else:
            _find_casts(facts, ops.tolist(), modules, parameters, casts)
        located = [_take_inside(facts, module, root) for module in modules]
        for op, path in zip(ops.tolist(), _fill(located, root), strict=True):
            result[op] = numbers.get(path, own[op])
    return result


def _find_owners(facts: Facts) -> tuple[dict[int, int], dict[int, int]]:
    """Return the modules of parameters and of their gradients, per storage."""
    table = facts.stored.table("identities")
    columns = (table[name].to_pylist() for name in ("storage", "role", "module"))
    found: dict[str, dict[int, int]] = {Role.PARAMETER: {}, Role.GRADIENT: {}}
    for storage, role, module in zip(*columns, strict=True):
        if role in found and module >= 0:
            found[role][storage] = module
    parameters, gradients = found[Role.PARAMETER], found[Role.GRADIENT]
    for storage, parameter in find_gradient_storages(facts).items():
        if parameter in parameters:
            gradients.setdefault(storage, parameters[parameter])
    return parameters, gradients


def _first_forward(facts: Facts, op: int) -> int:
    return int(facts.forward_op[op]) if facts.is_backward[op] else op


def _list_regions(facts: Facts) -> list[Ints]:
    """Return the ops of every call of compiled code, in order; those of its backward apart."""
    ops = np.flatnonzero(facts.is_compiled[:-1])
    scopes, which = np.unique(facts.scope[ops], return_inverse=True)
    outermost = np.array([_outermost_compiled(facts, scope) for scope in scopes.tolist()], np.int64)
    scope = outermost[which]
    keys = np.stack([facts.thread[ops], facts.is_backward[ops], facts.node[ops], scope], axis=1)
    keys[~facts.is_backward[ops], 2] = 0
    _, region = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(region.ravel(), kind="stable")
    borders = np.flatnonzero(np.diff(region.ravel()[order])) + 1
    return [part for part in np.split(ops[order], borders) if len(part)]


def _outermost_compiled(facts: Facts, scope: int) -> int:
    found = -1
    while scope >= 0:
        if facts.is_compiled_scope[scope]:
            found = scope
        scope = facts.parent_of_scope.get(scope, -1)
    return found


def _read_modules(
    facts: Facts, ops: list[int], parameters: dict[int, int], gradients: dict[int, int]
) -> list[int]:
    """Return per op the module whose parameter it reads, or whose gradient it writes, or -1."""
    # Memory is used again: it is the gradient's from the last time that it is written.
    last_write = {int(facts.storage[row]): op for op in ops for row in facts.rows_out(op)}
    found = []
    for op in ops:
        read = (parameters.get(int(facts.storage[row]), -1) for row in facts.rows_in(op))
        written = {int(facts.storage[row]) for row in facts.rows_out(op)}
        made = (gradients.get(s, -1) for s in written if last_write[s] == op)
        found.append(next((m for m in (*read, *made) if m >= 0), -1))
    return found


def _find_casts(
    facts: Facts,
    ops: list[int],
    modules: list[int],
    parameters: dict[int, int],
    casts: dict[int, int],
) -> None:
    """Enter the modules of products by cast weights into ``modules``, and of the casts.

    Args:
        facts: The run's tables.
        ops: Those of a compiled forward, in order.
        modules: Per op its module, or -1.
        parameters: The modules of parameters, in the order in which models list them.
        casts: Gets the modules of storages that hold a cast.
    """
    products = [
        (position, factors(facts, op)[1])
        for position, op in enumerate(ops)
        if modules[position] < 0 and _multiplies_a_matrix(facts, op)
    ]
    if not products:
        return  # weights are read as they are
    read = {int(facts.storage[row]) for op in ops for row in facts.rows_in(op)}
    weights = [storage for storage in parameters if storage not in read]
    # What autocast casts is float32.
    sizes = (facts.storage_bytes[weights] // ITEM_BYTES["float32"]).tolist()
    numels = tuple(facts.signature_of(row).numel for _, row in products)
    # Where weights are used in another order than they are listed in, matches are of other layers.
    wanted = sum(numel in sizes for numel in numels)
    if count_matches(numels, tuple(sizes)) < wanted:
        return
    for (position, row), at in zip(products, align(numels, tuple(sizes)), strict=True):
        if at >= 0:
            modules[position] = parameters[weights[at]]
            casts[int(facts.storage[row])] = modules[position]


def _find_weight_gradients(
    facts: Facts, ops: list[int], modules: list[int], casts: dict[int, int]
) -> None:
    """Enter into ``modules`` the modules of products that make the gradients of cast weights.

    Beside each stands the product by the weight itself: with the same gradient of the layer's
    result as its left factor, and as many numbers on its right as the weight's gradient has.
    """
    known: dict[tuple[int, int], list[int]] = {}
    open_positions = []
    for position, op in enumerate(ops):
        if not _multiplies_a_matrix(facts, op):
            continue
        left, right = factors(facts, op)
        if int(facts.storage[right]) in casts:
            key = int(facts.storage[left]), facts.signature_of(right).numel
            known.setdefault(key, []).append(position)
        elif modules[position] < 0:
            numel = facts.signature_of(facts.rows_out(op)[0]).numel
            open_positions.append((position, (int(facts.storage[left]), numel)))
    # Memory is used again: the nearest two have the same gradient on their left.
    near = sorted(
        (abs(other - position), position, other)
        for position, key in open_positions
        for other in known.get(key, ())
    )
    taken: set[int] = set()
    for _, position, other in near:
        if other not in taken and modules[position] < 0:
            modules[position] = modules[other]
            taken.add(other)


def _multiplies_a_matrix(facts: Facts, op: int) -> bool:
    """Return whether an op multiplies rows by a matrix, as a linear layer does."""
    if not is_matrix_product(facts, op):
        return False
    rows, right = facts.rows_in(op), factors(facts, op)[1]
    return right in rows and len(facts.signature_of(right).shape) == 2


def _take_inside(facts: Facts, module: int, root: str) -> str | None:
    """Return the path of a module, if it lies inside of the one that was compiled."""
    path = facts.module_paths[module] if module >= 0 else None
    return path if path is not None and is_inside(path, root) else None


def _fill(located: list[str | None], root: str) -> list[str]:
    """Return a module for every op: its own, else the one that contains its neighbours."""
    before: list[str] = []
    for path in located:
        before.append(path if path is not None else (before[-1] if before else root))
    after: list[str] = []
    for path in reversed(located):
        after.append(path if path is not None else (after[-1] if after else root))
    pairs = zip(located, before, reversed(after), strict=True)
    return [path if path is not None else common_path([a, b]) for path, a, b in pairs]
