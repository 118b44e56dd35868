"""Which storages hold what goes into attention: Q, K, V and masks."""

from attnprof.attribution.calls import AttentionCall
from attnprof.attribution.facts import Facts
from attnprof.attribution.flow import Flow
from attnprof.attribution.origins import Origin
from attnprof.attribution.paths import is_inside
from attnprof.attribution.products import is_index, is_product


def find_io_storages(facts: Facts, flow: Flow, call: AttentionCall) -> set[int]:
    """Return the storages that hold Q, K, V and the output, from the projections on."""
    found: set[int] = set()
    todo = list(call.io_rows)
    seen: set[int] = set()
    while todo and len(seen) < 256:
        row = todo.pop()
        if row in seen:
            continue
        seen.add(row)
        made = int(facts.producer_row[row]) if facts.is_input[row] else row
        if made < 0:
            continue
        op = int(facts.row_op[made])
        path = facts.module_paths[facts.op_module[op]]
        if flow.origin.get(made) is not Origin.ACTIVATION or not is_inside(path, call.layer):
            continue
        found.add(int(facts.storage[made]))
        if op not in call.seconds and not is_product(facts, op):
            todo.extend(facts.rows_in(op))
    for op in call.seconds:
        found |= _find_copies(facts, op)
    return found


def _find_copies(facts: Facts, op: int) -> set[int]:
    """Return the storages of copies made of an op's result (a transpose made contiguous)."""
    found: set[int] = set()
    size = facts.signature_of(facts.rows_out(op)[0]).numel
    for user in facts.users_of(op):
        if len(facts.rows_in(user)) == 1 and not is_product(facts, user):
            found |= {
                int(facts.storage[out])
                for out in facts.rows_out(user)
                if facts.signature_of(out).numel == size
            }
    return found


def find_mask_storages(facts: Facts, flow: Flow, call: AttentionCall) -> set[int]:
    """Return the storages of the masks, and of what of their size they were made from."""
    least = max(2, call.q_len * call.k_len)
    found = {int(facts.storage[row]) for row in call.mask_rows}
    todo = [int(facts.producer_row[row]) for row in call.mask_rows]
    seen: set[int] = set()
    while todo and len(seen) < 512:
        row = todo.pop()
        if row < 0 or row in seen or row in flow.pair_of:
            continue
        seen.add(row)
        op = int(facts.row_op[row])
        if is_product(facts, op) or facts.is_backward[op]:
            continue
        for source in facts.rows_in(op):
            if facts.signature_of(source).numel >= least and not is_index(facts, source):
                found.add(int(facts.storage[source]))
                todo.append(int(facts.producer_row[source]))
    return found
