"""LLaDA2.0: block-causal attention, then one dense block in the first layers and a mixture of experts in the others.

Parameters have the checkpoint's own order (rows are outputs), one array per layer. Letters: B batch, T canvas,
W window, M rows, D model, H heads, G key/value heads, K head width, E experts, F width of an expert or a dense block.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from djax.devices.parallel import WHOLE, Parallel
from djax.models.config import Llada2MoeConfig
from djax.models.layers import trunk
from djax.models.layers.basic import contract, rms_norm
from djax.models.layers.kernels import Kernels
from djax.models.layers.moe import router_logits
from djax.models.layers.parameters import normal, ones, zeros
from djax.models.layers.trunk import Transformer
from kernels_pallas import moe
from kernels_pallas.moe.router import top_k_by_maxima

TINY = 1e-20
"""What the checkpoints' own code adds to a sum of scores before it divides by it."""


def route_in_groups(
    logits: Float[Array, "M E"], bias: Float[Array, " E"], *, experts_per_token: int, num_groups: int,
    groups_per_token: int, scale: float,
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """Experts of each row and their weights, as DeepSeek-V3 routes (arXiv 2412.19437, 2.1.2).

    Experts are chosen by the sigmoid of their logit plus a bias that balances their load, among those of the
    `groups_per_token` groups whose two best have the largest sum; of equal ones the first. Weights are the sigmoids
    without the bias, made to sum to `scale`; that of a single expert is its sigmoid times `scale`, as in the published
    code, which divides by the sum only where there are several.

    Returns:
        Expert ids, the best first, and weights in float32.
    """
    scores = jax.nn.sigmoid(logits)
    biased = scores + bias[None]
    rows, size = scores.shape[0], scores.shape[1] // num_groups
    best_two, _ = _top_k(biased.reshape(rows * num_groups, size), 2)
    _, groups = _top_k(best_two.sum(axis=-1).reshape(rows, num_groups), groups_per_token)
    kept = (groups[:, :, None] == jnp.arange(num_groups, dtype=jnp.int32)[None, None]).any(axis=1)
    _, expert_ids = _top_k(jnp.where(jnp.repeat(kept, size, axis=1), biased, -jnp.inf), experts_per_token)
    weights = jnp.take_along_axis(scores, expert_ids, axis=1)
    if experts_per_token > 1:
        weights = weights / (weights.sum(axis=1, keepdims=True) + TINY)
    return expert_ids, scale * weights


def _top_k(values: Float[Array, "M n"], k: int) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """`jax.lax.top_k`, without the sort that a CPU would do."""
    best: tuple[Array, Array] = lax.platform_dependent(
        values, cpu=partial(top_k_by_maxima, k=k), default=lambda values: tuple(lax.top_k(values, k)))
    return best


class SwiGlu(nnx.Module):
    """A dense SwiGLU block of width F; over a mesh its result is partial: the sum of all `ffn` devices' is whole."""

    def __init__(self, config: Llada2MoeConfig, width: int, *, rngs: nnx.Rngs) -> None:
        model, dtype = config.hidden_size, config.dtype
        self.gate = normal(rngs, (width, model), axes=("ffn", "embed"), dtype=dtype)
        self.up = normal(rngs, (width, model), axes=("ffn", "embed"), dtype=dtype)
        self.down = normal(rngs, (model, width), axes=("embed", "ffn"), dtype=dtype)

    def __call__(self, rows: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """down (silu(gate x) * (up x)) of each row; products in float32, hidden units rounded to x's dtype."""
        gate, up = (contract("md,fd->mf", rows, weight[...], dtype=jnp.float32) for weight in (self.gate, self.up))
        return contract("mf,df->md", (jax.nn.silu(gate) * up).astype(rows.dtype), self.down[...])


class MixtureOfExperts(nnx.Module):
    """E SwiGLU experts, of which each position uses its router's k best, and the shared ones, which all use."""

    def __init__(
        self, config: Llada2MoeConfig, *, rngs: nnx.Rngs, implementation: str | None = None,
        parallel: Parallel = WHOLE,
    ) -> None:
        """`implementation` names one of `kernels_pallas.moe`."""
        model, experts, width = config.hidden_size, config.num_experts, config.expert_size
        self.config, self.implementation, self.parallel = config, implementation, parallel
        self.router = normal(rngs, (experts, model), axes=(None, "embed"), dtype=config.dtype)
        self.expert_bias = zeros((experts,), axes=(None,), dtype=jnp.float32)
        wide, narrow = (experts, width, model), (experts, model, width)
        self.gate = normal(rngs, wide, axes=("experts", "ffn", "embed"), dtype=config.dtype)
        self.up = normal(rngs, wide, axes=("experts", "ffn", "embed"), dtype=config.dtype)
        self.down = normal(rngs, narrow, axes=("experts", "embed", "ffn"), dtype=config.dtype)
        self.shared = SwiGlu(config, config.num_shared_experts * width, rngs=rngs)

    def __call__(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "B W E"]]:
        """The block's output, without the residual, and the router's logits."""
        config, parallel = self.config, self.parallel
        rows = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            logits = router_logits(rows, self.router[...])
            expert_ids, weights = route_in_groups(
                logits, self.expert_bias[...], experts_per_token=config.experts_per_token,
                num_groups=config.num_groups, groups_per_token=config.groups_per_token,
                scale=config.routed_scaling_factor)
        with jax.named_scope("experts"):
            if parallel.experts:  # an id of another device's expert is outside [0, E) here and adds nothing
                expert_ids = expert_ids - parallel.index(parallel.experts) * self.gate.shape[0]
            routed = moe(rows, expert_ids, weights, self.gate[...], self.up[...], self.down[...],
                         implementation=self.implementation)
        with jax.named_scope("shared"):
            shared = self.shared(rows)
        mixed = parallel.sum((routed, parallel.experts + parallel.ffn), (shared, parallel.ffn))
        return mixed.reshape(x.shape), logits.reshape(*x.shape[:2], -1)


class Layer(trunk.Layer):
    """Attention, then a dense block or experts, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: Llada2MoeConfig, index: int, *, rngs: nnx.Rngs, kernels: Kernels = Kernels(),
        parallel: Parallel = WHOLE,
    ) -> None:
        super().__init__(config, rngs=rngs, kernels=kernels, parallel=parallel)
        self.mlp_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.is_dense = index < config.num_dense_layers
        if self.is_dense:
            self.mlp = SwiGlu(config, config.dense_size, rngs=rngs)
        else:
            self.moe = MixtureOfExperts(config, rngs=rngs, implementation=kernels.moe, parallel=parallel)

    def transform(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "B W E"] | None]:
        """The second half, each position by itself; and the router's logits, None in a dense layer."""
        normed = rms_norm(x, self.mlp_norm[...], eps=self.config.rms_norm_eps)
        if not self.is_dense:
            with jax.named_scope("moe"):
                mixed, logits = self.moe(normed)
            return x + mixed, logits
        with jax.named_scope("mlp"):
            mixed = self.parallel.sum((self.mlp(normed.reshape(-1, x.shape[-1])), self.parallel.ffn))
        return x + mixed.reshape(x.shape), None


class Llada2Moe(Transformer):
    """LLaDA2.0 (arXiv 2512.15745), mini and flash.

    Attention blocks are counted from each row's first real token. Without a cache rows may begin anywhere on the
    canvas. With one, all rows' first tokens must be a multiple of the block length apart, because one boundary serves
    all: `Canvas.from_prompts(align=True)` lays them out so.
    """

    def __init__(
        self, config: Llada2MoeConfig, *, rngs: nnx.Rngs, kernels: Kernels = Kernels(), parallel: Parallel = WHOLE
    ) -> None:
        """Random weights; `parallel` is for a model whose parameters are one device's part of them."""
        super().__init__(
            config, lambda index: Layer(config, index, rngs=rngs, kernels=kernels, parallel=parallel),
            rotary_dim=config.rotary_dim, rngs=rngs, kernels=kernels, parallel=parallel)
