"""LLaDA-MoE: a bidirectional transformer with a mixture of experts in every layer.

Parameters have the checkpoint's own order (rows are outputs), one array per layer: a stack of layers would
be copied expert by expert before it is used. Letters: B batch, T canvas, W window, V vocabulary, D model,
H heads, G key/value heads, K head width, E experts, F expert width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from djax.cache import KVCache, LayerCache
from djax.config import LladaMoeConfig
from djax.models.head import read_head
from djax.models.kernels import Kernels
from djax.models.layers import Rotation, contract, from_heads, rms_norm, rotary_angles, rotate, to_heads
from djax.models.log_probs import token_log_probs
from djax.models.moe import MixtureOfExperts
from djax.models.parameters import normal, ones
from djax.types import HeadQuery, Reading
from kernels_pallas import attention


class Attention(nnx.Module):
    """Attention over the whole canvas, with an RMSNorm on every query and key head before the rotation."""

    def __init__(
        self, config: LladaMoeConfig, *, rngs: nnx.Rngs, attention_implementation: str | None = None
    ) -> None:
        model, width, dtype = config.hidden_size, config.head_dim, config.dtype
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config, self.implementation = config, attention_implementation
        self.query = normal(rngs, (heads, width, model), axes=("heads", "head_dim", "embed"), dtype=dtype)
        kv_shape, kv_axes = (kv_heads, width, model), ("kv_heads", "head_dim", "embed")
        self.key = normal(rngs, kv_shape, axes=kv_axes, dtype=dtype)
        self.value = normal(rngs, kv_shape, axes=kv_axes, dtype=dtype)
        self.output = normal(rngs, (model, heads, width), axes=("embed", "heads", "head_dim"), dtype=dtype)
        self.query_norm = ones((width,), axes=("head_dim",), dtype=dtype)
        self.key_norm = ones((width,), axes=("head_dim",), dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B W D"],
        *,
        rotation: Rotation,
        key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B W D"], LayerCache | None]:
        """The block's output, without the residual, and the cache after the window was written."""
        eps = self.config.rms_norm_eps
        query = rms_norm(to_heads(x, self.query[...]), self.query_norm[...], eps=eps)
        key = rms_norm(to_heads(x, self.key[...]), self.key_norm[...], eps=eps)
        value = to_heads(x, self.value[...])
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            cache = cache.write(key, value, window_start=window_start, write=write)
            key, value = cache.key, cache.value
        mixed = attention(query, key, value, key_mask=key_mask, implementation=self.implementation)
        return from_heads(mixed, self.output[...]), cache


class Layer(nnx.Module):
    """Attention, then experts, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: LladaMoeConfig, *, rngs: nnx.Rngs, kernels: Kernels = Kernels()
    ) -> None:
        self.config = config
        self.attention_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.attention = Attention(config, rngs=rngs, attention_implementation=kernels.attention)
        self.moe_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.moe = MixtureOfExperts(config, rngs=rngs, moe_implementation=kernels.moe)

    def __call__(
        self,
        x: Float[Array, "B W D"],
        *,
        rotation: Rotation,
        key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B W D"], LayerCache | None]:
        """The residual stream after the layer, and the layer's cache."""
        x, cache = self.mix(
            x, rotation=rotation, key_mask=key_mask, window_start=window_start, write=write, cache=cache)
        return self.transform(x)[0], cache

    def mix(
        self,
        x: Float[Array, "B W D"],
        *,
        rotation: Rotation,
        key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B W D"], LayerCache | None]:
        """The layer's first half, attention: the residual stream after it, and the layer's cache."""
        with jax.named_scope("attention"):
            mixed, cache = self.attention(
                rms_norm(x, self.attention_norm[...], eps=self.config.rms_norm_eps), rotation=rotation,
                key_mask=key_mask, window_start=window_start, write=write, cache=cache)
        return x + mixed, cache

    def transform(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "B W E"]]:
        """The second half, the experts, each position by itself; and the router's logits."""
        with jax.named_scope("moe"):
            mixed, logits = self.moe(rms_norm(x, self.moe_norm[...], eps=self.config.rms_norm_eps))
        return x + mixed, logits


class LladaMoe(nnx.Module):
    """LLaDA-MoE (arXiv 2509.24389): tokens to hidden states to position-aligned logits (no shift)."""

    def __init__(
        self, config: LladaMoeConfig, *, rngs: nnx.Rngs, kernels: Kernels = Kernels()
    ) -> None:
        """Random weights: normal with standard deviation 0.02, norms one."""
        shape = (config.vocab_size, config.hidden_size)
        self.config, self.kernels = config, kernels
        self.embed = normal(rngs, shape, axes=("vocab", "embed"), dtype=config.dtype)
        self.layers = nnx.List([
            Layer(config, rngs=rngs, kernels=kernels)
            for _ in range(config.num_layers)])
        self.norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.head = normal(rngs, shape, axes=("vocab", "embed"), dtype=config.dtype)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` canvases of `length` positions, in the weights' dtype."""
        config = self.config
        return KVCache.zeros(
            num_layers=config.num_layers, batch=batch, length=length, num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, dtype=self.embed[...].dtype)

    def rotation(self, positions: Int[Array, "B W"]) -> Rotation:
        """What every layer turns its queries and keys by at `positions`."""
        return rotary_angles(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)

    def embed_tokens(self, tokens: Int[Array, "B W"]) -> Float[Array, "B W D"]:
        """Input embeddings of tokens."""
        with jax.named_scope("embed"):
            return self.embed[...][tokens]

    def __call__(
        self,
        inputs: Float[Array, "B W D"],
        *,
        positions: Int[Array, "B W"],
        key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
        cache: KVCache | None,
    ) -> tuple[Float[Array, "B W D"], KVCache | None]:
        """Hidden states of a window after the final norm, and the cache with the window written.

        With a cache, queries attend to all of it as it is after the write; without one the window is the
        canvas (W = T) and neither `window_start` nor `write` is read.

        Raises:
            ValueError: there is no cache and the window is not the canvas, or the cache has another length
                than `key_mask`.
        """
        x, cache = self.trunk(
            inputs, rotation=self.rotation(positions), key_mask=key_mask, window_start=window_start, write=write,
            cache=cache)
        return self.finish(x), cache

    def trunk(
        self,
        inputs: Float[Array, "B W D"],
        *,
        rotation: Rotation,
        key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
        cache: KVCache | None,
    ) -> tuple[Float[Array, "B W D"], KVCache | None]:
        """All of the network in which positions meet: up to the last layer's experts. See `__call__`.

        What remains, `finish`, takes each position by itself, so it need only run where it is read.
        """
        canvas = inputs.shape[1] if cache is None else cache.length
        if key_mask.shape[1] != canvas:
            raise ValueError(
                f"key_mask: got {key_mask.shape[1]} positions; it must cover the canvas, which is "
                + (f"the window of {canvas} without a cache" if cache is None else f"the cache's {canvas}"))
        x = inputs.astype(self.embed[...].dtype)
        layer_caches = []
        for index, layer in enumerate(self.layers):
            step = layer if index < len(self.layers) - 1 else layer.mix
            with jax.named_scope(f"layer_{index}"):
                x, layer_cache = step(
                    x, rotation=rotation, key_mask=key_mask, window_start=window_start, write=write,
                    cache=None if cache is None else cache.layers[index])
            if layer_cache is not None:
                layer_caches.append(layer_cache)
        return x, None if cache is None else KVCache(tuple(layer_caches))

    def finish(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The last layer's experts and the final norm, for any positions that `trunk` gave."""
        with jax.named_scope(f"layer_{len(self.layers) - 1}"):
            x, _ = self.layers[-1].transform(x)
        return rms_norm(x, self.norm[...], eps=self.config.rms_norm_eps)

    def hidden_and_router(
        self, tokens: Int[Array, "B T"], *, positions: Int[Array, "B T"],
        key_mask: Bool[Array, "B T"] | Bool[Array, "B T T"], remat: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "N B T E"]]:
        """For training: hidden states of whole canvases after the final norm, and every layer's router logits.

        `key_mask` says which positions are seen, by all or by each (see `kernels_pallas.attention`). With `remat` a
        layer's activations are computed again in the backward pass instead of being kept.
        """
        rotation = self.rotation(positions)

        def run(layer: Layer, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
            x, _ = layer.mix(x, rotation=rotation, key_mask=key_mask, window_start=jnp.int32(0), write=key_mask,
                             cache=None)
            return layer.transform(x)

        x, logits = self.embed_tokens(tokens), []
        for index, layer in enumerate(self.layers):
            step = partial(run, layer)
            with jax.named_scope(f"layer_{index}"):
                x, of_layer = (jax.checkpoint(step) if remat else step)(x)
            logits.append(of_layer)
        return rms_norm(x, self.norm[...], eps=self.config.rms_norm_eps), jnp.stack(logits)

    def log_probs(
        self, hidden: Float[Array, "B L D"], tokens: Int[Array, "B L"], *, vocab_chunk: int = 8192
    ) -> Float[Array, "B L"]:
        """float32 log-probs of `tokens`, without the logits of the whole vocabulary; see `token_log_probs`."""
        with jax.named_scope("head"):
            return token_log_probs(hidden, self.head[...], tokens, vocab_chunk=vocab_chunk)

    def unembed(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """float32 logits; position i's logits are about the token at position i."""
        with jax.named_scope("head"):
            return contract("bld,vd->blv", hidden, self.head[...], dtype=jnp.float32)

    def read(
        self, hidden: Float[Array, "B L D"], query: HeadQuery, *, expected: bool
    ) -> tuple[Reading, Float[Array, "B L D"] | None]:
        """What a query asks of the logits, without them; with `expected` also `expected_embedding`."""
        with jax.named_scope("head"):
            return read_head(hidden, self.head[...], query, embed=self.embed[...] if expected else None,
                             implementation=self.kernels.unembed)

    def expected_embedding(self, logits: Float[Array, "B L V"]) -> Float[Array, "B L D"]:
        """`softmax(logits) @ embed`, the softmax in float32, its result rounded to the weights' dtype."""
        with jax.named_scope("expected_embedding"):
            embed = self.embed[...]
            return contract("blv,vd->bld", jax.nn.softmax(logits, axis=-1).astype(embed.dtype), embed)
