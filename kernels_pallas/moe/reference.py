"""The op in plain jnp: oracle and fallback. Every expert sees every row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def moe_reference(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "M D"]:
    """See `kernels_pallas.moe.moe`. One expert at a time, so that memory stays at a few [M, D + F]."""
    dot = lambda a, b: lax.dot_general(  # noqa: E731 (a b^T, accumulated in float32)
        a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    def add_expert(total: Array, expert: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        index, gate_e, up_e, down_e = expert
        chosen = expert_ids == index
        weight = jnp.sum(jnp.where(chosen, weights.astype(jnp.float32), 0.0), axis=1, keepdims=True)
        hidden = (jax.nn.silu(dot(x, gate_e)) * dot(x, up_e)).astype(x.dtype)
        return total + jnp.where(chosen.any(axis=1, keepdims=True), weight * dot(hidden, down_e), 0.0), None

    indices = jnp.arange(gate.shape[0], dtype=expert_ids.dtype)
    total, _ = lax.scan(add_expert, jnp.zeros(x.shape, jnp.float32), (indices, gate, up, down))
    return total.astype(x.dtype)
