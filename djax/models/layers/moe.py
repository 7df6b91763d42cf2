"""The mixture-of-experts block: the router and the op."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from djax.devices.parallel import WHOLE, Parallel
from djax.models.config import LladaMoeConfig
from djax.models.layers.basic import contract
from djax.models.layers.parameters import normal
from kernels_pallas import moe, top_k_route


def router_logits(x: Float[Array, "M D"], router: Float[Array, "E D"]) -> Float[Array, "M E"]:
    """float32 logits over the experts."""
    return contract("md,ed->me", x, router, dtype=jnp.float32)


def route(
    logits: Float[Array, "M E"], *, experts_per_token: int, implementation: str | None = "xla"
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """Experts of each row and their weights: the largest of a softmax over all experts, not renormalised.

    `implementation` is that of `kernels_pallas.top_k_route`; XLA's can be split over devices.
    """
    return top_k_route(logits, experts_per_token=experts_per_token, implementation=implementation)


class MixtureOfExperts(nnx.Module):
    """E SwiGLU experts of width F, of which each position uses its router's k best."""

    def __init__(
        self, config: LladaMoeConfig, *, rngs: nnx.Rngs, moe_implementation: str | None = None,
        parallel: Parallel = WHOLE,
    ) -> None:
        model, experts, width = config.hidden_size, config.num_experts, config.expert_size
        self.experts_per_token = config.experts_per_token
        self.moe_implementation, self.parallel = moe_implementation, parallel
        # who asks for XLA's experts, which can be split over devices, means the router too
        self.route_implementation = None if moe_implementation in (None, "mosaic_gpu") else "xla"
        self.router = normal(rngs, (experts, model), axes=(None, "embed"), dtype=config.dtype)
        wide, narrow = (experts, width, model), (experts, model, width)
        self.gate = normal(rngs, wide, axes=("experts", "ffn", "embed"), dtype=config.dtype)
        self.up = normal(rngs, wide, axes=("experts", "ffn", "embed"), dtype=config.dtype)
        self.down = normal(rngs, narrow, axes=("experts", "embed", "ffn"), dtype=config.dtype)

    def __call__(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "B W E"]]:
        """The block's output, without the residual, and the router's logits, which training balances."""
        rows = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            logits = router_logits(rows, self.router[...])
            expert_ids, weights = route(
                logits, experts_per_token=self.experts_per_token, implementation=self.route_implementation)
        with jax.named_scope("experts"):
            # an id of another device's expert is outside [0, E) here and adds nothing
            own_ids = expert_ids - self.parallel.index(self.parallel.experts) * self.gate.shape[0]
            own = moe(rows, own_ids if self.parallel.experts else expert_ids, weights, self.gate[...], self.up[...],
                      self.down[...], implementation=self.moe_implementation)
            mixed = self.parallel.sum((own, self.parallel.experts + self.parallel.ffn))
        return mixed.reshape(x.shape), logits.reshape(*x.shape[:2], -1)
