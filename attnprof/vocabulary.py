"""The closed lists of words attnprof uses for bytes, times and facts."""

from enum import StrEnum


class Category(StrEnum):
    """What a block of memory is for. The categories at an instant sum to all live bytes."""

    PARAMETERS = "parameters"
    BUFFERS = "buffers"
    GRADIENTS = "gradients"
    """Gradients of parameters: what an optimizer reads."""
    OPTIMIZER_STATE = "optimizer_state"
    INPUTS = "inputs"
    """Batches and other data the program hands to the model."""
    ATTENTION_SCORES = "attention_scores"
    """All from QKᵀ up to the softmax's input (scaled, masked, upcast copies), and its gradients."""
    SOFTMAX = "softmax"
    """The softmax's result and all made from it until PV, and its gradients."""
    ATTENTION_MASK = "attention_mask"
    """Masks and biases broadcast against the scores, float copies of bool masks included."""
    ATTENTION_IO = "attention_io"
    """Q, K, V, the output and log-sum-exp: linear in the sequence length."""
    KV_CACHE = "kv_cache"
    """Storages that hold K or V (or the latent) of past tokens and outlive the forward."""
    RECURRENT_STATE = "recurrent_state"
    """What a linear, recurrent or state-space layer carries from token to token."""
    ACTIVATIONS = "activations"
    """Other storages saved for backward."""
    TEMPORARIES = "temporaries"
    """Storages freed before backward needs anything of them."""
    WORKSPACE = "workspace"
    """Taken inside an op and not returned by it."""
    PREEXISTING = "preexisting"
    """Live before the trace began, and not told apart further."""
    UNATTRIBUTED = "unattributed"
    """Seen, counted, and not explained. Never spread over the others."""


class Phase(StrEnum):
    """What the program was doing."""

    FORWARD = "forward"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"
    """A forward repeated during backward by gradient checkpointing."""
    OPTIMIZER = "optimizer"
    PREFILL = "prefill"
    """A forward without gradients that fills a KV cache with a prompt."""
    DECODE = "decode"
    """A forward without gradients that extends a KV cache."""
    OUTSIDE = "outside"


class Role(StrEnum):
    """What the program itself says a storage is: facts, recorded, never inferred."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    GRADIENT = "gradient"
    OPTIMIZER_STATE = "optimizer_state"
    INPUT = "input"
    """Handed to a module that the program called itself."""
    TAGGED = "tagged"
    """Named by the user with ``attnprof.tag``."""


class Status(StrEnum):
    """How a run ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    INTERRUPTED = "interrupted"
    RECORDING = "recording"


class Detail(StrEnum):
    """How much of a training loop is recorded."""

    AUTO = "auto"
    """On CUDA the first steps, and those after a higher peak; of the others what the allocator
    counts. Elsewhere every step."""
    FULL = "full"
    """Every step."""


class AttentionKind(StrEnum):
    """How an attention layer does its work, read from its products and what they contract."""

    MATERIALISED = "materialised"
    """A (Tq, Tk) score matrix exists in memory."""
    FUSED = "fused"
    """One op takes Q, K and V; no score matrix reaches memory."""
    BANDED = "banded"
    """Scores exist, for a window, band or chunk of the keys only."""
    LOW_RANK = "low_rank"
    """Scores exist against a fixed number of landmarks or projections."""
    LINEAR = "linear"
    """The token dimension is contracted first: keys times values, then queries."""
    RECURRENT = "recurrent"
    """A state is carried from token to token; there are no scores."""
    OPAQUE = "opaque"
    """One op holds the whole layer; its scores live and die inside it, unseen."""
