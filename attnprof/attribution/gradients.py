"""Which storages are parameters' gradients, by what autograd itself does with them."""

import numpy as np

from attnprof.attribution.facts import Facts


def find_gradient_storages(facts: Facts) -> dict[int, int]:
    """Return storages that an AccumulateGrad node stored in ``.grad``, with their parameter's.

    The node either keeps the gradient it is given (it detaches it), adds into the one that is
    there, or makes a new one; in every case what its op returns is the parameter's gradient.
    """
    ops = np.flatnonzero(facts.node <= -2)
    found: dict[int, int] = {}
    for op in ops.tolist():
        for row in facts.rows_out(op):
            found[int(facts.storage[row])] = int(-2 - facts.node[op])
    return found
