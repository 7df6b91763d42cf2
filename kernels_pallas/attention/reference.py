"""The op in plain jnp: oracle and fallback."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def visible_keys(
    key_mask: Bool[Array, "B T"] | Bool[Array, "B W T"], key_limit: Int[Array, " W"] | None
) -> Bool[Array, " B #W T"]:
    """The keys that each query sees: one row for all queries where they see the same."""
    mask = key_mask[:, None] if key_mask.ndim == 2 else key_mask
    if key_limit is None:
        return mask
    return mask & (jnp.arange(mask.shape[-1], dtype=jnp.int32)[None] < key_limit[:, None])[None]


def attention_reference(
    query: Float[Array, "B W H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    key_mask: Bool[Array, "B T"] | Bool[Array, "B W T"],
    key_limit: Int[Array, " W"] | None,
) -> Float[Array, "B W H K"]:
    """See `kernels_pallas.attention`; query w sees only keys before `key_limit[w]`. Holds [B, H, W, T] scores."""
    mask = visible_keys(key_mask, key_limit)[:, None]
    key, value = (jnp.repeat(array, query.shape[2] // array.shape[2], axis=2) for array in (key, value))
    scores = jnp.einsum(
        "bwhk,bthk->bhwt", query, key, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    # a finite floor, then zero weights: -inf everywhere would be NaN
    scores = jnp.where(mask, scores * query.shape[3] ** -0.5, jnp.finfo(jnp.float32).min)
    weight = jnp.where(mask, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    total = weight.sum(axis=-1, keepdims=True)
    weight = (weight / jnp.where(total > 0, total, 1.0)).astype(value.dtype)
    mixed = jnp.einsum(
        "bhwt,bthk->bwhk", weight, value, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return mixed.astype(value.dtype)
