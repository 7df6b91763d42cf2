"""Model configurations. Special token ids live here and nowhere else."""

from __future__ import annotations

import dataclasses

DTYPES = ("bfloat16", "float16", "float32")
"""dtypes that weights and activations may have."""
LLADA_MOE_MASK_ID = 156895
"""The mask id that LLaDA-MoE's own config class holds; its config.json does not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LladaMoeConfig:
    """LLaDA-MoE: a bidirectional transformer with a mixture of SwiGLU experts in every layer.

    The letters are the axis names of the arrays: V vocabulary, D model width, N layers, H heads,
    G key/value heads, K head width, E experts, F expert width.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_size: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    mask_id: int | None
    """None when neither the checkpoint nor the architecture says: then each call has to give one."""
    eos_id: int
    pad_id: int
    dtype: str = "bfloat16"
    """dtype of weights and activations; router, softmax and log-probs are float32 regardless."""

    architecture: str = dataclasses.field(default="llada_moe", init=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                     "num_experts", "experts_per_token", "expert_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; it must be at least 1")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token: got {self.experts_per_token}; at most num_experts={self.num_experts}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: got {self.num_kv_heads}; it must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}; half-split RoPE needs an even width")
        for name in ("mask_id", "eos_id", "pad_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}: got {token}; it must be in [0, vocab_size={self.vocab_size})")


ModelConfig = LladaMoeConfig
"""Union of the architectures' configurations (one so far)."""
