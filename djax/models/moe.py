"""The mixture-of-experts block: the router and the op."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from djax.config import LladaMoeConfig
from djax.models.layers import contract
from djax.models.parameters import normal
from kernels_pallas import moe


def router_logits(x: Float[Array, "M D"], router: Float[Array, "E D"]) -> Float[Array, "M E"]:
    """float32 logits over the experts."""
    return contract("md,ed->me", x, router, dtype=jnp.float32)


def route(
    logits: Float[Array, "M E"], *, experts_per_token: int
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """Experts of each row and their weights: the largest of a softmax over all experts.

    The weights are not renormalised to sum to one: LLaDA-MoE was trained that way.
    """
    # XLA sorts for a top_k of short rows, which a CPU does slowly
    weights, expert_ids = jax.lax.platform_dependent(
        jax.nn.softmax(logits, axis=-1), cpu=partial(_top_k_by_maxima, k=experts_per_token),
        default=lambda shares: tuple(jax.lax.top_k(shares, experts_per_token)))
    return expert_ids, weights


def _top_k_by_maxima(
    shares: Float[Array, "M E"], *, k: int
) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """`jax.lax.top_k` of short rows: k times the largest entry, the lowest index among equals."""
    index = jnp.arange(shares.shape[1], dtype=jnp.int32)
    values, indices = [], []
    for _ in range(k):
        best = jnp.max(shares, axis=1)
        at = jnp.min(jnp.where(shares == best[:, None], index, shares.shape[1] - 1), axis=1)
        shares = jnp.where(index == at[:, None], -jnp.inf, shares)
        values.append(best)
        indices.append(at)
    return jnp.stack(values, axis=1), jnp.stack(indices, axis=1)


class MixtureOfExperts(nnx.Module):
    """E SwiGLU experts of width F, of which each position uses its router's k best."""

    def __init__(
        self, config: LladaMoeConfig, *, rngs: nnx.Rngs, moe_implementation: str | None = None
    ) -> None:
        model, experts, width = config.hidden_size, config.num_experts, config.expert_size
        self.experts_per_token = config.experts_per_token
        self.moe_implementation = moe_implementation
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
            expert_ids, weights = route(logits, experts_per_token=self.experts_per_token)
        with jax.named_scope("experts"):
            mixed = moe(rows, expert_ids, weights, self.gate[...], self.up[...], self.down[...],
                        implementation=self.moe_implementation)
        return mixed.reshape(x.shape), logits.reshape(*x.shape[:2], -1)
