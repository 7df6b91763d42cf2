"""Attention on TPU by the flash attention kernel that ships with JAX (Pallas).

It keeps the scores in VMEM, which pays where there are many: on a refresh of the whole canvas. It wants heads before
positions, so keys and values are transposed once a call; a short window had better leave that to XLA.
"""

from __future__ import annotations

import contextlib

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention.support import TPU_LANES
from kernels_pallas.attention.xla import attention_xla
from kernels_pallas.configs import load_config
from kernels_pallas.gradient import with_gradient_of
from kernels_pallas.hardware import device_kind


def attention_pallas_tpu(
    query: Float[Array, "B W H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H K"],
    key_mask: Bool[Array, "B T"],
    key_limit: Int[Array, " W"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B W H K"]:
    """See `kernels_pallas.attention`; `key_limit` must be None. The gradient is that of the XLA implementation."""
    config = load_config("attention", device_kind=device_kind(), regime="pallas_tpu")

    def forward(query: Array, key: Array, value: Array, key_mask: Array, key_limit: None) -> Array:
        del key_limit
        length = key.shape[1]
        block = max(size for size in range(TPU_LANES, config["block_keys"] + 1, TPU_LANES) if length % size == 0)
        blocks = BlockSizes(
            block_q=min(config["block_queries"], query.shape[1]), block_k_major=block, block_k=block, block_b=1)
        with pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext():
            mixed = flash_attention(
                *(jnp.swapaxes(array, 1, 2) for array in (query, key, value)),
                segment_ids=SegmentIds(jnp.ones(query.shape[:2], jnp.int32), key_mask.astype(jnp.int32)),
                sm_scale=query.shape[3] ** -0.5, block_sizes=blocks)
        # a query without any key would get the mean of all values
        exists = key_mask.any(axis=1)[:, None, None, None]
        return jnp.where(exists, jnp.swapaxes(mixed, 1, 2), jnp.zeros((), mixed.dtype))

    return with_gradient_of(attention_xla, forward)(query, key, value, key_mask, key_limit)
