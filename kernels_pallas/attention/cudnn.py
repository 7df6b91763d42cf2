"""Attention by cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

The best there is where rows are many: its blocks take 128 of them and keep the tensor cores busy. It does not split
the keys, so a short window of few heads leaves most of the GPU idle. Of the masks that cuDNN takes, lengths cannot
say left padding, so the mask goes in as a bias [B, 1, W, T] in the operands' dtype: 2.9 MB a row at 1200 x 1200, made
once for all layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention.reference import visible_keys


def attention_cudnn(
    query: Float[Array, "B W H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    key_mask: Bool[Array, "B T"] | Bool[Array, "B W T"],
    key_limit: Int[Array, " W"] | None,
) -> Float[Array, "B W H K"]:
    """See `kernels_pallas.attention`; query w sees only keys before `key_limit[w]`. Reverse mode only."""
    visible = visible_keys(key_mask, key_limit)
    batch, _, length = visible.shape
    mask = jnp.broadcast_to(visible[:, None], (batch, 1, query.shape[1], length))
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    # a query without any key would get the mean of all values
    return jnp.where(visible.any(axis=-1)[:, :, None, None], mixed, jnp.zeros((), mixed.dtype))
