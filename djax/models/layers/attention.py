"""Attention with a norm on every query and key head, bidirectional or causal over blocks."""

from __future__ import annotations

from typing import TypedDict, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from djax.contracts.cache import LayerCache
from djax.devices.parallel import UNSPLIT, Parallel
from djax.models.config import ModelConfig
from djax.models.layers.basic import Rotation, from_heads, rms_norm, rotate, to_heads
from djax.models.layers.parameters import normal, ones
from kernels_pallas import attention


class Place(TypedDict):
    """Place of a window of W positions on its canvas of T."""

    rotation: Rotation
    """Rotation of queries and keys at the window's positions."""
    key_mask: Bool[Array, "B T"] | Bool[Array, "B W T"]
    """Positions that are seen by all, or by each."""
    window_start: Int[Array, ""]
    write: Bool[Array, "B W"]
    """Positions whose keys and values go to the cache."""


class Attention(nnx.Module):
    """Grouped-query attention over the canvas, with an RMSNorm on every query and key head before the rotation.

    Where the configuration has a `block_length`, a position sees its own block and all before it. Blocks are counted
    from each row's first key.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, implementation: str | None = None, parallel: Parallel = UNSPLIT
    ) -> None:
        """`implementation` names one of `kernels_pallas.attention`."""
        model, width, dtype = config.hidden_size, config.head_dim, config.dtype
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config, self.implementation, self.parallel = config, implementation, parallel
        self.query = normal(rngs, (heads, width, model), axes=("heads", "head_dim", "embed"), dtype=dtype)
        kv_shape, kv_axes = (kv_heads, width, model), ("kv_heads", "head_dim", "embed")
        self.key = normal(rngs, kv_shape, axes=kv_axes, dtype=dtype)
        self.value = normal(rngs, kv_shape, axes=kv_axes, dtype=dtype)
        self.output = normal(rngs, (model, heads, width), axes=("embed", "heads", "head_dim"), dtype=dtype)
        self.query_norm = ones((width,), axes=("head_dim",), dtype=dtype)
        self.key_norm = ones((width,), axes=("head_dim",), dtype=dtype)

    def __call__(
        self, x: Float[Array, "B w D"], *, cache: LayerCache | None, **place: Unpack[Place]
    ) -> tuple[Float[Array, "B w D"], LayerCache | None]:
        """The block's output, without the residual, and the cache after the window was written.

        `w` is W, or the device's part of it where the positions of a full forward are split.
        """
        rotation, window_start, write = place["rotation"], place["window_start"], place["write"]
        eps, split = self.config.rms_norm_eps, x.shape[1] != write.shape[1]
        query = rms_norm(to_heads(x, self.query[...]), self.query_norm[...], eps=eps)
        key_weight, value_weight = (self.local_kv(weight[...]) for weight in (self.key, self.value))
        key = rms_norm(to_heads(x, key_weight), self.key_norm[...], eps=eps)
        value = to_heads(x, value_weight)
        query, key = rotate_first(query, rotation), rotate_first(key, rotation)
        if split:
            key, value = self.parallel.all_positions(jnp.stack([key, value]), write.shape[1], axis=2)
        if cache is not None:
            cache = cache.write(key, value, window_start=window_start, write=write)
            key, value = cache.key, cache.value
        start = window_start if cache is not None else jnp.int32(0)
        if split:
            start = start + self.parallel.index(self.parallel.sequence) * x.shape[1]
        mixed = self._attend(
            query, key, value, key_mask=place["key_mask"], start=start, cached=cache is not None)
        return self.parallel.sum((from_heads(mixed, self.output[...]), self.parallel.heads)), cache

    def _attend(
        self, query: Float[Array, "B w H K"], key: Float[Array, "B T G K"], value: Float[Array, "B T G K"], *,
        key_mask: Bool[Array, "B T"] | Bool[Array, "B w T"], start: Int[Array, ""], cached: bool,
    ) -> Float[Array, "B w H K"]:
        """Attention of queries that stand at `start` and after it."""
        block_length = self.config.block_length
        if block_length is None or key_mask.ndim == 3:  # a mask of each query's own says all
            return attention(query, key, value, key_mask=key_mask, implementation=self.implementation)
        origin = block_origin(key_mask, block_length)
        if query.shape[0] > 1 and not cached:
            # rows may begin anywhere
            mask = block_causal(key_mask, start=start, width=query.shape[1], block_length=block_length, origin=origin)
            return attention(query, key, value, key_mask=mask, implementation=self.implementation)
        return attention(
            query, key, value, key_mask=key_mask, window_start=start, block_length=block_length,
            block_origin=jnp.max(jnp.where(key_mask.any(axis=1), origin, 0)), implementation=self.implementation)

    def local_kv(self, weight: Float[Array, "G K D"]) -> Float[Array, "g K D"]:
        """The part of a key or value weight that the query heads here need."""
        config = self.config
        return self.parallel.local_kv_heads(
            weight, num_heads=self.query.shape[0], ratio=config.num_heads // config.num_kv_heads)


def rotate_first(x: Float[Array, "B W H K"], rotation: Rotation) -> Float[Array, "B W H K"]:
    """Rotate as many numbers of each head, from the first on, as the rotation is wide; the others stay."""
    width = rotation[0].shape[-1]
    if width == x.shape[-1]:
        return rotate(x, rotation)
    return jnp.concatenate([rotate(x[..., :width], rotation), x[..., width:]], axis=-1)


def block_origin(key_mask: Bool[Array, "B T"], block_length: int) -> Int[Array, " B"]:
    """A canvas position at which each row's blocks begin, in [0, L): that of its first key, modulo L."""
    return lax.argmax(key_mask, 1, jnp.int32) % block_length


def block_causal(
    key_mask: Bool[Array, "B T"], *, start: Int[Array, ""], width: int, block_length: int, origin: Int[Array, " B"]
) -> Bool[Array, "B w T"]:
    """The keys that each of `width` queries sees, the first of which is at `start`: its own block and all before."""
    position = start + jnp.arange(width, dtype=jnp.int32)[None] - origin[:, None]
    end = (position // block_length + 1) * block_length + origin[:, None]
    return key_mask[:, None] & (jnp.arange(key_mask.shape[1], dtype=jnp.int32)[None, None] < end[..., None])
