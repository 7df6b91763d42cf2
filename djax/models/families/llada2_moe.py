"""LLaDA2.0 (arXiv 2512.15745): causal over blocks, with dense blocks in the first layers and experts in the others.

Attention blocks are counted from each row's first real token. Without a cache rows may begin anywhere on the canvas.
With one, all rows' first tokens must be a multiple of the block length apart, because one boundary serves all:
`Canvas.from_prompts(align=True)` lays them out so.

Parameters have the checkpoint's own order (rows are outputs), one array per layer. Letters: B batch, W window,
D model, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Unpack

import jax
from flax import nnx
from jaxtyping import Array, Float

from djax.contracts.cache import LayerCache
from djax.devices.parallel import UNSPLIT, Parallel
from djax.models.config import LLADA2_MOE_MASK_ID, FeedForward, Llada2MoeConfig
from djax.models.layers.attention import Attention, Place
from djax.models.layers.basic import SwiGlu, rms_norm
from djax.models.layers.kernels import Kernels
from djax.models.layers.moe import GroupedSigmoid, MixtureOfExperts
from djax.models.layers.parameters import ones
from djax.models.layers.trunk import Family


def feed_forwards(config: Llada2MoeConfig) -> tuple[FeedForward, ...]:
    """Dense blocks first, then experts with shared ones."""
    dense = FeedForward(dense_size=config.dense_size)
    experts = FeedForward(
        dense_size=config.num_shared_experts * config.expert_size, num_experts=config.num_experts,
        experts_per_token=config.experts_per_token, expert_size=config.expert_size)
    return (dense,) * config.num_dense_layers + (experts,) * (config.num_layers - config.num_dense_layers)


class Layer(nnx.Module):
    """Attention, then a dense block or experts, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: Llada2MoeConfig, index: int, *, rngs: nnx.Rngs, kernels: Kernels = Kernels(),
        parallel: Parallel = UNSPLIT,
    ) -> None:
        self.config, self.parallel, shape = config, parallel, feed_forwards(config)[index]
        self.attention_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.attention = Attention(config, rngs=rngs, implementation=kernels.attention, parallel=parallel)
        self.mlp_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.is_dense = not shape.num_experts
        if self.is_dense:
            self.mlp = SwiGlu(config.hidden_size, shape.dense_size, rngs=rngs, dtype=config.dtype)
        else:
            route = GroupedSigmoid(
                experts_per_token=config.experts_per_token, num_groups=config.num_groups,
                groups_per_token=config.groups_per_token, scale=config.routed_scaling_factor)
            self.moe = MixtureOfExperts(
                config, shape, route, rngs=rngs, implementation=kernels.moe, parallel=parallel)

    def mix(
        self, x: Float[Array, "B W D"], *, cache: LayerCache | None, **place: Unpack[Place]
    ) -> tuple[Float[Array, "B W D"], LayerCache | None]:
        """The first half, attention: the residual stream after it, and the layer's cache."""
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], eps=self.config.rms_norm_eps)
            mixed, cache = self.attention(normed, cache=cache, **place)
        return x + mixed, cache

    def transform(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "B W E"] | None]:
        """The second half, each position by itself; and the router's logits, None in a dense layer."""
        normed = rms_norm(x, self.mlp_norm[...], eps=self.config.rms_norm_eps)
        if not self.is_dense:
            with jax.named_scope("moe"):
                mixed, logits = self.moe(normed)
            return x + mixed, logits
        with jax.named_scope("mlp"):
            mixed = self.parallel.sum((self.mlp(normed.reshape(-1, x.shape[-1])), self.parallel.ffn))
        return x + mixed.reshape(x.shape), None


_MINI = Llada2MoeConfig(
    vocab_size=157184, hidden_size=2048, num_layers=20, num_dense_layers=1, dense_size=5120, num_heads=16,
    num_kv_heads=4, head_dim=128, rotary_dim=64, num_experts=256, experts_per_token=8, expert_size=512,
    num_shared_experts=1, num_groups=8, groups_per_token=4, routed_scaling_factor=2.5, rms_norm_eps=1e-6,
    rope_theta=600000.0, max_positions=32768, mask_id=LLADA2_MOE_MASK_ID, eos_id=156892, pad_id=156892)

FAMILY = Family(
    config=Llada2MoeConfig, layer=Layer, rotary_dim=lambda config: config.rotary_dim, feed_forwards=feed_forwards,
    published={
        "llada2-mini": _MINI,
        "llada2-flash": dataclasses.replace(
            _MINI, hidden_size=4096, num_layers=32, num_heads=32, dense_size=9216, expert_size=1024)})
"""LLaDA2, and LLaDA2.0-mini and LLaDA2.0-flash by name."""
