"""Attention as two batched products and a softmax, in the order of axes that a CPU's GEMMs take.

Holds the [B, H, W, T] scores and weights, which a GPU writes and reads several times: there it is the fallback.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention.reference import visible_keys


def attention_xla(
    query: Float[Array, "B W H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    key_mask: Bool[Array, "B T"] | Bool[Array, "B W T"],
    key_limit: Int[Array, " W"] | None,
) -> Float[Array, "B W H K"]:
    """See `kernels_pallas.attention`; query w sees only keys before `key_limit[w]`. Reverse mode only, and once."""
    batch, window, heads, width = query.shape
    groups = key.shape[2]
    # float32 operands mean float32 products: accelerators default to fewer bits
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    # One batched product per (row, key/value head), its operands in the order that GEMMs take: left to itself
    # XLA transposes the scores, the largest array here, twice on CPU.
    query, key, value = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    query = query.reshape(batch, groups, heads // groups * window, width)
    scores = jnp.einsum(
        "bgqk,bgtk->bgqt", query, key, precision=precision, preferred_element_type=jnp.float32) * width**-0.5
    mask = visible_keys(key_mask, key_limit)[:, None]
    if mask.shape[2] > 1:
        mask = jnp.tile(mask, (1, 1, heads // groups, 1))
    weight = _masked_softmax(scores, mask).astype(value.dtype)
    mixed = jnp.einsum("bgqt,bgtk->bgqk", weight, value, precision=precision, preferred_element_type=jnp.float32)
    return jnp.swapaxes(mixed.astype(value.dtype).reshape(batch, heads, window, width), 1, 2)


@jax.custom_vjp
def _masked_softmax(scores: Float[Array, "B G Q T"], mask: Bool[Array, "B 1 #Q T"]) -> Float[Array, "B G Q T"]:
    """Softmax over the keys in `mask`; zeros in a row without any. Written out with its gradient, because autodiff
    would go over the scores, the largest array here, several times more."""
    # a finite floor, then zero weights: -inf everywhere would be NaN
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weight = jnp.where(mask, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    total = weight.sum(axis=-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


def _softmax_forward(scores: Array, mask: Array) -> tuple[Array, Array]:
    weight = _masked_softmax(scores, mask)
    return weight, weight


def _softmax_backward(weight: Array, cotangent: Array) -> tuple[Array, None]:
    product = weight * cotangent
    return product - weight * product.sum(axis=-1, keepdims=True), None


_masked_softmax.defvjp(_softmax_forward, _softmax_backward)
