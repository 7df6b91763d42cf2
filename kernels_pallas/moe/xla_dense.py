"""Every row through every expert in three contractions, the router's weight folded into the hidden units.

Reads each weight once and launches three GEMMs: near the memory bound while the rows are few. It costs
E / k times the arithmetic that the routing needs, and a float32 [E, M, F] temporary or two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def moe_xla_dense(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "M D"]:
    """See `kernels_pallas.moe.moe`. Differentiable in both modes."""
    experts = jnp.arange(gate.shape[0], dtype=expert_ids.dtype)
    chosen = expert_ids[None] == experts[:, None, None]  # [E, M, k]; an id out of range matches no expert
    weight = jnp.sum(jnp.where(chosen, weights.astype(jnp.float32), 0.0), axis=-1)
    # float32 operands mean float32 products: accelerators default to fewer bits
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    project = lambda matrix: jnp.einsum(  # noqa: E731
        "md,efd->emf", x, matrix, precision=precision, preferred_element_type=jnp.float32)
    hidden = jax.nn.silu(project(gate)) * project(up) * weight[:, :, None]
    # what an expert makes of a row that is not its own must not count, even where it overflows
    hidden = jnp.where(chosen.any(axis=-1)[:, :, None], hidden, 0.0).astype(x.dtype)
    return jnp.einsum(
        "emf,edf->md", hidden, down, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)
