"""The mixture-of-experts block, and the routers that choose a position's experts."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from djax.devices.parallel import UNSPLIT, Parallel
from djax.models.config import FeedForward, ModelConfig
from djax.models.layers.basic import SwiGlu, contract
from djax.models.layers.parameters import normal, zeros
from kernels_pallas import moe, top_k_route
from kernels_pallas.moe.router import top_k_short

TINY = 1e-20
"""Added to a sum of scores before the division by it, as in LLaDA2's own code."""

Choice = tuple[Int[Array, "M k"], Float[Array, "M k"]]
"""Expert ids of each row, the best first, and their weights in float32."""


def router_logits(x: Float[Array, "M D"], router: Float[Array, "E D"]) -> Float[Array, "M E"]:
    """float32 logits over the experts."""
    return contract("md,ed->me", x, router, dtype=jnp.float32)


class Router(Protocol):
    """How logits become a choice: hashable, without arrays of its own."""

    biased: ClassVar[bool]
    """Whether it adds a bias to each expert's score, which is a parameter of the block."""

    def __call__(self, logits: Float[Array, "M E"], bias: Float[Array, " E"] | None = None) -> Choice:
        """The experts of each row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxTopK:
    """The largest shares of a softmax over all experts, which are the weights as they are: not renormalised."""

    experts_per_token: int
    implementation: str | None = "xla"
    """That of `kernels_pallas.top_k_route`; XLA's can be split over devices."""
    biased: ClassVar[bool] = False

    def __call__(self, logits: Float[Array, "M E"], bias: Float[Array, " E"] | None = None) -> Choice:
        """The experts of each row."""
        del bias
        return top_k_route(logits, experts_per_token=self.experts_per_token, implementation=self.implementation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedSigmoid:
    """Routing as in DeepSeek-V3 (arXiv 2412.19437, 2.1.2).

    Experts are chosen by the sigmoid of their logit plus a bias that balances their load, among those of the
    `groups_per_token` groups whose two best have the largest sum; of equal ones the first. Weights are the sigmoids
    without the bias, made to sum to `scale`; that of a single expert is its sigmoid times `scale`, as in the published
    code, which divides by the sum only where there are several.
    """

    experts_per_token: int
    num_groups: int
    groups_per_token: int
    scale: float
    biased: ClassVar[bool] = True

    def __call__(self, logits: Float[Array, "M E"], bias: Float[Array, " E"] | None = None) -> Choice:
        """The experts of each row."""
        scores = jax.nn.sigmoid(logits)
        biased = scores if bias is None else scores + bias[None]
        rows, size = scores.shape[0], scores.shape[1] // self.num_groups
        best_two, _ = top_k_short(biased.reshape(rows * self.num_groups, size), 2)
        _, groups = top_k_short(best_two.sum(axis=-1).reshape(rows, self.num_groups), self.groups_per_token)
        kept = (groups[:, :, None] == jnp.arange(self.num_groups, dtype=jnp.int32)[None, None]).any(axis=1)
        _, expert_ids = top_k_short(jnp.where(jnp.repeat(kept, size, axis=1), biased, -jnp.inf), self.experts_per_token)
        weights = jnp.take_along_axis(scores, expert_ids, axis=1)
        if self.experts_per_token > 1:
            weights = weights / (weights.sum(axis=1, keepdims=True) + TINY)
        return expert_ids, self.scale * weights


class MixtureOfExperts(nnx.Module):
    """E SwiGLU experts of width F, of which each position uses its router's k best, and shared ones, which all use."""

    def __init__(
        self, config: ModelConfig, shape: FeedForward, route: Router, *, rngs: nnx.Rngs,
        implementation: str | None = None, parallel: Parallel = UNSPLIT,
    ) -> None:
        """`implementation` names one of `kernels_pallas.moe`."""
        model, experts, width, dtype = config.hidden_size, shape.num_experts, shape.expert_size, config.dtype
        self.route, self.implementation, self.parallel = route, implementation, parallel
        self.router = normal(rngs, (experts, model), axes=(None, "embed"), dtype=dtype)
        self.expert_bias = zeros((experts,), axes=(None,), dtype=jnp.float32) if route.biased else None
        wide, narrow = (experts, width, model), (experts, model, width)
        self.gate = normal(rngs, wide, axes=("experts", "ffn", "embed"), dtype=dtype)
        self.up = normal(rngs, wide, axes=("experts", "ffn", "embed"), dtype=dtype)
        self.down = normal(rngs, narrow, axes=("experts", "embed", "ffn"), dtype=dtype)
        self.shared = SwiGlu(model, shape.dense_size, rngs=rngs, dtype=dtype) if shape.dense_size else None

    def __call__(self, x: Float[Array, "B W D"]) -> tuple[Float[Array, "B W D"], Float[Array, "B W E"]]:
        """The block's output, without the residual, and the router's logits, which training balances."""
        rows, parallel = x.reshape(-1, x.shape[-1]), self.parallel
        with jax.named_scope("router"):
            logits = router_logits(rows, self.router[...])
            expert_ids, weights = self.route(logits, None if self.expert_bias is None else self.expert_bias[...])
        with jax.named_scope("experts"):
            if parallel.experts:  # an id of another device's expert is outside [0, E) here and adds nothing
                expert_ids = expert_ids - parallel.index(parallel.experts) * self.gate.shape[0]
            terms = [(moe(rows, expert_ids, weights, self.gate[...], self.up[...], self.down[...],
                          implementation=self.implementation), parallel.experts + parallel.ffn)]
        if self.shared is not None:
            with jax.named_scope("shared"):
                terms.append((self.shared(rows), parallel.ffn))
        return parallel.sum(*terms).reshape(x.shape), logits.reshape(*x.shape[:2], -1)
