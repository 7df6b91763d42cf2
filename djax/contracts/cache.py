"""The KV cache: an immutable pytree with one array per layer. Shapes and writes, no policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from djax.contracts import struct


@struct.dataclass
class LayerCache:
    """Keys (after RoPE) and values of one layer for every canvas position; G key/value heads of width K."""

    key: Float[Array, "B T G K"]
    value: Float[Array, "B T G K"]

    def write(
        self,
        key: Float[Array, "B W G K"],
        value: Float[Array, "B W G K"],
        *,
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
    ) -> LayerCache:
        """A cache whose window [window_start, window_start + W) holds `key` and `value` where `write` is set.

        Positions with `write` False keep what they held. `window_start` must be in [0, T - W].
        """

        def put(old: Float[Array, "B T G K"], new: Float[Array, "B W G K"]) -> Float[Array, "B T G K"]:
            kept = lax.dynamic_slice_in_dim(old, window_start, new.shape[1], axis=1)
            fresh = jnp.where(write[..., None, None], new.astype(old.dtype), kept)
            return lax.dynamic_update_slice_in_dim(old, fresh, window_start, axis=1)

        return LayerCache(key=put(self.key, key), value=put(self.value, value))


@struct.dataclass
class KVCache:
    """One `LayerCache` per layer: separate arrays, so that each window is written in place."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def zeros(
        cls, *, num_layers: int, batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> KVCache:
        """An empty cache for `batch` canvases of `length` positions."""
        shape = (batch, length, num_kv_heads, head_dim)
        return cls(tuple(
            LayerCache(key=jnp.zeros(shape, dtype), value=jnp.zeros(shape, dtype)) for _ in range(num_layers)))

    @property
    def length(self) -> int:
        """T, the number of canvas positions held."""
        return self.layers[0].key.shape[1]
