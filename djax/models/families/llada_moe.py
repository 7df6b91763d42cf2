"""LLaDA-MoE: a bidirectional transformer with a mixture of experts in every layer.

Parameters have the checkpoint's own order (rows are outputs), one array per layer: a stack of layers would
be copied expert by expert before it is used. Letters: B batch, T canvas, W window, D model, E experts.
"""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from djax.devices.parallel import WHOLE, Parallel
from djax.models.config import LladaMoeConfig
from djax.models.layers import trunk
from djax.models.layers.basic import rms_norm
from djax.models.layers.kernels import Kernels
from djax.models.layers.moe import MixtureOfExperts
from djax.models.layers.parameters import ones
from djax.models.layers.trunk import Transformer


class Layer(trunk.Layer):
    """Attention, then experts, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: LladaMoeConfig, *, rngs: nnx.Rngs, kernels: Kernels = Kernels(), parallel: Parallel = WHOLE,
    ) -> None:
        super().__init__(config, rngs=rngs, kernels=kernels, parallel=parallel)
        self.moe_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.moe = MixtureOfExperts(config, rngs=rngs, moe_implementation=kernels.moe, parallel=parallel)

    def transform(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "B W E"]]:
        """The second half, the experts, each position by itself; and the router's logits."""
        with jax.named_scope("moe"):
            mixed, logits = self.moe(rms_norm(x, self.moe_norm[...], eps=self.config.rms_norm_eps))
        return x + mixed, logits


class LladaMoe(Transformer):
    """LLaDA-MoE (arXiv 2509.24389): every position sees all others."""

    def __init__(
        self, config: LladaMoeConfig, *, rngs: nnx.Rngs, kernels: Kernels = Kernels(), parallel: Parallel = WHOLE,
    ) -> None:
        """Random weights; `parallel` is for a model whose parameters are one device's part of them."""
        super().__init__(
            config, lambda index: Layer(config, rngs=rngs, kernels=kernels, parallel=parallel),
            rotary_dim=config.head_dim, rngs=rngs, kernels=kernels, parallel=parallel)
