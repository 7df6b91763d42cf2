"""LLaDA-MoE with random weights on the device, and its windowed forward with a choice of every op's implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from benchmarks.harness.cases import Sizes
from benchmarks.kernels.ops import normal
from djax.contracts.cache import KVCache
from djax.models import Kernels, build, init_params
from djax.models.families.llada_moe import Layer
from djax.models.layers.basic import rms_norm
from djax.models.layers.moe import router_logits
from kernels_pallas import moe_quantized, quantize_experts, top_k_route, unembed

SHARPNESS = 4.0
"""Weight of the query and key norms. Attention of random weights is flat, and then all masked positions, which share
one embedding, go to the same few experts and few weights are read; sharp attention tells them apart, as a trained
model's does. `Network.experts_read` counts how far that goes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Names of implementations; None is what djax picks."""

    name: str
    moe: str | None = None
    attention: str | None = None
    head: str | None = None
    experts: str | None = None
    """dtype of 8-bit experts, or None."""


VARIANTS = {variant.name: variant for variant in (
    Variant(name="djax"),
    Variant(name="djax.int8", experts="int8"),
    Variant(name="djax.float8_e4m3fn", experts="float8_e4m3fn"),
    Variant(name="xla", moe="xla_dense", attention="cudnn", head="reference"),
    Variant(name="xla.no_cudnn", moe="xla_dense", attention="xla", head="reference"),
    Variant(name="xla.djax_moe", attention="cudnn", head="reference"),
    Variant(name="xla.djax_attention", moe="xla_dense", head="reference"),
    Variant(name="xla.djax_head", moe="xla_dense", attention="cudnn"),
)}
"""djax as it is; XLA's best: dense experts, cuDNN's attention, all logits in memory; and one op at a time."""


class Network:
    """The weights, drawn once, and the programs that run them."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.config = sizes, sizes.config
        self._abstract = build(self.config)
        self.params = _spread(init_params(self.config, jax.random.key(0))[1])
        self._quantized: dict[str, Any] = {}

    def graphdef(self, variant: Variant) -> Any:
        """The network without its weights."""
        kernels = Kernels(moe=variant.moe, attention=variant.attention, unembed=variant.head)
        return nnx.split(build(self.config, kernels=kernels))[0]

    def quantized(self, dtype: str | None) -> tuple[Any, ...] | None:
        """Every layer's experts in 8 bits; None for None."""
        if dtype is None:
            return None
        if dtype not in self._quantized:
            shrink = jax.jit(partial(quantize_experts, dtype=dtype))
            self._quantized[dtype] = tuple(shrink(*experts) for experts in self._experts())
        return self._quantized[dtype]

    def abstract_quantized(self, dtype: str | None) -> tuple[Any, ...] | None:
        """Shapes and dtypes of `quantized`."""
        if dtype is None:
            return None
        return tuple(jax.eval_shape(partial(quantize_experts, dtype=dtype), *experts) for experts in self._experts())

    def _experts(self) -> list[tuple[Array, Array, Array]]:
        model = nnx.merge(self.graphdef(VARIANTS["djax"]), self.params)
        return [(layer.moe.gate[...], layer.moe.up[...], layer.moe.down[...]) for layer in model.layers]

    def cache(self, batch: int, context: int) -> Any:
        """A cache full of random keys and values."""
        config = self.config
        empty = jax.eval_shape(lambda: KVCache.zeros(
            num_layers=config.num_layers, batch=batch, length=context, num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, dtype=config.dtype))
        leaves, tree = jax.tree.flatten(empty)
        return tree.unflatten(
            normal(jax.random.key(20 + number), 1.0, shape=leaf.shape, dtype=leaf.dtype.name)
            for number, leaf in enumerate(leaves))

    def window(self, batch: int, window: int, context: int) -> tuple[Any, ...]:
        """Operands of `windowed_forward` behind the weights: tokens, rotation, key mask and start.

        The window stands in the middle of the canvas; its tokens are masks, as most are in a block's first steps.
        """
        start = (context - window) // 2
        positions = jnp.broadcast_to(jnp.arange(start, start + window), (batch, window))
        tokens = jnp.full((batch, window), self.config.mask_id, jnp.int32)
        return tokens, self._abstract.rotation(positions), jnp.ones((batch, context), bool), jnp.int32(start)

    def experts_read(self, windows: Sequence[int]) -> dict[int, list[int]]:
        """How many different experts the middle `windows` of the main canvas choose, layer by layer.

        The canvas is half random tokens, half masks, computed whole and without a cache; by XLA's operations, so that
        a kernel that hangs does not take the baselines with it.
        """
        _, context, _ = self.sizes.main
        model = nnx.merge(self.graphdef(VARIANTS["xla.no_cudnn"]), self.params)
        tokens = jax.random.randint(jax.random.key(10), (1, context), 0, self.config.vocab_size)
        middle = context // 2 - max(windows) // 2
        tokens = jnp.where(jnp.arange(context) < middle, tokens, self.config.mask_id)
        x, rotation = model.embed_tokens(tokens), model.rotation(jnp.arange(context)[None])
        counts: dict[int, list[int]] = {window: [] for window in windows}
        for layer in model.layers:
            graphdef, params = nnx.split(layer)
            x, chosen = _layer(graphdef, params, x, rotation, slots=self.config.experts_per_token)
            for window in windows:
                start = context // 2 - window // 2
                counts[window].append(len(np.unique(np.asarray(chosen)[start : start + window])))
        return counts


def _spread(params: nnx.State) -> nnx.State:
    """Weights with which positions differ, see `SHARPNESS`."""
    def scale(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path)
        if "query_norm" in name or "key_norm" in name:
            return leaf * SHARPNESS
        return leaf

    return jax.tree_util.tree_map_with_path(scale, params)


@partial(jax.jit, static_argnames=("graphdef", "slots"))
def _layer(
    graphdef: Any, params: Any, x: Float[Array, "1 T D"], rotation: Any, *, slots: int
) -> tuple[Float[Array, "1 T D"], Int[Array, "T k"]]:
    """A layer on a whole canvas, and the experts that each position chooses."""
    layer: Layer = nnx.merge(graphdef, params)
    everywhere = jnp.ones(x.shape[:2], bool)
    x, _ = layer.mix(x, rotation=rotation, key_mask=everywhere, window_start=jnp.int32(0), write=everywhere, cache=None)
    x, logits = layer.transform(x)
    return x, jax.lax.top_k(logits[0], slots)[1]


def windowed_forward(graphdef: Any, variant: Variant, sizes: Sizes, block: int) -> Callable[..., Any]:
    """A function of (cache, params, 8-bit experts, tokens, rotation, key mask, start): one forward of a window.

    It returns the cache with the window written, and the best token and its log-probability on the window's middle
    `block` positions: what one step of the loop computes before it decides.
    """
    config = sizes.config

    def run(
        cache: Any, params: Any, quantized: Any, tokens: Int[Array, "B W"], rotation: Any,
        key_mask: Bool[Array, "B T"], window_start: Int[Array, ""],
    ) -> tuple[Any, tuple[Array, Array]]:
        model = nnx.merge(graphdef, params)
        offset = (tokens.shape[1] - block) // 2
        place = {"rotation": rotation, "key_mask": key_mask, "window_start": window_start,
                 "write": jnp.ones(tokens.shape, bool)}
        x = model.embed_tokens(tokens)
        if quantized is None:
            x, cache = model.trunk(x, cache=cache, **place)
            hidden = model.finish(x[:, offset : offset + block])
        else:
            hidden, cache = _quantized_trunk(model, x, quantized, cache, slice(offset, offset + block), place)
        rows = hidden.reshape(-1, hidden.shape[-1])
        found = unembed(
            rows, model.head[...], at=tokens[:, offset : offset + block].reshape(-1, 1),
            forbidden=jnp.array([config.mask_id], jnp.int32), vocab_limit=config.vocab_size - 1,
            implementation=variant.head)
        return cache, (found.best, found.best_logit - found.log_total)

    return run


def _quantized_trunk(
    model: Any, x: Float[Array, "B W D"], quantized: Sequence[Any], cache: Any, block: slice, place: dict[str, Any]
) -> tuple[Float[Array, "B L D"], Any]:
    """`trunk` and `finish` with each layer's experts in 8 bits."""
    caches = []
    for index, layer in enumerate(model.layers):
        x, layer_cache = layer.mix(x, cache=cache.layers[index], **place)
        caches.append(layer_cache)
        x = _transform(layer, x if index < len(model.layers) - 1 else x[:, block], quantized[index])
    return rms_norm(x, model.norm[...], eps=model.config.rms_norm_eps), dataclasses.replace(cache, layers=tuple(caches))


def _transform(layer: Layer, x: Float[Array, "B W D"], experts: Any) -> Float[Array, "B W D"]:
    """A layer's second half, its experts in 8 bits."""
    rows = rms_norm(x, layer.moe_norm[...], eps=layer.config.rms_norm_eps).reshape(-1, x.shape[-1])
    logits = router_logits(rows, layer.moe.router[...])
    ids, weights = top_k_route(logits, experts_per_token=layer.config.experts_per_token)
    return x + moe_quantized(rows, ids, weights, experts).reshape(x.shape)
