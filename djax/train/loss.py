"""The masked-diffusion loss of LLaDA (arXiv 2502.09992) and the losses that keep a router balanced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from djax.contracts import struct
from djax.contracts.types import Params
from djax.models.layers.moe import SoftmaxTopK

SMALLEST_NOISE = 1e-3
"""Noise levels are drawn from [it, 1]: below, a weight of 1/t is all variance and hardly any signal."""


@struct.dataclass
class Batch:
    """Rows to train on. `is_answer` says what may be masked; a prompt never is (or all of a row, in pretraining)."""

    tokens: Int[Array, "B T"]
    is_answer: Bool[Array, "B T"]
    """Tokens to learn, the EOS that ends and fills an answer included."""
    valid: Bool[Array, "B T"]
    """False on padding, which is neither attended nor learned."""

    @property
    def positions(self) -> Int[Array, "B T"]:
        """Rotary positions: 0 at a row's first real token, as in generation."""
        return jnp.maximum(jnp.cumsum(self.valid, axis=1, dtype=jnp.int32) - 1, 0)


@struct.dataclass
class LossWeights:
    """Weights of the router's losses."""

    balance: float | Float[Array, ""] = 0.01
    router_z: float | Float[Array, ""] = 1e-3


@struct.dataclass
class Losses:
    """Report of a step, float32 scalars."""

    total: Float[Array, ""]
    """The minimised value."""
    diffusion: Float[Array, ""]
    """Mean over rows of a row's bound on -log p(answer | prompt), divided by its answer's length: nats per token."""
    balance: Float[Array, ""]
    """E * sum_e f_e P_e, mean over layers: 1 when the experts are used alike (arXiv 2101.03961, eq. 4-6), with f
    counted over all chosen experts."""
    router_z: Float[Array, ""]
    """Mean squared log-sum-exp of the router's logits (arXiv 2202.08906, eq. 5)."""


def spread_evenly(key: Key[Array, ""], rows: int) -> Float[Array, " B"]:
    """A number from [0, 1) for each row, each uniform and all evenly spread (one uniform shift for all)."""
    return (jax.random.uniform(key, (), jnp.float32) + jnp.arange(rows, dtype=jnp.float32) / rows) % 1.0


def sample_masks(
    key: Key[Array, ""], is_answer: Bool[Array, "B T"]
) -> tuple[Float[Array, " B"], Bool[Array, "B T"]]:
    """A noise level t for every row and the positions masked at it, each answer token with probability t.

    Each t is uniform on [`SMALLEST_NOISE`, 1]. The rows' levels are spread evenly over it (one uniform shift for
    all), which lowers the variance of a batch and changes no expectation.
    """
    level_key, mask_key = jax.random.split(key)
    rows = is_answer.shape[0]
    noise = SMALLEST_NOISE + (1.0 - SMALLEST_NOISE) * spread_evenly(level_key, rows)
    return noise, is_answer & (jax.random.uniform(mask_key, is_answer.shape, jnp.float32) < noise[:, None])


def row_losses(
    log_probs: Float[Array, "B T"], masked: Bool[Array, "B T"], noise: Float[Array, " B"]
) -> Float[Array, " B"]:
    """-(1/t) * sum over masked positions of log p(token | rest), per row, in nats.

    Its mean over t ~ U(0, 1) and the masks is an upper bound on -log p(answer | prompt) (LLaDA, eq. 3 and 5).
    `log_probs` is read at masked positions only.
    """
    return -jnp.sum(jnp.where(masked, log_probs, 0.0), axis=1) / noise


def router_losses(
    logits: Float[Array, "N B T E"], valid: Bool[Array, "B T"], *, experts_per_token: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Load balance and z-loss over valid positions, mean over layers."""
    count = jnp.maximum(valid.sum(dtype=jnp.float32), 1.0)
    mean = lambda values: jnp.sum(jnp.where(valid[..., None], values, 0.0), axis=(1, 2)) / count  # noqa: E731
    shares, experts = jax.nn.softmax(logits, axis=-1), logits.shape[-1]
    route = SoftmaxTopK(experts_per_token=experts_per_token)
    chosen, _ = route(jax.lax.stop_gradient(logits).reshape(-1, experts))
    counts = jax.nn.one_hot(chosen, experts, dtype=jnp.float32).sum(axis=-2).reshape(logits.shape)
    used = mean(counts / experts_per_token)  # [N, E], sums to one
    balance = experts * jnp.sum(used * mean(shares), axis=-1)
    squared = jax.nn.logsumexp(logits, axis=-1, keepdims=True) ** 2
    return balance.mean(), mean(squared).mean()


def masked_diffusion_loss(
    graphdef: nnx.GraphDef[Any],
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    *,
    mask_id: int | Int[Array, ""],
    weights: LossWeights = LossWeights(),
    remat: bool = False,
    vocab_chunk: int = 8192,
) -> tuple[Float[Array, ""], Losses]:
    """The loss of a batch at random noise levels and masks; differentiable in `params`.

    Args:
        graphdef: of the model, from `nnx.split`; it has `hidden_and_router` and `log_probs`.
        params: its parameters.
        batch: rows; one without any answer token counts as zero.
        key: of the noise.
        mask_id: what a masked token is replaced by.
        weights: of the router's losses.
        remat: trade a second forward of each layer for its activations.
        vocab_chunk: columns of the vocabulary whose logits are held at once.

    Returns:
        The total, and its parts.
    """
    noise, masked = sample_masks(key, batch.is_answer & batch.valid)
    lengths = jnp.maximum((batch.is_answer & batch.valid).sum(axis=1, dtype=jnp.float32), 1.0)
    return losses_at(
        graphdef, params, batch, masked, lambda log_probs: row_losses(log_probs, masked, noise) / lengths,
        mask_id=mask_id, weights=weights, remat=remat, vocab_chunk=vocab_chunk)


def losses_at(
    graphdef: nnx.GraphDef[Any],
    params: Params,
    batch: Batch,
    masked: Bool[Array, "B T"],
    rows: Callable[[Float[Array, "B T"]], Float[Array, " B"]],
    *,
    mask_id: int | Int[Array, ""],
    weights: LossWeights,
    remat: bool,
    vocab_chunk: int,
) -> tuple[Float[Array, ""], Losses]:
    """The loss of a batch with given positions masked: the mean over rows of what `rows` makes of the log-probs of
    its tokens, and the router's losses. Other arguments and result as of `masked_diffusion_loss`.
    """
    model = nnx.merge(graphdef, params)
    hidden, logits = model.hidden_and_router(
        jnp.where(masked, mask_id, batch.tokens), positions=batch.positions, key_mask=batch.valid, remat=remat)
    diffusion = jnp.mean(rows(model.log_probs(hidden, batch.tokens, vocab_chunk=vocab_chunk)))
    balance, router_z = router_losses(logits, batch.valid, experts_per_token=model.config.experts_per_token)
    total = diffusion + weights.balance * balance + weights.router_z * router_z
    return total, Losses(total=total, diffusion=diffusion, balance=balance, router_z=router_z)
