"""Sizes of published models, to plan for one that has not been downloaded."""

from __future__ import annotations

from types import MappingProxyType

from djax.models.config import LLADA2_MOE_MASK_ID, LLADA_MOE_MASK_ID, Llada2MoeConfig, LladaMoeConfig, ModelConfig


def _llada2(*, hidden_size: int, num_layers: int, num_heads: int, dense_size: int, expert_size: int) -> Llada2MoeConfig:
    return Llada2MoeConfig(
        vocab_size=157184, hidden_size=hidden_size, num_layers=num_layers, num_dense_layers=1, dense_size=dense_size,
        num_heads=num_heads, num_kv_heads=4, head_dim=128, rotary_dim=64, num_experts=256, experts_per_token=8,
        expert_size=expert_size, num_shared_experts=1, num_groups=8, groups_per_token=4, routed_scaling_factor=2.5,
        rms_norm_eps=1e-6, rope_theta=600000.0, max_positions=32768, mask_id=LLADA2_MOE_MASK_ID, eos_id=156892,
        pad_id=156892)


PUBLISHED: MappingProxyType[str, ModelConfig] = MappingProxyType({
    "llada-moe": LladaMoeConfig(
        vocab_size=157184, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128,
        num_experts=64, experts_per_token=8, expert_size=1024, rms_norm_eps=1e-5, rope_theta=50000.0,
        max_positions=8192, mask_id=LLADA_MOE_MASK_ID, eos_id=156892, pad_id=156892),
    "llada2-mini": _llada2(hidden_size=2048, num_layers=20, num_heads=16, dense_size=5120, expert_size=512),
    "llada2-flash": _llada2(hidden_size=4096, num_layers=32, num_heads=32, dense_size=9216, expert_size=1024),
})
"""LLaDA-MoE-7B-A1B, LLaDA2.0-mini and LLaDA2.0-flash, all in bfloat16."""
