"""The shape of a decoder-only Transformer, and how many parameters that makes.

Symbols: L layers, d model width, H query heads, Hkv key and value heads, D head dimension, f width
of the feed-forward network (FFN), V vocabulary, w window.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: keys and values come from one short vector per token.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    kv_rank: int
    """Length of the latent that keys and values are made from, and that the cache holds."""
    rope_dim: int
    """Length of the rotary key beside it, shared by all heads."""
    nope_dim: int
    """Length of a head's part of query and key without rotary positions."""
    value_dim: int
    """Length of a head's value."""
    query_rank: int | None = None
    """Length of the latent that queries are made from; None if they are projected directly."""


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the FFN."""

    count: int
    active: int
    """How many of them a token is sent to."""
    width: int
    """FFN width of one expert."""
    shared_width: int = 0
    """FFN width of what every token passes besides, all shared experts together."""
    dense_layers: int = 0
    """Layers that have an ordinary FFN instead."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a decoder-only Transformer.

    Raises:
        ValueError: The numbers contradict each other.
    """

    name: str
    layers: int
    """L."""
    width: int
    """d, the length of a token's vector between layers (hidden size)."""
    heads: int
    """H, query heads."""
    kv_heads: int
    """Hkv, key and value heads: H in multi-head, 1 in multi-query attention (arXiv 1911.02150),
    between them in grouped-query attention (arXiv 2305.13245)."""
    head_dim: int
    """D. With `latent`, the query and key length `qk_dim` counts instead."""
    ffn_width: int
    """f."""
    vocabulary: int
    """V, rows of the embedding, padding included."""
    context_len: int | None
    """Tokens it was made for; None if its source does not say."""
    ffn_gated: bool = True
    """Three matrices of d by f (SwiGLU, GeGLU) instead of two."""
    rms_norm: bool = True
    """RMS norm (Llama and after) instead of LayerNorm."""
    tied_embeddings: bool = False
    """Whether the output head is the embedding's matrix."""
    learned_positions: int = 0
    """Rows of a learned position embedding."""
    window: int | None = None
    """w: in windowed layers a token sees so many tokens, itself included."""
    windowed_layers: int = 0
    """How many of the layers have the window; the others see everything."""
    latent: Latent | None = None
    experts: Experts | None = None
    source: str = ""
    """Where the numbers come from."""
    assumptions: tuple[str, ...] = ()
    """What the source did not say and was inferred."""

    def __post_init__(self) -> None:
        for field in ("layers", "width", "heads", "kv_heads", "head_dim", "vocabulary"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{self.name}: {field} must be at least 1, got {getattr(self, field)}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name}: {self.heads} query heads cannot share {self.kv_heads} key heads "
                "evenly; expected a multiple"
            )
        if not 0 <= self.windowed_layers <= self.layers:
            raise ValueError(
                f"{self.name}: {self.windowed_layers} of {self.layers} layers have a window"
            )
        if self.windowed_layers and (self.window is None or self.window < 1):
            raise ValueError(f"{self.name}: windowed layers need a window of at least 1 token")

    @property
    def full_layers(self) -> int:
        """Layers in which a token sees all tokens before it."""
        return self.layers - self.windowed_layers

    @property
    def qk_dim(self) -> int:
        """Length of a head's query and key."""
        return self.latent.nope_dim + self.latent.rope_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Length of a head's value and output."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def expert_layers(self) -> int:
        """Layers with a mixture of experts."""
        return self.layers - self.experts.dense_layers if self.experts else 0

    @property
    def attention_parameters(self) -> int:
        """Parameters of Q, K, V and output projections of one layer."""
        output = self.heads * self.value_dim * self.width
        if self.latent is None:
            return self.width * (self.heads + 2 * self.kv_heads) * self.head_dim + output
        query = self.heads * self.qk_dim
        rank = self.latent.query_rank
        queries = self.width * query if rank is None else rank * (self.width + query)
        keys = self.width * (self.latent.kv_rank + self.latent.rope_dim)
        expanded = self.heads * (self.latent.nope_dim + self.latent.value_dim)
        return queries + keys + self.latent.kv_rank * expanded + output

    @property
    def ffn_parameters(self) -> int:
        """Parameters of all layers' FFNs, experts and routers."""
        return self._ffn_parameters(active_only=False)

    @property
    def active_ffn_parameters(self) -> int:
        """Parameters of all layers' FFNs that one token passes."""
        return self._ffn_parameters(active_only=True)

    def _ffn_parameters(self, *, active_only: bool) -> int:
        column = (3 if self.ffn_gated else 2) * self.width
        if self.experts is None:
            return self.layers * column * self.ffn_width
        experts = self.experts
        routed = experts.active if active_only else experts.count
        mixed = column * (routed * experts.width + experts.shared_width)
        router = self.width * experts.count
        dense = experts.dense_layers * column * self.ffn_width
        return self.expert_layers * (mixed + router) + dense

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head: d · V, whether tied or not."""
        return self.width * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weight matrices.

        V · d (twice if untied) + positions · d + L · attention + FFNs. Biases and norms, which add
        less than 0.2 %, are left out.
        """
        embeddings = self.head_parameters * (1 if self.tied_embeddings else 2)
        positions = self.learned_positions * self.width
        attention = self.layers * self.attention_parameters
        return embeddings + positions + attention + self.ffn_parameters

    @property
    def active_parameters(self) -> int:
        """Weight matrices that one token is multiplied with, the output head included.

        An embedding is looked up, not multiplied.
        """
        attention = self.layers * self.attention_parameters
        return self.head_parameters + attention + self.active_ffn_parameters
