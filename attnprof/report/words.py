"""What reports say in a few words: what a category means, how long something took."""

from attnprof.vocabulary import Category

OUTSIDE = "(no module)"
"""What a block is said to belong to when no module made it."""

NO_TENSORS = (
    "the workload makes no tensors; see that the function that make_step returns runs the model"
)

MEANINGS: dict[Category, str] = {
    Category.PARAMETERS: "the model's weights",
    Category.BUFFERS: "tensors of the model that are not trained",
    Category.GRADIENTS: "gradients of parameters",
    Category.OPTIMIZER_STATE: "what the optimizer keeps per parameter",
    Category.PREEXISTING: "live before recording began",
    Category.INPUTS: "batches and other data",
    Category.ACTIVATIONS: "saved in forward for backward",
    Category.TEMPORARIES: "freed before backward needs them",
    Category.ATTENTION_IO: "Q, K, V, output, log-sum-exp: linear in n",
    Category.KV_CACHE: "keys and values of past tokens",
    Category.RECURRENT_STATE: "state carried from token to token",
    Category.ATTENTION_MASK: "masks and biases of the scores' shape",
    Category.ATTENTION_SCORES: "QKᵀ up to the softmax, and its gradients",
    Category.SOFTMAX: "softmax results up to PV, and their gradients",
    Category.WORKSPACE: "taken inside an op and given back",
    Category.UNATTRIBUTED: "seen and counted, not explained",
}


def explain(category: str) -> str:
    """Return what a category means, or nothing for a word this version does not know."""
    try:
        return MEANINGS[Category(category)]
    except ValueError:
        return ""


def format_seconds(seconds: float) -> str:
    """Return a duration: ``"12.3 s"``, ``"840 ms"``, ``"0.2 ms"``."""
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
