"""The trunk around a family's layers: embedding, cache, final norm, head and its readings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from djax.contracts.cache import KVCache
from djax.contracts.types import HeadQuery, Reading
from djax.devices.parallel import Parallel
from djax.models.config import FeedForward, ModelConfig
from djax.models.layers.attention import Place
from djax.models.layers.basic import Rotation, contract, rms_norm, rotary_angles
from djax.models.layers.head import read_head
from djax.models.layers.kernels import Kernels
from djax.models.layers.log_probs import token_log_probs
from djax.models.layers.parameters import normal, ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Facts about a model family."""

    config: type[ModelConfig]
    """Its configurations, which say whose they are."""
    layer: Callable[..., Any]
    """(config, index, *, rngs, kernels, parallel) to a layer with random weights; see `Transformer`."""
    rotary_dim: Callable[[Any], int]
    """(config) to how many numbers of a head are rotated by its position."""
    feed_forwards: Callable[[Any], tuple[FeedForward, ...]]
    """(config) to what stands behind the attention of each layer."""
    published: Mapping[str, ModelConfig]
    """Sizes that can be planned for by name, without a download."""


class Transformer(nnx.Module):
    """Tokens to hidden states to position-aligned logits (no shift).

    A layer has two halves: `mix`, attention, in which positions meet, and `transform`, which takes each position by
    itself and also gives the router's logits (None where there is no router). Its `attention` has the weight `key`
    and the method `local_kv`.
    """

    def __init__(
        self, config: ModelConfig, family: Family, *, rngs: nnx.Rngs, kernels: Kernels, parallel: Parallel
    ) -> None:
        """Random weights: normal with standard deviation 0.02, norms one."""
        shape = (config.vocab_size, config.hidden_size)
        self.config, self.kernels, self.parallel = config, kernels, parallel
        self.rotary_dim = family.rotary_dim(config)
        self.embed = normal(rngs, shape, axes=("vocab", "embed"), dtype=config.dtype)
        self.layers = nnx.List([
            family.layer(config, index, rngs=rngs, kernels=kernels, parallel=parallel)
            for index in range(config.num_layers)])
        self.norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.head = normal(rngs, shape, axes=("vocab", "embed"), dtype=config.dtype)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` canvases of `length` positions, in the weights' dtype."""
        attention = self.layers[0].attention
        own = jax.eval_shape(lambda: attention.local_kv(attention.key[...]))
        return KVCache.zeros(
            num_layers=len(self.layers), batch=batch, length=length, num_kv_heads=own.shape[0],
            head_dim=own.shape[1], dtype=self.embed[...].dtype)

    def rotation(self, positions: Int[Array, "B W"]) -> Rotation:
        """Rotation of queries and keys at `positions`, the same in every layer."""
        return rotary_angles(positions, head_dim=self.rotary_dim, theta=self.config.rope_theta)

    def embed_tokens(self, tokens: Int[Array, "B W"]) -> Float[Array, "B W D"]:
        """Input embeddings of tokens."""
        with jax.named_scope("embed"):
            return self.parallel.look_up(self.embed[...], tokens)

    def __call__(
        self, inputs: Float[Array, "B W D"], *, positions: Int[Array, "B W"], key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""], write: Bool[Array, "B W"], cache: KVCache | None,
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
        self, inputs: Float[Array, "B W D"], *, cache: KVCache | None, **place: Unpack[Place]
    ) -> tuple[Float[Array, "B W D"], KVCache | None]:
        """All of the network in which positions meet: up to the last layer's second half. See `__call__`.

        What remains, `finish`, takes each position by itself, so it need only run where it is read.
        """
        canvas = inputs.shape[1] if cache is None else cache.length
        covered = place["key_mask"].shape[1]
        if covered != canvas:
            raise ValueError(
                f"key_mask: got {covered} positions; it must cover the canvas, which is "
                + (f"the window of {canvas} without a cache" if cache is None else f"the cache's {canvas}"))
        x, window = inputs.astype(self.embed[...].dtype), inputs.shape[1]
        split = bool(self.parallel.sequence) and window == canvas > 1
        if split:
            x = self.parallel.positions(x)
            place["rotation"] = jax.tree.map(self.parallel.positions, place["rotation"])
        layer_caches = []
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x, layer_cache = layer.mix(x, cache=None if cache is None else cache.layers[index], **place)
                if index < len(self.layers) - 1:
                    x, _ = layer.transform(x)
            if layer_cache is not None:
                layer_caches.append(layer_cache)
        if split:
            x = self.parallel.all_positions(x, window)
        return x, None if cache is None else KVCache(tuple(layer_caches))

    def finish(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The last layer's second half and the final norm, for any positions that `trunk` gave."""
        with jax.named_scope(f"layer_{len(self.layers) - 1}"):
            x, _ = self.layers[-1].transform(x)
        return rms_norm(x, self.norm[...], eps=self.config.rms_norm_eps)

    def hidden_and_router(
        self, tokens: Int[Array, "B T"], *, positions: Int[Array, "B T"],
        key_mask: Bool[Array, "B T"] | Bool[Array, "B T T"], remat: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "N B T E"]]:
        """For training: hidden states of whole canvases after the final norm, and the logits of every router.

        `key_mask` says which positions are seen by all, or which each sees: then it alone says so, blocks or not. With
        `remat` a layer's activations are computed again in the backward pass instead of being kept.
        """
        rotation = self.rotation(positions)

        def run(layer: Any, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"] | None]:
            x, _ = layer.mix(x, rotation=rotation, key_mask=key_mask, window_start=jnp.int32(0), write=key_mask,
                             cache=None)
            return layer.transform(x)

        x, logits = self.embed_tokens(tokens), []
        for index, layer in enumerate(self.layers):
            step = partial(run, layer)
            with jax.named_scope(f"layer_{index}"):
                x, of_layer = (jax.checkpoint(step) if remat else step)(x)
            if of_layer is not None:
                logits.append(of_layer)
        routers = jnp.stack(logits) if logits else jnp.zeros((0, *tokens.shape, 0), jnp.float32)
        return rms_norm(x, self.norm[...], eps=self.config.rms_norm_eps), routers

    def log_probs(
        self, hidden: Float[Array, "B L D"], tokens: Int[Array, "B L"], *, vocab_chunk: int = 8192
    ) -> Float[Array, "B L"]:
        """float32 log-probs of `tokens`, without the logits of the whole vocabulary; see `token_log_probs`."""
        with jax.named_scope("head"):
            return token_log_probs(hidden, self.head[...], tokens, vocab_chunk=vocab_chunk)

    def unembed(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """float32 logits; position i's logits are about the token at position i."""
        with jax.named_scope("head"):
            own = contract("bld,vd->blv", hidden, self.head[...], dtype=jnp.float32)
            return self.parallel.gather(own, self.parallel.vocab, axis=2)

    def read(
        self, hidden: Float[Array, "B L D"], query: HeadQuery, *, expected: bool
    ) -> tuple[Reading, Float[Array, "B L D"] | None]:
        """Answer a query about the logits without holding them; with `expected` also give `expected_embedding`."""
        with jax.named_scope("head"):
            return read_head(hidden, self.head[...], query, embed=self.embed[...] if expected else None,
                             implementation=self.kernels.unembed, parallel=self.parallel)

    def expected_embedding(self, logits: Float[Array, "B L V"]) -> Float[Array, "B L D"]:
        """`softmax(logits) @ embed`, the softmax in float32, its result rounded to the weights' dtype."""
        with jax.named_scope("expected_embedding"):
            embed, split = self.embed[...], self.parallel.vocab
            probabilities = jax.nn.softmax(logits, axis=-1).astype(embed.dtype)
            if split:
                first = self.parallel.first_id(embed)
                probabilities = lax.dynamic_slice_in_dim(probabilities, first, embed.shape[0], axis=2)
            return self.parallel.sum((contract("blv,vd->bld", probabilities, embed), split))
