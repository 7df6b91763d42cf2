"""LLaDA-MoE (arXiv 2509.24389): every position sees all others, and every layer has a mixture of experts.

Parameters have the checkpoint's own order (rows are outputs), one array per layer: a stack of layers would
be copied expert by expert before it is used. Letters: B batch, W window, D model, E experts.
"""

from __future__ import annotations

from typing import Unpack

import jax
from flax import nnx
from jaxtyping import Array, Float

from djax.contracts.cache import LayerCache
from djax.devices.parallel import UNSPLIT, Parallel
from djax.models.config import LLADA_MOE_MASK_ID, FeedForward, LladaMoeConfig
from djax.models.layers.attention import Attention, Place
from djax.models.layers.basic import rms_norm
from djax.models.layers.kernels import Kernels
from djax.models.layers.moe import MixtureOfExperts, SoftmaxTopK
from djax.models.layers.parameters import ones
from djax.models.layers.trunk import Family


def feed_forwards(config: LladaMoeConfig) -> tuple[FeedForward, ...]:
    """Experts in every layer."""
    experts = FeedForward(num_experts=config.num_experts, experts_per_token=config.experts_per_token,
                          expert_size=config.expert_size)
    return (experts,) * config.num_layers


class Layer(nnx.Module):
    """Attention, then experts, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: LladaMoeConfig, index: int, *, rngs: nnx.Rngs, kernels: Kernels = Kernels(),
        parallel: Parallel = UNSPLIT,
    ) -> None:
        self.config = config
        # who asks for XLA's experts, which can be split over devices, means the router too
        route = SoftmaxTopK(experts_per_token=config.experts_per_token,
                            implementation=None if kernels.moe in (None, "mosaic_gpu") else "xla")
        self.attention_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.attention = Attention(config, rngs=rngs, implementation=kernels.attention, parallel=parallel)
        self.moe_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.moe = MixtureOfExperts(
            config, feed_forwards(config)[index], route, rngs=rngs, implementation=kernels.moe, parallel=parallel)

    def mix(
        self, x: Float[Array, "B W D"], *, cache: LayerCache | None, **place: Unpack[Place]
    ) -> tuple[Float[Array, "B W D"], LayerCache | None]:
        """The first half, attention: the residual stream after it, and the layer's cache."""
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm[...], eps=self.config.rms_norm_eps)
            mixed, cache = self.attention(normed, cache=cache, **place)
        return x + mixed, cache

    def transform(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "B W E"]]:
        """The second half, the experts, each position by itself; and the router's logits."""
        with jax.named_scope("moe"):
            mixed, logits = self.moe(rms_norm(x, self.moe_norm[...], eps=self.config.rms_norm_eps))
        return x + mixed, logits


FAMILY = Family(
    config=LladaMoeConfig, layer=Layer, rotary_dim=lambda config: config.head_dim, feed_forwards=feed_forwards,
    published={
        "llada-moe": LladaMoeConfig(
            vocab_size=157184, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128,
            num_experts=64, experts_per_token=8, expert_size=1024, rms_norm_eps=1e-5, rope_theta=50000.0,
            max_positions=8192, mask_id=LLADA_MOE_MASK_ID, eos_id=156892, pad_id=156892)})
"""LLaDA-MoE, and LLaDA-MoE-7B-A1B by name."""
