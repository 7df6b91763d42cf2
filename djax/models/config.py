"""Model configurations. Special token ids live here and nowhere else.

A configuration is numbers and their checks, and is read without jax. A family's file needs flax for its layers, so the
configurations stand here, one below the other, and not in these files.
"""

from __future__ import annotations

import dataclasses

from djax.errors import ArgumentError, check_integer

DTYPES = ("bfloat16", "float16", "float32")
"""dtypes that weights and activations may have."""
LLADA_MOE_MASK_ID = 156895
"""The mask id that LLaDA-MoE's own config class holds; its config.json does not."""
LLADA2_MOE_MASK_ID = 156895
"""LLaDA2's, which is not in its config.json either."""
LLADA2_BLOCK_LENGTH = 32
"""Positions of an attention block of the published LLaDA2 models; not in their config.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields of every family. A family adds what only it computes with, and its name.

    The letters are the axis names of the arrays: V vocabulary, D model width, N layers, H heads,
    G key/value heads, K head width, E experts, F expert width.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    mask_id: int | None
    """None when neither the checkpoint nor the architecture says: then each call has to give one."""
    eos_id: int
    """The token that ends a sequence, and that fills what is behind it."""
    pad_id: int
    other_eos_ids: tuple[int, ...] = ()
    """Further tokens that end a sequence."""
    dtype: str = "bfloat16"
    """dtype of weights and activations; router, its bias, softmax and log-probs are float32 regardless."""
    architecture: str = dataclasses.field(init=False)
    """The family's name."""

    def __post_init__(self) -> None:
        self._at_least_one(
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")
        if self.num_heads % self.num_kv_heads:
            raise ArgumentError("num_kv_heads", self.num_kv_heads, allowed=f"a divisor of num_heads={self.num_heads}")
        tokens = [(name, getattr(self, name)) for name in ("mask_id", "eos_id", "pad_id")]
        for name, token in [*tokens, *(("eos_id", token) for token in self.other_eos_ids)]:
            if token is not None and not 0 <= token < self.vocab_size:
                raise ArgumentError(name, token, allowed=f"a token id in [0, vocab_size={self.vocab_size})")

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            check_integer(name, getattr(self, name), 1)

    @property
    def block_length(self) -> int | None:
        """Positions of an attention block; None where attention is bidirectional over the whole canvas."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward:
    """Sizes of what stands behind a layer's attention; 0 for what there is not."""

    dense_size: int = 0
    """Width of what every position goes through: a dense block, or shared experts."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LladaMoeConfig(ModelConfig):
    """LLaDA-MoE: a bidirectional transformer with a mixture of SwiGLU experts in every layer."""

    num_experts: int
    experts_per_token: int
    expert_size: int
    architecture: str = dataclasses.field(default="llada_moe", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("num_experts", "experts_per_token", "expert_size")
        if self.experts_per_token > self.num_experts:
            raise ArgumentError("experts_per_token", self.experts_per_token,
                                allowed=f"at most num_experts={self.num_experts}")
        if self.head_dim % 2:
            raise ArgumentError("head_dim", self.head_dim, allowed="an even width, which half-split RoPE needs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llada2MoeConfig(ModelConfig):
    """LLaDA2.0 (and 2.1), mini and flash: causal over blocks, bidirectional inside one; experts behind dense layers."""

    num_dense_layers: int
    """Number of leading layers with one dense SwiGLU block in place of experts."""
    dense_size: int
    """Its width."""
    rotary_dim: int
    """Number of leading components of a head that are rotated by its position."""
    num_experts: int
    experts_per_token: int
    expert_size: int
    num_shared_experts: int
    """Experts that every position goes through besides those of its router; together one block of their widths."""
    num_groups: int
    """Groups of equal size that the router's experts are in."""
    groups_per_token: int
    """Number of groups that a position's experts may come from."""
    routed_scaling_factor: float
    """Sum of the weights of a position's experts."""
    block_length: int = LLADA2_BLOCK_LENGTH
    """Positions of an attention block: each sees its own block and all before it. Blocks are counted from a row's
    first real token, prompt included."""
    architecture: str = dataclasses.field(default="llada2_moe", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one(
            "dense_size", "rotary_dim", "num_experts", "experts_per_token", "expert_size", "num_shared_experts",
            "num_groups", "groups_per_token", "block_length")
        if not 0 <= self.num_dense_layers < self.num_layers:
            raise ArgumentError("num_dense_layers", self.num_dense_layers,
                                allowed=f"a number in [0, num_layers={self.num_layers})")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ArgumentError("rotary_dim", self.rotary_dim,
                                allowed=f"an even width, which half-split RoPE needs, of at most "
                                        f"head_dim={self.head_dim}")
        if self.num_experts % self.num_groups or self.num_experts < 2 * self.num_groups:
            raise ArgumentError("num_groups", self.num_groups,
                                allowed=f"a divisor of num_experts={self.num_experts} that makes groups of at least 2, "
                                        "whose two best score a group")
        if self.groups_per_token > self.num_groups:
            raise ArgumentError("groups_per_token", self.groups_per_token,
                                allowed=f"at most num_groups={self.num_groups}")
        allowed = self.groups_per_token * (self.num_experts // self.num_groups)
        if self.experts_per_token > allowed:
            raise ArgumentError("experts_per_token", self.experts_per_token,
                                allowed=f"at most {allowed}, the experts of {self.groups_per_token} groups")
