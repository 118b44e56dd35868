"""What is known of one attention call."""

from dataclasses import dataclass, field

from attnprof.attribution.facts import ITEM_BYTES
from attnprof.attribution.pairs import Pattern
from attnprof.vocabulary import AttentionKind


@dataclass(frozen=True, slots=True)
class Extent:
    """What attends to what: B sequences, H heads, Tq queries, Tk keys."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int


@dataclass(slots=True)
class AttentionCall:
    """One call of one attention layer, as the ops show it."""

    kind: AttentionKind
    layer: str
    ops: list[int]
    """All its ops: products, what lies between, what passes by; ascending."""
    score_ops: set[int] = field(default_factory=set)
    """From the first product up to the normaliser's input."""
    softmax_ops: set[int] = field(default_factory=set)
    """From the normaliser to the second product."""
    firsts: set[int] = field(default_factory=set)
    seconds: set[int] = field(default_factory=set)
    score_numel: int = 0
    """Elements of the smallest matrix of scores that a second product takes in."""
    result_rows: list[int] = field(default_factory=list)
    """Output rows of the normaliser: the softmax results."""
    path_rows: list[int] = field(default_factory=list)
    """Output rows on the way from the first product to the second, as large as scores."""
    mask_rows: list[int] = field(default_factory=list)
    """Operand rows of masks and biases broadcast against the scores."""
    softmax_rows: list[int] = field(default_factory=list)
    """Operand rows joined with the normalised scores, such as a dropout mask made elsewhere."""
    io_rows: list[int] = field(default_factory=list)
    """Operand rows of Q, K, V and the output."""
    key_rows: list[int] = field(default_factory=list)
    """Of `io_rows`, the operands that may hold K or V."""
    keys_row: int = -1
    """Of `key_rows`, the operand that holds K, as it is multiplied or given to the kernel."""
    key_repeats: int = 1
    """How often that operand repeats every head of K."""
    pattern: Pattern | None = None
    """What the first product makes; None for single ops."""
    is_recompute: bool = False
    has_normaliser: bool = False
    has_dropout: bool = False
    batch: int = 0
    heads: int = 0
    kv_heads: int = 0
    q_len: int = 0
    k_len: int = 0
    head_dim: int = 0
    value_dim: int = 0
    """The width of a head of V, where it is not that of K."""
    sum_width: int = 0
    """Features per score that autograd keeps before they are summed up, in additive attention."""
    dtype: str = ""
    backend: str = ""
    """The op that did it: the normaliser's or the fused op's name."""
    whole: Extent | None = None
    """What its layer's call attended with in all, where this is a piece of it."""

    @property
    def own_extent(self) -> Extent:
        """What this call attended with."""
        return Extent(self.batch, self.heads, self.kv_heads, self.q_len, self.k_len)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token of one sequence, as attention read them."""
        return self.kv_heads * (self.head_dim + self.value_dim) * ITEM_BYTES.get(self.dtype, 1)
