"""The shape of a published MoE model, and its weights and bytes: computed, and the published count is the test.

Not counted: what plain decoding does not run (multi-token prediction, vision), and state that does not grow with the
context. It reads no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefetch.errors import ConfigError
from prefetch.trace.card import SCORES, ModelCard

MOST_LAYERS = 10_000
KV_BITS = 16  # keys and values in bf16

BITS_PER_WEIGHT = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "fp8": 8.0,  # weights alone: one scale per tensor is nothing
    "fp8_block128": 8 + 32 / 128**2,  # DeepSeek-V3: one fp32 scale per 128x128 block
    "int8": 8.0,  # weights alone: one scale per output row is less than 0.1 %
    "int4": 4.0,  # weights alone, no scales: the floor of every 4-bit format
    "int4_g128": 4 + (16 + 4) / 128,  # GPTQ, AWQ: per 128 weights an fp16 scale and a 4-bit zero
    "mxfp4": 4 + 8 / 32,  # OCP microscaling: one 8-bit exponent per 32 weights
    # llama.cpp: Q4_K is 4.5 bits, and the down projection of half of the layers is Q6_K, 6.5625.
    # This is the mean; experts are counted layer by layer below.
    "q4_k_m": (2 * 4.5 + (4.5 + 6.5625) / 2) / 3,
}

PRECISIONS = tuple(sorted(BITS_PER_WEIGHT))
EMBEDDINGS = ("input_embeddings", "output_embeddings")
COUNTS = (
    "first_dense_layers",
    "encoder_layers",
    "dense_size",
    "shared_size",
    "left_out_parameters",
)


@dataclass(frozen=True)
class GroupedAttention:
    """Attention with kv_heads key-value heads; kv_heads = heads is the ordinary kind."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: str = "none"  # none | per_head (one vector per head dimension) | full (over all heads)
    sinks: bool = False  # one learned number per head
    output_gate: bool = False  # a gate as wide as the queries
    position_buckets: int = 0  # T5: learned relative positions, in the first layer of each stack

    def __post_init__(self) -> None:
        if self.qk_norm not in ("none", "per_head", "full"):
            raise ConfigError(f"qk_norm must be none, per_head or full; found {self.qk_norm!r}")

    def weights(self, hidden: int) -> int:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = {"none": 0, "per_head": 2 * self.head_dim, "full": queries + keys}[self.qk_norm]
        biases = self.qkv_bias * (queries + 2 * keys) + self.output_bias * hidden
        matrices = hidden * (queries * (2 + self.output_gate) + 2 * keys)
        return matrices + biases + norms + self.sinks * self.heads

    @property
    def position_weights(self) -> int:
        return self.position_buckets * self.heads

    @property
    def kv_numbers(self) -> int:
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): the cache holds the latent and one rope key."""

    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None  # None = queries are not compressed

    def weights(self, hidden: int) -> int:
        queries = self.heads * (self.nope_dim + self.rope_dim)
        query = hidden * queries
        if self.query_rank is not None:
            query = self.query_rank * (hidden + 1 + queries)  # 1: the norm between the two
        compress = hidden * (self.kv_rank + self.rope_dim) + self.kv_rank  # with its norm
        expand = self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        return query + compress + expand + self.heads * self.value_dim * hidden

    @property
    def kv_numbers(self) -> int:
        return self.kv_rank + self.rope_dim

    position_weights = 0  # a class constant, not a field: positions are rotary


@dataclass(frozen=True)
class LinearAttention:
    """Gated delta net (Qwen3-Next): a state of fixed size instead of a cache."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    kernel: int

    def weights(self, hidden: int) -> int:
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        projections = hidden * (2 * keys + 3 * values + 2 * self.value_heads)
        decay, norm = 2 * self.value_heads, self.value_dim
        return projections + (2 * keys + values) * self.kernel + decay + norm


ATTENTION: dict[str, type[GroupedAttention] | type[LatentAttention]] = {
    "grouped": GroupedAttention,
    "latent": LatentAttention,
}


@dataclass(frozen=True)
class Architecture:
    """A published configuration. Sizes are in elements unless the name says bytes."""

    name: str  # id on the hub
    hidden_size: int
    vocab_size: int
    layers: int  # of the decoder, dense ones included
    attention: GroupedAttention | LatentAttention
    n_experts: int
    top_k: int
    expert_size: int  # intermediate size of one routed expert
    score_function: str
    weights_normalised: bool  # do the k weights sum to one, scaling factors included?
    expert_precision: str  # as published; load_card can ask for another
    matrix_precision: str  # attention, dense layers, shared experts
    rest_precision: str  # embeddings, routers, norms, biases of experts
    published_parameters: int
    published_active_parameters: int | None = None  # None = not published, or to one digit only
    active_leaves_out: tuple[str, ...] = ()  # EMBEDDINGS that the publisher does not call active
    left_out_parameters: int = 0  # of the published count, what is not run in plain decoding
    dense_size: int = 0  # intermediate size of the dense layers
    first_dense_layers: int = 0
    moe_every: int = 1  # every n-th layer of a stack is MoE: n-1, 2n-1, ...
    shared_size: int = 0  # intermediate size of all shared experts together
    shared_gate: bool = False
    gated: bool = True  # three matrices per expert (SwiGLU); false = two
    expert_bias: bool = False
    dense_bias: bool = False
    router_bias: bool = False  # or a correction bias, one per expert
    norm_bias: bool = False
    head_bias: bool = False
    tied_embeddings: bool = False
    linear_attention: LinearAttention | None = None
    full_attention_every: int = 1  # the cache of the other layers does not grow with the context
    encoder_layers: int = 0

    def __post_init__(self) -> None:
        precisions = {self.expert_precision, self.matrix_precision, self.rest_precision}
        sizes = self.hidden_size, self.vocab_size, self.layers, self.expert_size, self.moe_every
        if min(sizes) <= 0 or self.layers + self.encoder_layers > MOST_LAYERS:
            raise ConfigError(
                "hidden_size, vocab_size, layers, expert_size, moe_every must be positive, and layers at most "
                f"{MOST_LAYERS}; found {self}"
            )
        if min(getattr(self, name) for name in COUNTS) < 0:
            raise ConfigError(f"{', '.join(COUNTS)} must not be negative; found {self}")
        checks = {
            f"score_function must be among {SCORES}": self.score_function in SCORES,
            f"precisions must be among {PRECISIONS}": precisions <= set(PRECISIONS),
            f"active_leaves_out must be among {EMBEDDINGS}": set(self.active_leaves_out)
            <= set(EMBEDDINGS),
            "dense_size must be given where layers are dense": self.dense_size > 0
            or not self.dense_layers,
        }
        for claim, holds in checks.items():
            if not holds:
                raise ConfigError(f"{claim}; found {self}")

    @property
    def moe_layers(self) -> tuple[tuple[str, int], ...]:
        """(stack, the model's own layer number) of each MoE layer, the encoder's first."""
        return tuple(
            (stack, n)
            for stack, count in (("encoder", self.encoder_layers), ("decoder", self.layers))
            for n in range(self.first_dense_layers, count)
            if n % self.moe_every == self.moe_every - 1
        )

    @property
    def dense_layers(self) -> int:
        return self.layers + self.encoder_layers - len(self.moe_layers)

    def ffn_matrices(self, size: int) -> int:
        return self.hidden_size * size * (3 if self.gated else 2)

    def ffn_biases(self, size: int) -> int:
        return size * (2 if self.gated else 1) + self.hidden_size

    @property
    def expert_biases(self) -> int:
        return self.expert_bias * self.ffn_biases(self.expert_size)

    @property
    def expert_weights(self) -> int:
        return self.ffn_matrices(self.expert_size) + self.expert_biases

    @property
    def attention_weights(self) -> int:
        """Of all layers of both stacks, with cross-attention where there is an encoder."""
        one, stacks = self.attention.weights(self.hidden_size), 2 if self.encoder_layers else 1
        if self.linear_attention is None:
            blocks = self.encoder_layers + stacks * self.layers
            return one * blocks + stacks * self.attention.position_weights
        full = self.layers // self.full_attention_every
        return one * full + self.linear_attention.weights(self.hidden_size) * (self.layers - full)

    @property
    def dense_ffn_weights(self) -> int:
        biases = self.dense_bias * self.ffn_biases(self.dense_size)
        return self.dense_layers * (self.ffn_matrices(self.dense_size) + biases)

    @property
    def shared_weights(self) -> int:
        gate = self.hidden_size if self.shared_gate else 0
        return len(self.moe_layers) * (self.ffn_matrices(self.shared_size) + gate)

    @property
    def head_weights(self) -> int:
        matrix = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return matrix + self.head_bias * self.vocab_size

    @property
    def rest_weights(self) -> int:
        """Embeddings, head, routers, norms."""
        routers = len(self.moe_layers) * self.n_experts * (self.hidden_size + self.router_bias)
        norms = (3 if self.encoder_layers else 2) * self.layers + 1
        norms += 2 * self.encoder_layers + 1 if self.encoder_layers else 0
        embeddings = self.vocab_size * self.hidden_size + self.head_weights
        return embeddings + routers + norms * self.hidden_size * (1 + self.norm_bias)

    @property
    def parameters(self) -> int:
        experts = len(self.moe_layers) * self.n_experts * self.expert_weights
        ffn = experts + self.shared_weights + self.dense_ffn_weights
        return ffn + self.attention_weights + self.rest_weights

    @property
    def active_parameters(self) -> int:
        """What one token uses, counted as the publisher counts."""
        idle = len(self.moe_layers) * (self.n_experts - self.top_k) * self.expert_weights
        inputs = self.vocab_size * self.hidden_size * ("input_embeddings" in self.active_leaves_out)
        outputs = self.head_weights * ("output_embeddings" in self.active_leaves_out)
        return self.parameters - idle - inputs - outputs

    @property
    def kv_bytes_per_token(self) -> int:
        """Growth of the cache per token; with an encoder, per token of input or output alike."""
        return self.layers // self.full_attention_every * self.attention.kv_numbers * KV_BITS // 8

    def expert_bytes(self, layer: int, precision: str) -> int:
        if precision == "q4_k_m":
            matrices = self._q4_k_m_bytes(layer)
        else:
            matrices = stored_bytes(self.ffn_matrices(self.expert_size), precision)
        return matrices + stored_bytes(self.expert_biases, self.rest_precision)

    def _q4_k_m_bytes(self, layer: int) -> int:
        """llama.cpp's `use_more_bits`: the down projection of half of the layers gets more bits.

        Down projections whose rows are no multiple of 256 fall back to Q5_0 and Q8_0.
        """
        if self.hidden_size % 256 or self.expert_size % 32:
            raise ConfigError(
                f"{self.name}: q4_k_m packs rows of 256, and hidden_size is {self.hidden_size}; "
                "ask for mxfp4 or int4_g128"
            )
        eighth = self.layers // 8
        more = layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
        few_bits, more_bits = (4.5, 6.5625) if self.expert_size % 256 == 0 else (5.5, 8.5)
        one = self.hidden_size * self.expert_size
        wide = one * (2 if self.gated else 1) * 4.5
        return math.ceil((wide + one * (more_bits if more else few_bits)) / 8)

    def card(
        self, expert_precision: str | None = None, matrix_precision: str | None = None
    ) -> ModelCard:
        experts = expert_precision or self.expert_precision
        matrices = matrix_precision or self.matrix_precision
        return ModelCard(
            name=self.name,
            n_experts=self.n_experts,
            top_k=self.top_k,
            layer_numbers=tuple(n for _, n in self.moe_layers),
            layer_stacks=tuple(stack for stack, _ in self.moe_layers),
            hidden_size=self.hidden_size,
            score_function=self.score_function,
            weights_normalised=self.weights_normalised,
            expert_bytes_L=tuple(self.expert_bytes(n, experts) for _, n in self.moe_layers),
            expert_precision=experts,
            dense_bytes=stored_bytes(self.attention_weights + self.dense_ffn_weights, matrices)
            + stored_bytes(self.rest_weights, self.rest_precision),
            shared_bytes=stored_bytes(self.shared_weights, matrices),
            kv_bytes_per_token=self.kv_bytes_per_token,
        )


def stored_bytes(weights: int, precision: str) -> int:
    if precision not in BITS_PER_WEIGHT:
        raise ConfigError(
            f"no precision {precision!r}; there are {', '.join(sorted(BITS_PER_WEIGHT))}"
        )
    return math.ceil(weights * BITS_PER_WEIGHT[precision] / 8)
