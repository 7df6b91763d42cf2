"""A masked-diffusion model as causal training code sees one.

Nothing here needs Tunix. Code that scores left to right takes the logits at position i for what it says about token
i + 1; `DiffusionPolicy` shows its own logits, which are about their own positions, one place earlier.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from djax.devices.sharding import Rules, shardings
from djax.models import Kernels, abstract_params, build, kernels_on, logical_axes
from djax.parts.transforms import ForbidTokens

if TYPE_CHECKING:
    from djax.api import DiffusionLM

PAD_ID = -1
"""Padding for code that tells it from tokens by `ids != pad_id`: no token has it, so EOS and mask ids are tokens."""

_FORBIDDEN_LOGIT = -1e9
"""Finite: Tunix takes an entropy of the logits, and 0 * -inf is NaN."""


class DiffusionPolicy(nnx.Module):
    """A masked-diffusion model that causal code can score: the module that Tunix trains.

    Called as Tunix calls a causal model, it masks the whole completion, runs one bidirectional forward, and rolls the
    logits by one. What Tunix takes for the log-prob of a token given those before it is then its log-prob with all of
    the completion masked: the mean-field estimate of diffu-GRPO (d1, arXiv 2504.12216), `scheme="one_step"` here.
    """

    def __init__(
        self, model: Any, *, completion_length: int, forbidden_ids: tuple[int, ...], vocab_limit: int
    ) -> None:
        """Wrap a model of `djax.models`.

        Args:
            model: whose parameters are trained; they are below `model` in this module's state.
            completion_length: the last positions of every row that are completion: `max_tokens_to_generate`.
            forbidden_ids: tokens that the sampler never draws.
            vocab_limit: nor any from here on.
        """
        self.model = model
        self.completion_length = completion_length
        self.forbidden_ids = forbidden_ids
        self.vocab_limit = vocab_limit

    def __call__(
        self, input_tokens: Int[Array, "B T"], positions: Array | None = None, cache: None = None,
        attention_mask: Array | None = None,
    ) -> tuple[Float[Array, "B T V"], None]:
        """Logits of which position i tells about token i + 1; the last position's mean nothing.

        `positions` and `attention_mask` are causal and not read: all positions that are open in a rollout are here, as
        masks, also behind an EOS, where the sampler saw them too.
        """
        columns = jnp.arange(input_tokens.shape[1], dtype=jnp.int32)[None]
        is_completion = columns >= input_tokens.shape[1] - self.completion_length
        valid = (input_tokens != PAD_ID) | is_completion
        mask_id = self.model.config.mask_id
        hidden, _ = self.model.hidden_and_router(
            jnp.where(is_completion | ~valid, mask_id, input_tokens), positions=_positions(valid), key_mask=valid,
            remat=False)
        logits = _forbid(self.model.unembed(hidden), self.forbidden_ids, self.vocab_limit)
        return jnp.roll(logits, -1, axis=1), None


def diffusion_policy(
    lm: DiffusionLM, *, completion_length: int, mesh: Mesh | None = None, rules: Rules | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32, kernels: Kernels | None = None,
) -> DiffusionPolicy:
    """A trainable copy of a model's weights, for `RLCluster(actor=...)` or `reference=`.

    Args:
        lm: whose weights are copied.
        completion_length: `max_tokens_to_generate` of the rollouts.
        mesh: of the trainer; None is the default device. Give the cluster's: Tunix would replicate what it moves.
        rules: logical axis name to mesh axis, see `djax.sharding`; None is its default.
        dtype: of the trained weights.
        kernels: implementations to train on; None is `djax.models.kernels_on(mesh)`.
    """
    axes, config = logical_axes(lm.config), lm.config
    placed = shardings(axes, abstract_params(config), mesh=mesh, rules=rules)
    leaves = [jax.device_put(leaf.astype(dtype), sharding, may_alias=False) for leaf, sharding in zip(
        jax.tree.leaves(lm.params), jax.tree.leaves(placed), strict=True)]
    graphdef, state = nnx.split(build(dataclasses.replace(config, dtype=jnp.dtype(dtype).name),
                                      kernels=kernels_on(mesh) if kernels is None else kernels))
    model = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))
    return as_policy(lm, model, completion_length)


def as_policy(lm: DiffusionLM, model: Any, completion_length: int) -> DiffusionPolicy:
    """A model that forbids what `lm`'s sampler forbids."""
    return DiffusionPolicy(
        model, completion_length=completion_length, forbidden_ids=(cast(int, lm.config.mask_id),),
        vocab_limit=lm.vocab_limit)


def _forbid(logits: Float[Array, "B T V"], ids: tuple[int, ...], limit: int) -> Float[Array, "B T V"]:
    """Logits without what a sampler cannot draw."""
    forbid = ForbidTokens(jnp.asarray(ids, jnp.int32), limit)
    kept, _ = forbid.step(logits, jnp.ones(logits.shape[:2], bool), ())
    return jnp.maximum(kept, _FORBIDDEN_LOGIT)


def _positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
